import os
import signal
import subprocess
import sys

from titan_train.interrupt import Interrupt


def test_the_first_signal_only_asks():
    for number in (signal.SIGINT, signal.SIGTERM):
        with Interrupt() as interrupt:
            assert not interrupt.requested
            os.kill(os.getpid(), number)
            assert interrupt.requested
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_interrupt_ends_the_process_at_once():
    code = (
        "import os, signal; from titan_train.interrupt import Interrupt\n"
        "with Interrupt():\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('asked', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('still here', flush=True)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGINT
    assert result.stdout == "asked\n"
    assert "press Ctrl-C again" in result.stderr
