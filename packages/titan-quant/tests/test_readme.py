import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_runs_as_it_is_written(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    run = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    policy, refusal = run.stdout.split("\n", 2)[:2], run.stdout.splitlines()[-1]
    assert "precision.param_dtype" in policy[0]
    assert "precision.reduce_dtype" in policy[1]
    assert refusal.startswith("The recipe 'mxfp8' cannot be used")
