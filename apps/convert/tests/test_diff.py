"""Two models side by side: what differs is found, what does not is equal, whatever the formats."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from titan_convert.cli import main
from titan_models.model_file import from_json, to_json

Saved = Callable[..., Path]


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


def test_configurations_are_compared_and_their_fields_listed(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = places["hf"] / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_theta"] = 9.0
    config["rope_parameters"]["factor"] = 4.0
    file.write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    capsys.readouterr()
    for one, other in (("hf", "dcp"), ("hf", "meta")):
        assert main(["diff", str(places[one]), str(places[other])]) == 1
        assert capsys.readouterr().out.splitlines() == [
            "configuration: norm_eps: 0.5 and 1e-05",
            "configuration: rope_theta: 9.0 and 500.0",
            "configuration: rope_scaling.factor: 4.0 and 8.0",
            "equal: 30 tensors",
            "the configurations differ in 3 fields",
        ]


def test_what_a_format_has_no_place_for_is_no_difference(places: dict[str, Path], tmp_path: Path) -> None:
    name = places["dcp"] / "files" / "model.json"
    name.write_text(to_json(dataclasses.replace(from_json(name.read_text()), init_std=0.5)))
    (places["dcp"] / "manifest.json").unlink()
    assert main(["diff", str(places["dcp"]), str(places["meta"])]) == 0
    assert main(["diff", str(places["dcp"]), str(places["hf"])]) == 1  # config.json has it


def test_a_side_that_is_silent_is_named(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (places["hf"] / "config.json").unlink()
    assert main(["diff", str(places["hf"]), str(places["hf"])]) == 0
    assert f"configurations not compared: none can be read in {places['hf']}" in capsys.readouterr().err


def test_a_dcp_side_may_have_the_names_of_another_project(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, ours, theirs = saved(), tmp_path / "ours", tmp_path / "theirs"
    assert main(["hf-to-dcp", str(source), str(ours), "--no-check"]) == 0
    assert main(["hf-to-dcp", str(source), str(theirs), "--keys", "torchtitan", "--no-check"]) == 0
    for one, other in ((ours, theirs), (theirs, ours), (source, theirs), (theirs, theirs)):
        assert main(["diff", str(one), str(other), "--keys", "torchtitan"]) == 0
        assert "equal: " in capsys.readouterr().out
    assert main(["diff", str(ours), str(theirs)]) == 1
    assert "not one name is on both sides: if a DCP side has the names of another project" in capsys.readouterr().err


def test_a_configuration_that_is_named_is_for_the_side_that_has_none(
    places: dict[str, Path], saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    (places["dcp"] / "files" / "model.json").unlink()
    (places["dcp"] / "manifest.json").unlink()
    assert main(["diff", str(places["dcp"]), str(places["hf"])]) == 1
    assert "--config" in capsys.readouterr().err
    assert main(["diff", str(places["dcp"]), str(places["hf"]), "--config", str(places["meta"])]) == 0
