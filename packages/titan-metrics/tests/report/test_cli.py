import subprocess
import sys

import pytest

from titan_metrics.report.cli import main


def test_a_page_is_written(make_run, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert main([str(make_run()), "--output", str(output), "--steps", "55", "56"]) == 0
    html = output.read_text()
    assert html.startswith("<!doctype html>")
    assert "Steps 55 to 56, the latest" in html
    assert capsys.readouterr().out == f"{output}: {len(output.read_bytes()) / 1e6:.1f} MB\n"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "There is no run directory"),
        (["."], "holds no run"),
    ],
)
def test_a_mistake_is_one_paragraph(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("titan-report: ")
    assert told in error
    assert error.count("\n") == 1


def test_a_page_that_cannot_be_written_is_an_error(bare_run, tmp_path, capsys):
    assert main([str(bare_run), "--output", str(tmp_path / "no/page.html")]) == 1
    assert "page.html: No such file or directory. Name a file" in capsys.readouterr().err


def test_it_answers_without_torch():
    check = (
        "import sys; from titan_metrics.report.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "import titan_metrics.report.server\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], stdout=subprocess.DEVNULL, check=False).returncode == 0
