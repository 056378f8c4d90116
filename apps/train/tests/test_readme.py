import re
from pathlib import Path

from titan_train.cli import run

README = Path(__file__).parents[1] / "README.md"


def test_the_configuration_in_the_readme_works(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "my_runs.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    assert run(["--module", "my_runs.py", "--config", "small", "--print-config"]) == 0
    assert '"seq_len": 64' in capsys.readouterr().out
