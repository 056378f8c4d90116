import pytest

from titan_metrics.report.files import JsonLines, ReportError, read_object


def test_only_new_whole_lines_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = JsonLines(path)
    assert list(lines.new()) == []
    path.write_text('{"step": 1}\n{"step": 2')
    assert list(lines.new()) == [{"step": 1}]
    with path.open("a") as file:
        file.write('}\n{"step": 3}\n')
    assert list(lines.new()) == [{"step": 2}, {"step": 3}]
    assert list(lines.new()) == []


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    lines = JsonLines(path)
    assert len(list(lines.new())) == 2
    assert not lines.replaced()
    (tmp_path / "b").write_text('{"step": 7}\n')
    (tmp_path / "b").replace(path)
    assert lines.replaced()
    assert list(lines.new()) == [{"step": 7}]


@pytest.mark.parametrize("start", ['{"start": 1.5, "rank": 0}', '{"event": "start", "time": 1.5}'])
def test_a_line_that_a_killed_process_left_is_skipped(tmp_path, start):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"name": "a"}}\n{{"name": "b", "se\n{start}\n')
    assert [next(iter(line)) for line in JsonLines(path).new()] == ["name", start.split(chr(34))[1]]


def test_a_line_that_is_no_object_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    lines = JsonLines(path)
    with pytest.raises(ReportError, match=r"metrics\.jsonl, line 2, is not a JSON object: it begins 'hello'"):
        list(lines.new())
    path.write_text('{"step": 1}\n{"ok": 1}\n{"step": 2}\n')  # in place, no shorter
    assert lines.replaced()
    assert len(list(lines.new())) == 3


def test_an_object_is_read_or_missing_or_an_error(tmp_path):
    path = tmp_path / "config.json"
    assert read_object(path) is None
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}
    path.write_text("[1]")
    with pytest.raises(ReportError, match="holds a JSON list"):
        read_object(path)
    path.write_text("{")
    with pytest.raises(ReportError, match=r"config\.json is not JSON"):
        read_object(path)
