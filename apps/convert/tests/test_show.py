"""`inspect` and `verify`, on every format."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tiny_models import as_meta
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


def test_an_unreadable_manifest_is_shown(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    manifest = places["dcp"] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 0', '"step": 1'))
    assert main(["inspect", str(places["dcp"])]) == 1
    assert "problem    manifest.json is not what was written" in capsys.readouterr().out


@pytest.mark.parametrize("vocab_size", [132, -1])
def test_a_missing_last_shard_of_metas_shows_in_the_shapes(
    places: dict[str, Path], vocab_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    params = places["meta"] / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"vocab_size": vocab_size}))
    assert main(["verify", str(places["meta"])]) == 0
    assert "whole: " in capsys.readouterr().out
    last = places["meta"] / "consolidated.01.pth"
    content = last.read_bytes()
    last.unlink()
    assert main(["verify", str(places["meta"])]) == 1
    output = capsys.readouterr()
    expected = (
        "the embedding has 66 rows" if vocab_size > 0 else "wq.weight in consolidated.00.pth is [32, 64], and [64, 64]"
    )
    assert expected in output.err
    assert "damaged: " in output.out
    last.write_bytes(content)
    as_meta(places["hf"], places["meta"].with_name("four"), 4)
    shutil.copy(places["meta"].with_name("four") / "consolidated.01.pth", last)
    assert main(["verify", str(places["meta"])]) == 1
    assert "they are of different splits" in capsys.readouterr().err


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
