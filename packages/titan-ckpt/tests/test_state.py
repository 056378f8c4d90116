import collections
import random

import pytest
import torch

from titan_ckpt.state import check_names, flatten, is_json, tensors_only, with_values


def test_leaves_are_keyed_by_their_path() -> None:
    tensor = torch.zeros(2)
    flat = flatten(
        {"optimizer": {"state": {0: {"exp_avg": tensor, "step": 3}}, "groups": [{"lr": 1e-3}]}, "none": None}
    )
    assert flat.tensors == {"optimizer.state.0.exp_avg": tensor}
    assert flat.values == {"optimizer.state.0.step": 3, "optimizer.groups": [{"lr": 1e-3}], "none": None}


def test_all_leaves_that_cannot_be_saved_are_listed() -> None:
    tree = {
        "a": torch.float32,
        "b": [torch.zeros(1)],
        "c": torch.zeros(2, 2).to_sparse(),
        "d": {"x.y": 1, "x": {"y": 2}},
        "fine": 1,
    }
    with pytest.raises(ValueError, match="cannot be saved") as raised:
        flatten(tree)
    for text in ("a is of type dtype", "b is a list that holds more", "c is a tensor of layout", "d.x.y occurs twice"):
        assert text in str(raised.value)
    assert "fine" not in str(raised.value)


def test_only_what_survives_json_is_json() -> None:
    assert all(map(is_json, [None, True, 1, 1.5, "x", [1, (2, [])], {"a": {"b": None}}]))
    assert not any(map(is_json, [{1: 2}, {1, 2}, b"x", torch.zeros(()).numpy()[()], [object()]]))


def test_tensors_only_keeps_the_nesting_and_drops_the_rest() -> None:
    tensor = torch.zeros(2)
    assert tensors_only({"a": {0: {"t": tensor, "v": 1}, "empty": {}}, "b": {"v": 2}}) == {"a": {"0": {"t": tensor}}}


def test_values_come_back_in_the_form_the_object_has_now() -> None:
    module_state = torch.nn.BatchNorm1d(2).state_dict()
    tree = {
        "betas": (0, 0),
        "nested": {7: {"x": 0}},
        "groups": [{"betas": (0,)}],
        "t": torch.ones(1),
        "m": module_state,
    }
    values = {"s.betas": [0.9, 0.95], "s.nested.7.x": None, "s.groups": [{"betas": [1]}, {"betas": [2]}]}
    filled = with_values(tree, values, "s")
    assert filled["betas"] == (0.9, 0.95)
    assert filled["nested"] == {7: {"x": None}}
    assert filled["groups"] == [{"betas": (1,)}, {"betas": [2]}]
    assert filled["t"] is tree["t"]
    assert isinstance(filled["m"], collections.OrderedDict)
    assert vars(filled["m"]) == vars(module_state) != {}  # what torch notes there about module versions
    assert tree["betas"] == (0, 0)


def test_the_state_of_pythons_generator_survives() -> None:
    state = random.Random(5).getstate()
    other = random.Random(6)
    other.setstate(with_values({"py": other.getstate()}, {"py": [state[0], list(state[1]), state[2]]})["py"])
    assert other.getstate() == state


@pytest.mark.parametrize("names", [({"a.b": 1},), ({"": 1},), ({"a": 1}, {"a": 2}), ({"a/b": 1},)])
def test_ambiguous_names_are_refused(names: tuple[dict[str, int], ...]) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        check_names(*names)
