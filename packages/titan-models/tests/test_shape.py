import dataclasses

import pytest

from titan_models.shape import ModelConfigError, MoEConfig


def test_all_contradictions_are_listed_at_once(tiny):
    broken = dataclasses.replace(tiny, heads=5, head_dim=7)
    found = broken.problems()
    assert len(found) == 2
    assert "model.heads 5 is not a multiple of model.kv_heads 2" in found[0]
    assert "model.head_dim 7 is odd" in found[1]
    with pytest.raises(ModelConfigError, match=r"model\.heads 5.*model\.head_dim 7"):
        broken.build()


def test_sizes_below_one_are_named(tiny):
    (problem,) = dataclasses.replace(tiny, layers=0).problems()
    assert "model.layers is 0" in problem


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"experts": 0}, "model.moe.experts is 0; it must be at least 1."),
        ({"top_k": 0}, "model.moe.top_k is 0; it must be at least 1."),
        ({"hidden_dim": 0}, "model.moe.hidden_dim is 0; it must be at least 1."),
        ({"groups": 0}, "model.moe.groups is 0; it must be at least 1."),
        ({"top_groups": 0}, "model.moe.top_groups is 0; it must be at least 1."),
        ({"shared_hidden_dim": -1}, "model.moe.shared_hidden_dim is -1; it must be at least 0."),
        ({"first_dense_layers": -1}, "model.moe.first_dense_layers is -1; it must be at least 0."),
        ({"first_dense_layers": 2}, "model.moe.first_dense_layers 2 leaves none of the 2 layers"),
        ({"balance_loss": -0.1}, "model.moe.balance_loss is -0.1; it must be at least 0."),
        ({"z_loss": float("nan")}, "model.moe.z_loss is nan; it must be at least 0."),
        ({"bias_update_rate": -1e-3}, "model.moe.bias_update_rate is -0.001; it must be at least 0."),
        ({"route_scale": 0.0}, "model.moe.route_scale is 0.0; it must be more than 0."),
        ({"score": "relu"}, "model.moe.score is 'relu'; choose one of softmax, sigmoid."),
        ({"grouped_mm": "on"}, "model.moe.grouped_mm is 'on'; choose one of auto, grouped, loop."),
        ({"top_k": 9}, "model.moe.top_k 9 is more than model.moe.experts 8"),
        ({"groups": 2, "top_groups": 2}, "model.moe.top_groups 2 of model.moe.groups 2 excludes no group"),
        ({"top_groups": 2}, "model.moe.top_groups 2 of model.moe.groups 1 excludes no group"),
        ({"groups": 3}, "model.moe.groups 3 does not cut model.moe.experts 8 into equal groups"),
        ({"groups": 8}, "model.moe.groups 8 does not cut model.moe.experts 8 into equal groups of two or more"),
        ({"groups": 4, "top_k": 3}, "model.moe.top_k is 3, but model.moe.top_groups 1 leaves a token only 2 experts"),
    ],
)
def test_experts_that_cannot_be_are_refused_by_name(tiny, changes, problem):
    (found,) = dataclasses.replace(tiny, moe=MoEConfig(**changes)).problems()
    assert found.startswith(problem)
