import os
import signal
import subprocess
import sys

import pytest

from titan_train.interrupt import Interrupt, Preempted
from titan_train.votes import Votes


@pytest.mark.parametrize(
    ("number", "vote"),
    [(signal.SIGINT, Votes(by_hand=1)), (signal.SIGTERM, Votes(preempted=1)), (signal.SIGUSR1, Votes(preempted=1))],
)
def test_the_first_signal_only_asks(number, vote):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with Interrupt(alone=True) as interrupt, interrupt.deferred():
        assert interrupt.vote == Votes()
        os.kill(os.getpid(), number)
        assert (interrupt.received, interrupt.vote) == (number, vote)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_while_a_run_starts_a_process_alone_ends_at_the_next_check(number):
    with Interrupt(alone=True) as interrupt:
        interrupt.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Preempted):
            interrupt.check()
    with Interrupt(alone=False) as interrupt:
        os.kill(os.getpid(), number)
        interrupt.check()
        assert interrupt.vote == Votes(preempted=1)


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
