"""Runs the Python of a README as a reader would: all of it, in a new process, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path


def run_python(readme: Path, folder: Path) -> str:
    """Executes the ```python blocks of `readme`, in their order, in `folder`; returns what they printed.

    Raises:
        AssertionError: if there are none, or they fail; with what went to standard error.
    """
    blocks = re.findall(r"^```python\n(.*?)^```", readme.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks, f"{readme} has no example"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TITAN_CACHE": str(folder / "cache")},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
