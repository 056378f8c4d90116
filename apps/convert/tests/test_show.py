"""`inspect`, `diff` and `verify`, on every format."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_models import as_meta
from titan_convert.cli import main

Saved = Callable[..., Path]


@pytest.fixture
def places(saved: Saved, tmp_path: Path) -> dict[str, Path]:
    """One model in all formats."""
    source = saved("llama-scaled")
    as_meta(source, tmp_path / "meta", 2)
    assert main(["hf-to-dcp", str(source), str(tmp_path / "step-0"), "--no-check"]) == 0
    assert main(["dcp-to-torch", str(tmp_path / "step-0"), str(tmp_path / "x.pt"), "--only", "model"]) == 0
    return {"hf": source, "meta": tmp_path / "meta", "dcp": tmp_path / "step-0", "torch": tmp_path / "x.pt"}


def test_each_format_is_described(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for kind, words in {
        "hf": "Hugging Face safetensors folder",
        "meta": "Meta Llama folder",
        "dcp": "titan checkpoint",
        "torch": "torch.save file",
    }.items():
        assert main(["inspect", str(places[kind]), "--tensors"]) == 0
        text = capsys.readouterr().out
        assert words in text
        assert "float32" in text
        # The same numbers wherever it is, and the model where the format tells it.
        parameters = sum(tensor.numel() for tensor in load_file(places["hf"] / "model.safetensors").values())
        assert f"parameters {parameters:,}" in text
        if kind != "torch":
            assert "3 layers, dim 64, 8 heads of 8, 4 of keys, vocabulary 132, RoPE base 500 scaled by 8" in text
    assert "layers.0.attention_norm.weight" in text


def test_a_folder_that_is_not_whole_is_shown_with_its_problems(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = places["hf"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (places["hf"] / "config.json").unlink()
    assert main(["inspect", str(places["hf"])]) == 1
    text = capsys.readouterr().out
    assert "problem    model.safetensors is no whole safetensors file" in text
    assert "has no config.json" in text


@pytest.mark.parametrize(
    ("one", "other"), [("hf", "dcp"), ("meta", "hf"), ("dcp", "meta"), ("hf", "hf"), ("dcp", "dcp")]
)
def test_one_model_in_two_formats_is_equal(
    places: dict[str, Path], one: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(places[one]), str(places[other])]) == 0
    assert "equal: " in capsys.readouterr().out


def test_differences_are_listed_and_change_the_exit_code(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = places["hf"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, file, {"format": "pt"})
    capsys.readouterr()
    assert main(["diff", str(places["dcp"]), str(places["hf"])]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first == "norm.weight: numbers: 1 numbers differ, the largest difference is 0.5"
    assert last == "1 of 30 tensors differ"


def test_files_are_compared_by_their_own_names(places: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(places["torch"], weights_only=True)
    torch.save({**state, "more": torch.ones(1)}, tmp_path / "y.pt")
    assert main(["diff", str(places["torch"]), str(places["torch"])]) == 0
    assert main(["diff", str(places["torch"]), str(tmp_path / "y.pt")]) == 1


def test_what_does_not_fit_together_cannot_be_compared(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(places["hf"] / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, places["hf"] / "model.safetensors")
    assert main(["diff", str(places["hf"]), str(places["dcp"])]) == 1
    assert "cannot be compared: model.norm.weight is missing" in capsys.readouterr().err


def test_verify_says_what_it_has_compared(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(places["dcp"])]) == 0
    assert "whole: " in capsys.readouterr().out
    data = places["dcp"] / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    assert main(["verify", str(places["dcp"])]) == 1
    output = capsys.readouterr()
    assert "__0_0.distcp has" in output.err
    assert "damaged: " in output.out
    assert main(["verify", str(places["torch"])]) == 0
    assert main(["verify", str(places["dcp"] / "absent")]) == 1
