import io
import os
import pty
import re
import select

import pytest

from titan_metrics.console import ConsoleSink

VALUES = {
    "loss": 3.14159,
    "grad_norm": 1.2345,
    "lr": 3e-4,
    "tokens_per_second": 12345.6,
    "mfu": 0.412,
    "memory.peak": 1.2 * 2**30,
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_line_holds_what_one_wants_at_a_glance():
    clock, stream = Clock(), io.StringIO()
    sink = ConsoleSink(100, stream=stream, clock=clock)
    clock.now = 20.75
    sink.log(20, VALUES)
    assert stream.getvalue() == (
        "step 20/100  loss 3.1416  grad 1.23  lr 3.0e-04  12,346 tok/s  mfu 41.2%  mem 1.2 GiB  eta 0:01:23\n"
    )


def test_missing_values_are_left_out_and_others_shown():
    stream = io.StringIO()
    sink = ConsoleSink(4, stream=stream, clock=Clock())
    values = {
        "accuracy": 0.98764,
        "phase": "[warm]",
        "tokens": 512,
        "step_seconds": 1.0,
        "time.other": 0.1,
        "norms.gradient.layers.0": 2.0,
    }
    sink.log(4, values)
    assert stream.getvalue() == "step 4/4  accuracy 0.9876  phase [warm]\n"


def test_a_value_that_is_not_a_number_is_shown_as_such():
    stream = io.StringIO()
    ConsoleSink(4, stream=stream, clock=Clock()).log(4, {"loss": float("nan"), "grad_norm": float("inf")})
    assert stream.getvalue() == "step 4/4  loss nan  grad inf\n"


def test_the_time_left_counts_from_the_resumed_step_and_follows_the_speed():
    clock, stream = Clock(), io.StringIO()
    sink = ConsoleSink(1000, first_step=500, stream=stream, clock=clock)
    clock.now += 100
    sink.log(510, {})
    assert stream.getvalue().endswith("eta 1:21:40\n")  # 490 steps of 10 s
    for step in range(520, 760, 10):
        clock.now += 10
        sink.log(step, {})
    assert stream.getvalue().endswith("eta 0:04:10\n")  # 250 steps of 1 s: the slow start is forgotten


def test_a_second_line_of_the_same_step_does_not_disturb_the_time_left():
    clock, stream = Clock(), io.StringIO()
    sink = ConsoleSink(100, stream=stream, clock=clock)
    clock.now += 10
    sink.log(10, {})
    clock.now += 300  # validation
    sink.log(10, {"validation_loss": 3.0})
    assert stream.getvalue().endswith("validation_loss 3  eta 0:01:30\n")


@pytest.fixture
def terminal(monkeypatch):
    """A real terminal of 80 columns: what a program writes to `stream` is read from the other end."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    reader, writer = pty.openpty()

    def read():
        written = b""
        while select.select([reader], [], [], 0.1)[0]:
            written += os.read(reader, 1 << 16)
        return written.decode()

    with os.fdopen(writer, "w") as stream:
        yield stream, read
    os.close(reader)


def visible(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_shows_a_bar_of_one_line_that_fits(terminal):
    stream, read = terminal
    clock = Clock()
    sink = ConsoleSink(100, stream=stream, clock=clock)
    assert "step 0/100" in visible(read())
    clock.now = 20.75
    sink.log(20, VALUES)
    drawn = visible(read()).strip()
    assert re.search(
        r"step 20/100 \S*[━╸╺]\S*.* loss 3.1416  12,346 tok/s  mfu 41.2%  mem 1.2 GiB  eta 0:01:23$", drawn
    )
    assert "\n" not in drawn
    assert len(drawn) <= 80

    sink.log(30, {"validation_loss": 3.0, "a_name_that_is_too_long_for_the_bar": 1.0})
    drawn = visible(read()).strip()
    assert len(drawn) <= 80
    assert "loss 3.1416" in drawn  # the last known loss stays
    assert "eta " in drawn
    sink.close()
    assert "\x1b[?25h" in read()  # the cursor is back


def test_the_bar_of_a_resumed_run_starts_where_it_was(terminal):
    stream, read = terminal
    sink = ConsoleSink(100, first_step=50, stream=stream)
    assert "step 50/100" in visible(read())
    sink.close()


def test_the_bar_does_not_read_markup_in_values(terminal):
    stream, read = terminal
    sink = ConsoleSink(10, stream=stream)
    sink.log(1, {"phase": "[bold]x[/]"})
    sink.close()
    assert "phase [bold]x[/]" in visible(read())


def test_colours_are_left_out_where_nobody_wants_them(terminal, monkeypatch):
    stream, read = terminal
    ConsoleSink(10, stream=stream).log(5, {"loss": 1.0})
    coloured = re.compile(r"\x1b\[[0-9;]*[39][0-7]m")
    assert coloured.search(read())
    monkeypatch.setenv("NO_COLOR", "1")
    ConsoleSink(10, stream=stream).log(5, {"loss": 1.0})
    plain = read()
    assert "step 5/10" in visible(plain)
    assert not coloured.search(plain)


def test_a_dumb_terminal_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream, read = terminal
    ConsoleSink(10, stream=stream).log(10, {"loss": 1.0})
    assert read() == "step 10/10  loss 1.0000\r\n"
