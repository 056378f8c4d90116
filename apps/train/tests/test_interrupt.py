import os
import signal
import subprocess
import sys

import pytest

from titan_train.interrupt import Interrupt, Preempted


@pytest.mark.parametrize(
    ("number", "votes"), [(signal.SIGINT, [1, 0]), (signal.SIGTERM, [0, 1]), (signal.SIGUSR1, [0, 1])]
)
def test_the_first_signal_only_asks(number, votes):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with Interrupt(alone=True) as interrupt, interrupt.deferred():
        assert interrupt.votes == [0, 0]
        os.kill(os.getpid(), number)
        assert (interrupt.received, interrupt.votes) == (number, votes)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_ranks_end_by_what_any_of_them_received():
    assert Interrupt.decision([0, 0]) is None
    assert Interrupt.decision([4, 0]) == signal.SIGINT
    assert Interrupt.decision([1, 1]) == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_there_is_anything_to_save_a_process_alone_ends_at_once(number):
    with Interrupt(alone=True), pytest.raises(Preempted):
        os.kill(os.getpid(), number)
    with Interrupt(alone=False) as interrupt:
        os.kill(os.getpid(), number)
        assert interrupt.votes == [0, 1]


@pytest.mark.parametrize(("second", "ends"), [("SIGINT", True), ("SIGTERM", False)])
def test_only_a_second_ctrl_c_ends_the_process_at_once(second, ends):
    code = (
        "import os, signal; from titan_train.interrupt import Interrupt\n"
        "with Interrupt(alone=True) as interrupt, interrupt.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('asked', flush=True)\n"
        f"    os.kill(os.getpid(), signal.{second}); print('still here', flush=True)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == (-signal.SIGINT if ends else 0)
    assert result.stdout == ("asked\n" if ends else "asked\nstill here\n")
    assert "press Ctrl-C again" in result.stderr
