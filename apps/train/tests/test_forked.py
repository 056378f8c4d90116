import io
import os

import pytest

from titan_train.forked import ProcessError, Progress, in_processes


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


class Terminal(io.StringIO):
    def isatty(self):
        return True


def told(stream, seconds):
    """What is said of work whose parts are asked about after so many seconds."""
    now = [0.0]
    progress = Progress("rehearsing", 4, stream, lambda: now[0])
    for i, now[0] in enumerate(seconds):
        progress.tell(i)
    progress.end()
    return stream.getvalue()


def test_quick_work_is_silent():
    assert told(io.StringIO(), [0.1, 4.9]) == told(Terminal(), [0.1, 0.9]) == ""


def test_long_work_gives_signs_of_life():
    assert told(io.StringIO(), [1.0, 5.2, 9.0, 11.0, 12.0]) == (
        "rehearsing: 1 of 4 done after 5 s\nrehearsing: 3 of 4 done after 11 s\n"
    )


def test_a_terminal_shows_one_line_that_disappears():
    *lines, wiped, nothing = told(Terminal(), [0.5, 1.5, 2.0, 10.0]).split("\r")[1:]
    assert lines == ["rehearsing: 1 of 4 done after 2 s", "rehearsing: 3 of 4 done after 10 s"]
    assert (set(wiped), nothing) == ({" "}, "")
    assert len(wiped) == len(lines[-1])


def test_processes_tell_how_far_they_are(monkeypatch, capsys):
    monkeypatch.setattr("titan_train.forked._QUIET_SECONDS", 0.0)
    in_processes(os.getpid, [(), ()], "counting")
    assert "counting: " in capsys.readouterr().err
