from pathlib import Path

from readme import run_python


def test_the_readme_runs_as_it_is_written(tmp_path):
    lines = run_python(Path(__file__).parents[1] / "README.md", tmp_path).splitlines()
    assert "precision.param_dtype" in lines[0]
    assert "precision.reduce_dtype" in lines[1]
    assert lines[-1].startswith("The recipe 'mxfp8' cannot be used")
