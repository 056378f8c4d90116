import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from titan_convert import __version__
from titan_convert.cli import main


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    torch.save({"layers.0.w": torch.arange(6.0).view(2, 3), "step": 5}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "titan_convert", *arguments], capture_output=True, text=True, check=False
    )


def test_there_and_back(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, again = tmp_path / "step-0", tmp_path / "again.pt"
    assert main(["torch-to-dcp", str(model_file), str(folder), "--under", "model"]) == 0
    assert capsys.readouterr().out == f"wrote {folder}: 1 tensors, 24 bytes\n"
    assert main(["dcp-to-torch", str(folder), str(again), "--only", "model"]) == 0
    output = capsys.readouterr()
    assert output.out == (
        f"wrote {again}: 1 tensors, 24 bytes, the source verified by its manifest\n"
        "left out, for they are no tensors: model.step\n"
    )
    assert output.err.splitlines()[-1].startswith("writing   24 bytes of 24 bytes")
    found = torch.load(again, weights_only=True, mmap=True)
    assert found.keys() == {"layers.0.w"}
    assert torch.equal(found["layers.0.w"], torch.arange(6.0).view(2, 3))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_plain_dcp_folder_and_many_leftovers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"w": torch.ones(2), "other": {f"k{number}": number for number in range(10)}}
    torch_dcp.save(state, checkpoint_id=tmp_path / "plain")
    assert main(["dcp-to-torch", str(tmp_path / "plain"), str(tmp_path / "x.pt")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "verified" not in first
    assert second.startswith("left out, for they are no tensors: other.k0, other.k1, ")
    assert second.endswith("other.k7 and 2 more")


def test_what_exists_is_replaced_only_if_asked(model_file: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "folder")
    assert main(["torch-to-dcp", str(model_file), folder]) == 0
    assert main(["torch-to-dcp", str(model_file), folder]) == 1
    assert main(["torch-to-dcp", str(model_file), folder, "--overwrite"]) == 0
    assert main(["dcp-to-torch", folder, str(model_file)]) == 1
    assert main(["dcp-to-torch", folder, str(model_file), "--overwrite"]) == 0


def test_hashes_are_compared_unless_told_not_to(model_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert main(["torch-to-dcp", str(model_file), str(folder)]) == 0
    data = folder / "__0_0.distcp"
    five = torch.tensor(5.0).numpy().tobytes()
    data.write_bytes(data.read_bytes().replace(five, torch.tensor(7.0).numpy().tobytes()))
    arguments = ["dcp-to-torch", str(folder), str(tmp_path / "x.pt")]
    assert main(arguments) == 1
    assert main([*arguments, "--no-verify-hashes"]) == 0
    assert torch.load(tmp_path / "x.pt", weights_only=True)["layers.0.w"].flatten().tolist() == [0, 1, 2, 3, 4, 7]


@pytest.mark.parametrize(
    ("command", "src", "dst", "message"),
    [
        ("dcp-to-torch", "absent", "out", "absent does not exist"),
        ("torch-to-dcp", "absent", "out", "absent does not exist"),
        ("dcp-to-torch", "model.pt", "out", "is a file, and a folder in DCP layout is wanted"),
        ("torch-to-dcp", "folder", "out", "is a folder, and a file that torch.save has written is wanted"),
        ("dcp-to-torch", "empty", "out", "is no checkpoint"),
        ("dcp-to-torch", "cut-folder", "out", "__0_0.distcp has 9 bytes instead of"),
        ("torch-to-dcp", "cut.pt", "out", "cannot be read as a torch.save file"),
        ("dcp-to-torch", "folder", "absent/out", "absent does not exist; make it first"),
        ("torch-to-dcp", "model.pt", "absent/out", "absent does not exist; make it first"),
        ("torch-to-dcp", "model.pt", "model.pt/out", "could not be written"),
    ],
)
def test_what_cannot_be_done_is_one_paragraph_and_leaves_nothing(
    model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    src: str,
    dst: str,
    message: str,
) -> None:
    for folder in ("folder", "cut-folder"):
        main(["torch-to-dcp", str(model_file), str(tmp_path / folder)])
    (tmp_path / "cut-folder" / "__0_0.distcp").write_bytes(b"truncated")
    (tmp_path / "cut.pt").write_bytes(model_file.read_bytes()[:-50])
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()

    assert main([command, str(tmp_path / src), str(tmp_path / dst)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    error = [line for line in output.err.splitlines() if not line.startswith("verifying")]
    assert len(error) == 1
    assert error[0].startswith("titan-convert: ")
    assert message in error[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interruption_is_told_and_goes_on_when_run_again(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("titan_ckpt.conversion.layouts.metadata_bytes", interrupted)
        assert main(["torch-to-dcp", str(model_file), str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "out.partial"]
    assert main(["torch-to-dcp", str(model_file), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "out"]


def test_what_the_system_refuses_is_one_paragraph(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(self: object) -> bool:
        raise OSError("EndpointConnectionError: Could not connect\nto the endpoint")

    monkeypatch.setattr("titan_ckpt.local_place.LocalPlace.exists", unreachable)
    for command in (["inspect"], ["verify"], ["hf-to-dcp", "--no-check", "x"]):
        assert main([*command, str(model_file)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("titan-convert: EndpointConnectionError: Could not connect to the endpoint. Check ")


def test_a_store_that_cannot_be_reached_is_one_paragraph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    result = run("inspect", "s3://bucket/step-5")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("titan-convert: s3://bucket/step-5: EndpointConnectionError: ")


def test_a_reader_that_goes_ends_it_quietly(tmp_path: Path) -> None:
    torch.save({f"layers.{i}.w": torch.zeros(1) for i in range(5000)}, tmp_path / "a.pt")
    torch.save({f"blocks.{i}.w": torch.zeros(1) for i in range(5000)}, tmp_path / "b.pt")
    command = [sys.executable, "-m", "titan_convert", "diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("blocks.0.w: only in B")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize(
    "arguments", [[], ["convert"], ["dcp-to-torch", "a"], ["torch-to-dcp", "a", "b", "--ony", "c"]]
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: titan-convert" in capsys.readouterr().err


def test_help_answers_at_once_and_without_torch() -> None:
    code = (
        "import sys\n"
        "from titan_convert.cli import main\n"
        "for arguments in (['--help'], ['dcp-to-torch', '--help'], ['--version'], ['wrong']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run("--help")
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0
        assert "dcp-to-torch" in result.stdout
    assert min(seconds) < 0.3


def test_the_console_command_is_the_module(model_file: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("titan-convert")), "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"titan-convert {__version__}\n"
    result = run("dcp-to-torch", str(tmp_path / "absent"), str(tmp_path / "x"))
    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
