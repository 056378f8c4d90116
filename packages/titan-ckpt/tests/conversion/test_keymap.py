import pytest
import torch

from titan_ckpt.conversion.keymap import ModelFacts, rows, to_foreign, to_native
from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.lazy import LazyTensor, in_memory

KEYS = {
    "embedding": "emb",
    "layers.*.wq": ("blocks.*.q", "rotary"),
    "layers.*.experts": "blocks.*.experts.*.w",
    "head": ("out", "untied"),
}
SHAPES = {"embedding": (6, 4), "layers.0.wq": (8, 4), "layers.0.experts": (3, 2, 4)}
TIED = ModelFacts(shapes=SHAPES, shared={"head": "embedding"}, head_dim=4)
UNTIED = ModelFacts(shapes={**SHAPES, "head": (6, 4)}, head_dim=4)


def native(facts: ModelFacts) -> dict[str, LazyTensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: in_memory(torch.randn(shape, generator=generator), "n") for name, shape in facts.shapes.items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].all(), other[name].all()) for name in one)


@pytest.mark.parametrize("facts", [TIED, UNTIED])
def test_there_and_back(facts: ModelFacts) -> None:
    ours = native(facts)
    theirs, shared = to_foreign(ours, KEYS, facts)
    expected = {"emb", "blocks.0.q", "blocks.0.experts.0.w", "blocks.0.experts.1.w", "blocks.0.experts.2.w"}
    assert theirs.keys() == (expected if facts is TIED else expected | {"out"})
    assert shared == {}
    assert torch.equal(theirs["blocks.0.experts.2.w"].all(), ours["layers.0.experts"].all()[2])
    assert not torch.equal(theirs["blocks.0.q"].all(), ours["layers.0.wq"].all())
    back = to_native(theirs, KEYS, facts)
    assert back.problems == ()
    assert equal(dict(back.tensors), ours)


def test_without_a_key_map_names_stay_and_a_shared_tensor_has_two() -> None:
    ours = native(TIED)
    theirs, shared = to_foreign(ours, None, TIED)
    assert theirs.keys() == ours.keys()
    assert shared == {"head": "embedding"}
    assert to_native({**theirs, "head": theirs["embedding"]}, None, TIED).problems == ()


def test_a_shared_tensor_may_have_either_name() -> None:
    ours = native(TIED)
    head_only = {name: tensor for name, tensor in ours.items() if name != "embedding"} | {"head": ours["embedding"]}
    found = to_native(head_only, None, TIED)
    assert equal(dict(found.tensors), ours)


def problems(**changes: torch.Tensor | None) -> str:
    theirs, _ = to_foreign(native(TIED), KEYS, TIED)
    for name, tensor in changes.items():
        theirs.pop(name.replace("__", "."), None)
        if tensor is not None:
            theirs[name.replace("__", ".")] = in_memory(tensor, "file.bin")
    return "; ".join(to_native(theirs, KEYS, TIED, ("blocks.*.freqs",), "SRC").problems)


def test_every_problem_names_the_key_and_its_file() -> None:
    assert problems() == ""
    assert problems(emb=None) == "emb is missing in SRC (it makes embedding)"
    assert problems(blocks__0__experts__1__w=None).startswith("blocks.0.experts.1.w is missing in SRC")
    assert problems(emb=torch.ones(5, 4)) == "emb in file.bin is [5, 4], and [6, 4] is expected"
    assert problems(other=torch.ones(1)) == "other in file.bin is not known to this model"
    assert problems(blocks__0__freqs=torch.ones(1)) == ""
    assert "quantized weights" in problems(emb=torch.ones(6, 4, dtype=torch.int8))
    assert "quantized weights" in problems(emb=torch.ones(6, 4, dtype=torch.float8_e4m3fn))
    assert "out in file.bin has other numbers" not in problems(out=None)
    assert problems(out=torch.ones(6, 4)) == (
        "head in file.bin has other numbers than embedding, but the configuration ties them"
    )


def test_all_problems_are_listed() -> None:
    found = problems(emb=torch.ones(5, 4), other=torch.ones(1), blocks__0__q=None)
    assert all(name in found for name in ("emb in", "other in", "blocks.0.q is missing"))


def test_a_model_that_the_other_format_has_no_place_for_is_refused() -> None:
    facts = ModelFacts(shapes={**SHAPES, "layers.0.bias": (3,)}, head_dim=4)
    with pytest.raises(CheckpointError, match=r"no place for layers\.0\.bias"):
        rows(KEYS, facts)
    with pytest.raises(CheckpointError, match="unknown words: upside-down"):
        rows({"embedding": ("emb", "upside-down")}, TIED)


def test_a_star_is_one_component() -> None:
    facts = ModelFacts(shapes={"layers.0.sub.wq": (8, 4)}, head_dim=4)
    with pytest.raises(CheckpointError, match="no place for"):
        rows(KEYS, facts)
