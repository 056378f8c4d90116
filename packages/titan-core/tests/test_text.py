from titan_core.text import human, terminal_width, wrap


def test_sizes_are_read_at_a_glance():
    assert [human(size) for size in (0, 1023, 1536, 2**40)] == ["0 B", "1023 B", "1.50 KiB", "1.00 TiB"]


def test_lines_fit_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal_width() == 80
    assert wrap("  a line of words", 10).splitlines() == ["  a line", "      of", "      words"]
