"""What the README tells people to type is understood, and the numbers it names are true."""

import re
import shlex
from pathlib import Path

import pytest

from titan_ckpt.local_place import LocalPlace
from titan_ckpt.manifest import Manifest
from titan_models import model_file
from titan_models.facts import parameter_count
from titan_train import generate_cli
from titan_train.cli import run
from titan_train.config_file import to_json
from titan_train.configs import llama3, qwen3
from titan_train.registry import config_functions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands():
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            match = re.search(r"(?:titan-train|-m titan_train)(?![.\w])(.*)", line)
            ranks = re.search(r"--nproc-per-node (\d+)", line)
            if match:
                yield ranks[1] if ranks else "1", shlex.split(match[1], comments=True)


@pytest.mark.parametrize(("ranks", "arguments"), list(commands()))
def test_every_command_is_understood(ranks, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.json").write_text(to_json(llama3.llama3_debug()))
    for weights in ("runs/mine/checkpoints/step-1", "qwen3"):
        write_checkpoint(Path(weights), llama3.llama3_debug().model)
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            run(arguments)
    else:
        assert run([*arguments, "--print-config"]) == 0, capsys.readouterr().err


def test_every_command_that_generates_is_understood():
    found = re.findall(r"(?:titan-generate|titan_train\.generate_cli)(.*)", README)
    commands = [shlex.split(line, comments=True) for line in found if "--prompt" in line]
    assert len(commands) >= 3
    for arguments in commands:
        generate_cli.build_parser().parse_args(arguments)


def write_checkpoint(folder, model):
    """As much of one as tells which model it holds."""
    (folder / "files").mkdir(parents=True)
    files = {"files/model.json": model_file.to_json(model).encode(), "files/tokenizer.json": b"{}"}
    records = {name: LocalPlace(folder).write(name, content) for name, content in files.items()}
    manifest = Manifest(step=1, world_size=1, state=("model",), per_rank=(), meta={}, versions={}, files=records)
    LocalPlace(folder).write("manifest.json", manifest.to_bytes())


def test_the_first_command_is_among_them():
    assert ("1", []) in list(commands())


def test_every_configuration_is_listed_with_its_size():
    for name in [*config_functions(llama3), *config_functions(qwen3)]:
        assert f"`{name}`" in README
    assert f"{parameter_count(llama3.llama3_debug().model):,} parameters" in README


def test_every_file_that_is_named_exists():
    named = re.findall(r"\]\(((?!http)[^)#]+)\)|`((?:tests|packages|apps)/[\w/.-]+)`", README)
    assert len(named) > 10
    for link, path in named:
        assert (ROOT / (link or path)).exists(), link or path
