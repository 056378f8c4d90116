"""`inspect` and `verify`, on every format."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from titan_convert.cli import main


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
