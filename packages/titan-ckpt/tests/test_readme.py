from pathlib import Path

from readme import run_python


def test_the_readme_runs_as_it_is_written(tmp_path):
    printed = run_python(Path(__file__).parents[1] / "README.md", tmp_path).splitlines()
    assert "['step-4', 'step-5']" in printed
    assert "4 {'tokens': 512} b'{\"width\": 16}'" in printed
    assert "['step-3', 'step-2', 'step-1']" in printed
