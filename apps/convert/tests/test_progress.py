import io

from titan_convert.progress import ProgressLine, size_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_sizes_are_readable() -> None:
    sizes = (0, 999, 1000, 3_200_000_000, 4.5e15)
    assert [size_text(size) for size in sizes] == ["0 bytes", "999 bytes", "1.0 kB", "3.2 GB", "4,500.0 TB"]


def test_a_terminal_sees_one_line_that_changes_at_a_readable_pace() -> None:
    stream, times = Terminal(), iter([0.0, 0.05, 1.0, 2.0, 2.0])
    line = ProgressLine(stream, clock=lambda: next(times))
    for done in (100, 500, 1000, 2000):
        line("reading", done * 1000, 2_000_000)
    line("writing", 0, 10)
    line.close()
    first, second, third, fourth = stream.getvalue().split("\r")[1:]
    assert first.strip() == "reading   100.0 kB of 2.0 MB"
    assert second.strip() == "reading   1.0 MB of 2.0 MB, 1.0 MB/s, 1 s left"
    assert third.endswith("\n")
    assert third.strip() == "reading   2.0 MB of 2.0 MB, 1.0 MB/s"
    assert fourth == f"{'writing   0 bytes of 10 bytes':<78}\n"


def test_a_file_gets_a_line_when_a_part_is_done() -> None:
    stream, times = io.StringIO(), iter([0.0, 1.0, 2.0])
    line = ProgressLine(stream, clock=lambda: next(times))
    for done in (0, 5000, 10_000):
        line("reading", done, 10_000)
    line.close()
    assert stream.getvalue() == "reading   10.0 kB of 10.0 kB, 5.0 kB/s\n"
