import pytest
import torch
from torch import nn

from titan_quant.select import SelectionError, select_linears


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.layers = nn.ModuleList(nn.ModuleDict({"wq": nn.Linear(16, 16), "gate": nn.Linear(16, 4)}) for _ in "ab")
        self.lm_head = nn.Linear(16, 10)


ROLES = {
    "layers.0.wq": "colwise",
    "layers.1.wq": "colwise",
    "layers.0.gate": "gate",
    "layers.1.gate": "gate",
    "lm_head": "head",
}


def select(model, roles, *, include=(), exclude=()):
    return select_linears(model, roles, wanted=["colwise"], include=include, exclude=exclude, option="quant")


def test_without_roles_everything_but_the_head_is_chosen():
    chosen, skipped = select(Model(), None)
    assert list(chosen) == ["layers.0.wq", "layers.0.gate", "layers.1.wq", "layers.1.gate"]
    assert skipped == {"lm_head": "the head"}


def test_a_layer_that_shares_the_embeddings_weight_is_the_head():
    model = nn.ModuleDict({"a": nn.Embedding(8, 4), "b": nn.Linear(4, 8, bias=False), "c": nn.Linear(4, 8)})
    model["b"].weight = model["a"].weight
    assert list(select(model, None)[0]) == ["c"]


def test_with_roles_those_wanted_are_chosen():
    chosen, skipped = select(Model(), ROLES)
    assert list(chosen) == ["layers.0.wq", "layers.1.wq"]
    assert skipped["layers.0.gate"] == "its role is gate"
    assert skipped["lm_head"] == "its role is head"


def test_names_add_and_take_away():
    chosen, skipped = select(Model(), ROLES, include=["lm_head", "*.gate"], exclude=["layers.1.*"])
    assert list(chosen) == ["layers.0.wq", "layers.0.gate", "lm_head"]
    assert skipped == {"layers.1.wq": "excluded by name", "layers.1.gate": "excluded by name"}
    assert "lm_head" in select(Model(), None, include=["lm_head"])[0]


@pytest.mark.parametrize(
    ("option", "pattern"), [("include", "layers.*.wk"), ("include", "layers.0"), ("exclude", "wk")]
)
def test_a_name_that_fits_nothing_is_refused(option, pattern):
    with pytest.raises(SelectionError, match=rf"quant\.{option}.*'{pattern}'".replace("*.w", r"\*\.w")):
        select(Model(), ROLES, **{option: [pattern]})


def test_a_layer_that_computes_in_its_own_way_is_left_alone_and_refused_by_name():
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4))
    chosen, skipped = select(model, None)
    assert list(chosen) == ["1"]
    assert skipped == {"0": "computed in its own way"}
    with pytest.raises(SelectionError, match="a Doubled, which does not compute as"):
        select(model, None, include=["0"])
