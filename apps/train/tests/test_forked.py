import os

import pytest

from titan_train.forked import ProcessError, in_processes


def test_results_come_in_the_order_of_the_tasks():
    pids = in_processes(lambda number: (number, os.getpid()), [(number,) for number in range(5)])
    assert [number for number, _ in pids] == [0, 1, 2, 3, 4]
    assert len({pid for _, pid in pids} - {os.getpid()}) == 5


def test_what_a_call_raises_is_raised():
    def fail(number):
        raise KeyError(number)

    with pytest.raises(KeyError, match="7"):
        in_processes(fail, [(7,)])


def test_a_process_without_a_result_is_an_error():
    with pytest.raises(ProcessError, match=r"exit code 3 and no result"):
        in_processes(os._exit, [(3,)])
