"""The layout is not part of the experiment: one loss curve, whatever the number of ranks and micro-batches."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ranks import run_ranks
from titan_core.optim import ModelState
from titan_data.dataset import open_dataset
from titan_models.shape import MoEConfig
from titan_train.environment import environment
from titan_train.recorder import Recorder
from titan_train.trainer import Trainer
from training_runs import BF16, FLOAT64, change, curve, layout, samples, train

LAYOUTS = {
    "dp_shard 2": (2, layout(dp_shard=2)),
    "dp_shard 4": (4, layout(dp_shard=4)),
    "dp_replicate 2": (2, layout(dp_replicate=2)),
    "hsdp 2x2": (4, layout(dp_replicate=2, dp_shard=2)),
    "dp_shard 3, padded": (3, {**layout(dp_shard=3), "training.micro_batch_size": 2}),
    "dp_shard 5, padded": (5, layout(dp_shard=5)),
    "accumulation 2": (1, {"training.micro_batch_size": 6}),
    "accumulation 4": (1, {"training.micro_batch_size": 3}),
    "accumulation 3, uneven": (1, {"training.micro_batch_size": 5}),
    "dp_shard 2, accumulation 2": (2, {**layout(dp_shard=2), "training.micro_batch_size": 3}),
    "dp_shard 2, accumulation 2, last": (2, {**layout(dp_shard=2, grad_sync="last"), "training.micro_batch_size": 3}),
    "tp 2": (2, layout(tp=2)),
    "cp 2": (2, layout(cp=2)),
    "pp 2, padded": (2, {**layout(pp=2), "training.micro_batch_size": 5}),
    "fsdp 2 x tp 2 x pp 2": (8, {**layout(tp=2, pp=2), "training.micro_batch_size": 3}),
    "hsdp 2x2, accumulation 3": (4, {**layout(dp_replicate=2, dp_shard=2), "training.micro_batch_size": 1}),
}


# Their like is tested for fewer steps in test_parity.py, or with other numbers here.
LONG = ("fsdp 2 x tp 2 x pp 2", "hsdp 2x2, accumulation 3", "dp_shard 5, padded", "dp_shard 4", "accumulation 2")
LONG += ("dp_shard 2, accumulation 2, last", "dp_shard 2, accumulation 2", "dp_shard 2", "dp_replicate 2", "hsdp 2x2")


@pytest.fixture(scope="module")
def expected(tmp_path_factory, corpus):
    """Curves of one process, by precision; computed once."""
    known = {}

    def get(config):
        if config.precision not in known:
            output = tmp_path_factory.mktemp("one-process")
            known[config.precision] = (train(config, output), samples(output, 1))
        return known[config.precision]

    return get


def relative(ours: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in LAYOUTS]
)
def test_float32_and_float64_curves_are_those_of_one_process(tiny, expected, tmp_path, name):
    world_size, changes = LAYOUTS[name]
    for precision, bound in ((tiny.precision, 1e-5), (FLOAT64, 1e-9)):
        config = dataclasses.replace(tiny, precision=precision)
        lines, ids = expected(config)
        output = tmp_path / precision.master_dtype
        ours = train(config, output, world_size, **changes)
        assert len(ours) == 20
        for key in ("loss", "grad_norm"):
            assert relative(curve(ours, key), curve(lines, key)) <= bound, key
        assert curve(ours, "lr") == curve(lines, "lr")
        assert samples(output, world_size) == ids


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_longer_curves_of_more_seeds(tiny, tmp_path, name, seed):
    world_size, changes = LAYOUTS[name]
    longer = {"training.seed": seed, "training.steps": 100, "schedule.total_steps": 100, "precision": FLOAT64}
    alone = train(change(tiny, **longer), tmp_path / "alone")
    ours = train(change(tiny, **longer), tmp_path / "ours", world_size, **changes)
    assert relative(curve(ours), curve(alone)) <= 1e-9
    assert samples(tmp_path / "ours", world_size) == samples(tmp_path / "alone", 1)


def test_the_curves_mean_something(tiny, expected):
    losses = curve(expected(tiny)[0])
    assert losses[-1] < losses[0] - 0.1
    assert curve(expected(dataclasses.replace(tiny, precision=FLOAT64))[0]) != losses


@pytest.mark.parametrize(
    "name",
    [
        "dp_shard 2",
        "tp 2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("dp_replicate 2", "hsdp 2x2", "accumulation 4", "cp 2", "fsdp 2 x tp 2 x pp 2")
        ),
    ],
)
def test_bfloat16_mixed_precision_agrees_across_layouts(tiny, expected, tmp_path, name):
    world_size, changes = LAYOUTS[name]
    config = dataclasses.replace(tiny, precision=BF16)
    losses = curve(expected(config)[0])
    ours = curve(train(config, tmp_path, world_size, **changes))
    assert relative(ours[:1], losses[:1]) <= 1e-3
    assert relative(ours, losses) <= 1e-2


@pytest.mark.parametrize(
    "degrees",
    [{"dp_shard": 4}, {"dp_replicate": 4}, {"dp_replicate": 2}, {"tp": 2}, {"tp": 2, "cp": 2}],
)
def test_initial_weights_are_bitwise_equal(tiny, degrees):
    def weights(config):
        with environment(config) as env:
            record = Recorder(config, env)
            state = ModelState(Trainer(config, env, open_dataset(config.data), {}, record).model).state_dict()
            return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}

    alone = weights(tiny)
    for sharded in run_ranks(4, weights, change(tiny, **layout(**degrees))):
        assert sharded.keys() == alone.keys()
        assert all(torch.equal(sharded[name], alone[name]) for name in alone)


def test_the_load_of_every_expert_is_that_of_one_process(tiny, tmp_path):
    moe = MoEConfig(experts=4, top_k=2, hidden_dim=32)
    config = change(
        tiny, **{"model.moe": moe, "training.steps": 2, "precision": FLOAT64, "training.micro_batch_size": 3}
    )

    def loads(name, world_size=1, **changes):
        lines = train(config, tmp_path / name, world_size, **changes)
        found = [json.loads(line) for line in (tmp_path / name / "expert_loads.jsonl").read_text().splitlines()]
        assert [line.pop("step") for line in found] == [1, 2]
        return found, [line["expert_load_max"] for line in lines]

    (first, second), greatest = loads("alone")
    assert set(first) == {f"layers.{layer}.moe.router.{expert}" for layer in range(2) for expert in range(4)}
    assert sum(first.values()) == sum(second.values()) == 2 * 12 * 32 * 2  # layers x rows x tokens x experts each
    assert greatest[0] == max(first.values()) * 4 / (12 * 32 * 2)
    # 12 rows do not fill four ranks' micro-batches: padding is routed, and not counted.
    assert loads("spread", 4, **layout(pp=2, ep=2), **{"training.micro_batch_size": 4}) == ([first, second], greatest)


def test_a_batch_that_does_not_divide_reports_its_waste(tiny, tmp_path: Path, capfd):
    train(change(tiny, **{"training.steps": 1}), tmp_path, 5, **layout(dp_shard=5))
    assert "5 data-parallel ranks; 3 of 15 rows a step are padding" in capfd.readouterr().out


def test_whole_gradients_report_their_bytes(tiny, tmp_path, capfd):
    train(change(tiny, **{"training.steps": 1}), tmp_path, 2, **layout(dp_replicate=2))
    assert "of whole gradients on each rank" in capfd.readouterr().out
