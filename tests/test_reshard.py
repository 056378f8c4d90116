"""A checkpoint knows nothing about the layout: what one layout saved, any other goes on from, optimizer included."""

import pytest

from titan_core.config import OptimizerConfig
from titan_models.shape import MoEConfig
from training_runs import FLOAT64, change, curve, layout, train

MIXTURE = MoEConfig(experts=4, top_k=2, hidden_dim=32, balance_loss=0.01, bias_update_rate=1e-3)
STEPS = 3  # before the change, and as many after it

DENSE = {
    "1 -> fsdp 2 x tp 2 x pp 2": (1, {}, 8, {"tp": 2, "pp": 2}),
    "fsdp 2 x tp 2 -> 1": (4, {"tp": 2}, 1, {}),
    "tp 2 -> pp 2": (2, {"tp": 2}, 2, {"pp": 2}),
    "pp 2 -> fsdp 3": (2, {"pp": 2}, 3, {}),
    "pp 2, zero bubble -> cp 2 x tp 2": (2, {"pp": 2, "pp_schedule": "ZBVZeroBubble"}, 4, {"cp": 2, "tp": 2}),
    "hsdp 2x2 -> fsdp 2 x cp 2": (4, {"dp_replicate": 2}, 4, {"cp": 2}),
}
MIXTURES = {
    "ep 2 x tp 2 -> fsdp 2": (4, {"ep": 2, "tp": 2}, 2, {}),
    "1 -> ep 4": (1, {}, 4, {"ep": 4}),
    "ep 4 -> pp 2 x ep 2": (4, {"ep": 4}, 4, {"pp": 2, "ep": 2}),
}
PAIRS = [("dense", name) for name in DENSE] + [("mixture", name) for name in MIXTURES]


@pytest.fixture(scope="module")
def experiment(corpus):
    from training_runs import TINY

    def make(model, optimizer):
        moe = {"model.moe": MIXTURE} if model == "mixture" else {}
        return change(
            TINY,
            **{
                "data.source": str(corpus),
                "model.layers": 4,
                "training.micro_batch_size": 3,
                "training.steps": 2 * STEPS,
                "checkpoint.every": STEPS,
                "precision": FLOAT64,
                # AdamW turns rounding of gradients near zero into steps of full size; float64 leaves little of it.
                "optimizer": OptimizerConfig(lr=1e-3, name=optimizer),
            },
            **moe,
        )

    return make


@pytest.fixture(scope="module")
def uninterrupted(experiment, tmp_path_factory):
    known = {}

    def get(model, optimizer):
        if (model, optimizer) not in known:
            known[model, optimizer] = train(experiment(model, optimizer), tmp_path_factory.mktemp("whole"))
        return known[model, optimizer]

    return get


# By default every axis once on either side; all pairs in `slow`.
WITH_ADAMW = ("1 -> fsdp 2 x tp 2 x pp 2", "tp 2 -> pp 2", "pp 2 -> fsdp 3", "hsdp 2x2 -> fsdp 2 x cp 2")
WITH_ADAMW += ("ep 2 x tp 2 -> fsdp 2", "1 -> ep 4")
WITH_MUON = ("fsdp 2 x tp 2 -> 1",)  # whose state is spread as AdamW's is
RUNS = [
    pytest.param(model, name, optimizer, marks=[] if name in short else pytest.mark.slow)
    for optimizer, short in (("adamw", WITH_ADAMW), ("muon", WITH_MUON))
    for model, name in PAIRS
]


@pytest.mark.parametrize(("model", "name", "optimizer"), RUNS)
def test_any_layout_goes_on_from_any_other(experiment, uninterrupted, tmp_path, model, name, optimizer):
    before, first, after, second = (DENSE if model == "dense" else MIXTURES)[name]
    config = experiment(model, optimizer)
    train(config, tmp_path, before, **layout(**first), **{"training.steps": STEPS})
    lines = train(config, tmp_path, after, **layout(**second))
    expected = uninterrupted(model, optimizer)
    assert len(lines) == 2 * STEPS
    for key in ("loss", "grad_norm"):
        assert curve(lines, key) == pytest.approx(curve(expected, key), rel=1e-9)
