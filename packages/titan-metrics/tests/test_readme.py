import re
from pathlib import Path

from readme import run_python


def test_the_readme_runs_as_it_is_written(tmp_path):
    printed = run_python(Path(__file__).parents[1] / "README.md", tmp_path)
    assert re.match(r"step 10/40  loss \S+  lr 3\.0e-03  [\d,]+ tok/s  mfu \S+%  mem \S+ GiB", printed), printed
    assert printed.endswith("No rank is slower than the others.\n")
