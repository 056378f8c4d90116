"""The proof is a proof: it passes what is right, and each mistake that a conversion could make fails it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tiny_models import as_meta
from titan_ckpt.errors import CheckpointError
from titan_convert import check
from titan_convert.cli import main

Saved = Callable[..., Path]


def measured(kind: str, foreign: Path, native: Path, dtype: str | None = None) -> float:
    request = {"kind": kind, "foreign": str(foreign), "native": str(native), "keys": "titan", "config": None}
    return check.measure({**request, "dtype": dtype})["relative_difference"]


def converted(source: Path, dst: Path, command: str = "hf-to-dcp") -> Path:
    assert main([command, str(source), str(dst), "--no-check"]) == 0
    return dst


def test_what_is_right_passes(saved: Saved, tmp_path: Path, kind: str) -> None:
    source = saved(kind)
    assert measured("hf", source, converted(source, tmp_path / "step-0")) < 1e-5


@pytest.mark.parametrize("kind", ["llama-scaled", "llama-scaled-tied"])
def test_metas_formulas_agree_too(saved: Saved, tmp_path: Path, kind: str) -> None:
    as_meta(saved(kind), tmp_path / "meta", 2)
    native = converted(tmp_path / "meta", tmp_path / "step-0", "llama-to-dcp")
    assert measured("llama", tmp_path / "meta", native) < 1e-5


CONFIG_MISTAKES = [{"rope_theta": 10_000.0}, {"norm_eps": 1e-2}, {"rope_scaling": None}]


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_wrong_configuration_fails(saved: Saved, tmp_path: Path, mistake: dict[str, object]) -> None:
    source = saved("llama-scaled")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = 32  # so that the scaling matters in few tokens
    (source / "config.json").write_text(json.dumps(config))
    native = converted(source, tmp_path / "step-0")
    assert measured("hf", source, native) < 1e-5
    model = json.loads((native / "files" / "model.json").read_text())
    (native / "files" / "model.json").write_text(json.dumps(model | mistake))
    (native / "manifest.json").unlink()
    assert measured("hf", source, native) > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.2.mlp.experts.3.down_proj.weight",
        "model.layers.2.mlp.gate.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    ],
)
def test_a_wrong_tensor_fails(saved: Saved, tmp_path: Path, name: str) -> None:
    source = saved("qwen3-moe")
    native = converted(source, tmp_path / "step-0")
    tensors = load_file(source / "model.safetensors")
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert measured("hf", source, native) > 1e-3


def test_a_result_of_another_dtype_is_compared_with_the_rounded_source(saved: Saved, tmp_path: Path) -> None:
    source = saved()
    assert main(["hf-to-dcp", str(source), str(tmp_path / "step-0"), "--dtype", "bfloat16", "--no-check"]) == 0
    assert measured("hf", source, tmp_path / "step-0", "bfloat16") < 1e-5
    assert measured("hf", source, tmp_path / "step-0") > 1e-4


def test_the_bound_is_in_the_manifest_and_in_the_seal(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hf-to-dcp", str(saved()), str(tmp_path / "step-0"), "--keys", "torchtitan"]) == 0
    assert "checked against transformers: logits of 2 blocks differ by" in capsys.readouterr().out
    assert main(["dcp-to-hf", str(tmp_path / "step-0"), str(tmp_path / "out"), "--keys", "torchtitan"]) == 0
    manifest = json.loads((tmp_path / "step-0" / "manifest.json").read_text())
    seal = json.loads((tmp_path / "out" / "titan-convert.json").read_text())
    for found in (manifest["meta"]["check"], seal["meta"]["check"]):
        assert found["relative_difference"] <= check.BOUND
        assert found["seconds"] > 0
        assert found["peak_bytes"] > 1 << 20


def test_a_difference_publishes_nothing(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "BOUND", -1.0)
    assert main(["hf-to-dcp", str(saved()), str(tmp_path / "step-0")]) == 1
    assert not (tmp_path / "step-0").exists()


def test_a_check_that_cannot_be_made_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist.*--no-check"):
        check.prove("hf", str(tmp_path), str(tmp_path / "absent"), keys="titan", config=None, dtype=None)
