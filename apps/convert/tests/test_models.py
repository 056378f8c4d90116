import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_models import as_meta
from titan_ckpt.errors import CheckpointError
from titan_ckpt.location import place_of
from titan_convert.cli import main
from titan_convert.models import of_checkpoint, of_hugging_face, of_meta
from titan_models.model_file import to_json

Saved = Callable[..., Path]


def test_the_model_is_recognised_in_every_format_and_by_every_file(saved: Saved, tmp_path: Path) -> None:
    source = saved("llama-scaled")
    as_meta(source, tmp_path / "meta", 2)
    assert main(["hf-to-dcp", str(source), str(tmp_path / "step-0"), "--no-check"]) == 0
    expected = of_hugging_face(place_of(source)).config
    assert expected.rope_scaling is not None
    assert of_checkpoint(place_of(tmp_path / "step-0"), None).config == expected
    (tmp_path / "model.json").write_text(to_json(expected))
    for named in (source, source / "config.json", tmp_path / "step-0", tmp_path / "model.json"):
        assert of_checkpoint(place_of(tmp_path), str(named)).config == expected
    # How Llama was initialised is not in Meta's files.
    assert of_meta(place_of(tmp_path / "meta")).config == expected
    assert of_checkpoint(place_of(tmp_path), str(tmp_path / "meta")).config == expected


@pytest.mark.parametrize("kind", ["llama-scaled", "llama-scaled-tied"])
def test_metas_weights_tell_whether_the_head_is_tied(saved: Saved, tmp_path: Path, kind: str) -> None:
    as_meta(saved(kind), tmp_path / "meta", 1)
    assert of_meta(place_of(tmp_path / "meta")).config.tie_embeddings == kind.endswith("tied")


def test_what_says_nothing_is_refused(saved: Saved, tmp_path: Path) -> None:
    for content, message in (("[]", "holds no JSON object"), ("{", "is not JSON"), ("{}", "model_type None")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            of_hugging_face(place_of(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        of_hugging_face(place_of(tmp_path))
    with pytest.raises(CheckpointError, match="neither a model"):
        of_checkpoint(place_of(tmp_path), str(tmp_path))
    with pytest.raises(CheckpointError, match=r"doesn't say which model it holds.*--config"):
        of_checkpoint(place_of(tmp_path), None)


def test_other_names_are_those_of_the_family(saved: Saved) -> None:
    model = of_hugging_face(place_of(saved("qwen3")))
    assert model.keys("titan") is None
    keys = model.keys("torchtitan")
    assert keys is not None
    assert keys["layers.*.attention.wq.weight"] == "layers.*.attention.qkv_linear.wq.weight"
    with pytest.raises(CheckpointError, match="no names of 'meta'"):
        model.table("meta")
    assert json.dumps(model.derived)
