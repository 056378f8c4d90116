import re
import shlex
from pathlib import Path

import pytest
import torch

from titan_convert.cli import main

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_examples_run_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    for language, block in re.findall(r"```(python|console)\n(.*?)```", text, flags=re.DOTALL):
        if language == "python":
            exec(compile(block, str(README), "exec"), {"__name__": "__main__"})
            continue
        for command in re.findall(r"^\$ titan-convert (.*)$", block, flags=re.MULTILINE):
            assert main(shlex.split(command)) == 0
    assert "lm_head.weight" in torch.load("weights.pt", weights_only=True)
    assert (tmp_path / "step-1" / "manifest.json").exists()
    assert (tmp_path / "exported" / "titan-convert.json").exists()
