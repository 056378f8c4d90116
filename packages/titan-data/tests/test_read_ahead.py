import gc
import os
import threading
import traceback

import pytest

from titan_data.errors import ReadingError
from titan_data.read_ahead import ReadAhead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "titan-data"]


def test_results_come_in_order_from_the_first():
    ahead = ReadAhead(lambda number: number * 10, 3, depth=2)
    assert [ahead.take() for _ in range(5)] == [30, 40, 50, 60, 70]
    ahead.close()


def test_keeps_as_many_ready_as_asked_and_no_more():
    begun = threading.Semaphore(0)
    ahead = ReadAhead(lambda number: begun.release(), 0, depth=3)
    for _ in range(3):
        assert begun.acquire(timeout=5)
    assert not begun.acquire(timeout=0.05)
    ahead.take()
    assert begun.acquire(timeout=5)
    ahead.close()


def test_an_error_arrives_after_what_came_before_it_with_the_threads_traceback():
    def read_a_bad_sector(number):
        if number == 2:
            raise OSError("bad sector")
        return number

    ahead = ReadAhead(read_a_bad_sector, 0, depth=5)
    assert [ahead.take(), ahead.take()] == [0, 1]
    with pytest.raises(OSError, match="bad sector") as caught:
        ahead.take()
    assert "read_a_bad_sector" in "".join(traceback.format_exception(caught.value))


def test_closing_and_dropping_end_the_thread():
    ahead = ReadAhead(lambda number: number, 0, depth=1)
    assert len(threads()) == 1
    ahead.close()
    ahead.close()
    assert not threads()
    ahead = ReadAhead(lambda number: number, 0, depth=1)
    del ahead
    gc.collect()
    assert not threads()


def test_a_forked_child_knows_that_it_has_no_thread_and_ends_quietly():
    ahead = ReadAhead(lambda number: number, 0, depth=1)
    assert not ahead.forked
    pid = os.fork()
    if pid == 0:
        code = 0 if ahead.forked else 1
        ahead.close()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    ahead.close()


def test_a_result_that_does_not_come_is_an_error_that_says_where_the_thread_is():
    answered = threading.Event()

    def read(number):
        if number == 1:
            wait_for_a_disk(answered)
        return number

    ahead = ReadAhead(read, 0, depth=2, timeout_seconds=0.2)
    assert ahead.take() == 0
    with pytest.raises(ReadingError, match=r"has not come for 0\.2 seconds.*(?s:.*)in wait_for_a_disk"):
        ahead.take()
    ahead.close()  # waits for nobody
    (thread,) = threads()
    answered.set()
    thread.join(timeout=5)
    assert not thread.is_alive()


def wait_for_a_disk(answered):
    answered.wait()
