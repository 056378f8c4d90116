from pathlib import Path

from readme import run_python


def test_the_readme_runs_as_it_is_written(tmp_path):
    printed = run_python(Path(__file__).parents[1] / "README.md", tmp_path)
    assert "'tokens': (8, 32)" in printed
