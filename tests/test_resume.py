"""Killed and started again, a run is the run that was never killed."""

import pytest

from titan_models.shape import MoEConfig
from training_runs import change, curve, layout, metrics, samples, train, train_until_killed

LAYOUTS = {
    "one process": (1, {}),
    "fsdp 4": (4, layout(dp_shard=4)),
    "ddp 4": (4, layout(dp_replicate=4)),
    "hsdp 2x2": (4, layout(dp_replicate=2, dp_shard=2)),
    "tp 2 x pp 2": (4, {**layout(tp=2, pp=2), "training.micro_batch_size": 6}),
    "ep 2, experts": (2, {**layout(ep=2), "model.moe": MoEConfig(experts=4, hidden_dim=32, bias_update_rate=1e-3)}),
}


@pytest.fixture
def saving(tiny):
    return change(tiny, **{"checkpoint.every": 5, "checkpoint.asynchronous": False})


LONG = ("fsdp 4", "ddp 4", "hsdp 2x2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in LAYOUTS]
)
def test_killed_and_restarted_on_the_same_layout_is_bitwise_equal(saving, tmp_path, name):
    world_size, changes = LAYOUTS[name]
    whole = train(saving, tmp_path / "whole", world_size, **changes)
    train_until_killed(saving, tmp_path / "killed", 12, world_size, **changes)
    before = metrics(tmp_path / "killed")
    assert [line["step"] for line in before] == list(range(1, 13))
    resumed = train(saving, tmp_path / "killed", world_size, **changes)
    for key in ("loss", "grad_norm", "lr", "tokens", "epoch"):
        assert curve(resumed, key) == curve(whole, key), key
    redone = (tmp_path / "killed" / "metrics.redone.jsonl").read_text().splitlines()
    assert len(redone) == 2  # steps 11 and 12 were done twice
    if "model.moe" in changes:
        loads = [(tmp_path / run / "expert_loads.jsonl").read_text() for run in ("killed", "whole")]
        assert loads[0] == loads[1]
    assert samples(tmp_path / "killed", world_size) == samples(tmp_path / "whole", world_size)


def test_restarts_on_other_numbers_of_ranks_keep_the_curve_and_the_order(saving, tmp_path):
    whole = train(saving, tmp_path / "whole")
    parts, output = {}, tmp_path / "moving"
    for steps, world_size, changes in (
        (5, 1, {}),
        (10, 2, layout(dp_shard=2)),
        (15, 4, layout(dp_replicate=2, dp_shard=2)),
        (20, 3, layout(dp_shard=3)),
    ):
        lines = train(saving, output, world_size, **{"training.steps": steps}, **changes)
        parts |= {s: ids for s, ids in samples(output, world_size).items() if steps - 5 < s <= steps}
        for rank in range(world_size):
            (output / "samples" / f"rank-{rank}.jsonl").unlink()
    for key, bound in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert curve(lines, key) == pytest.approx(curve(whole, key), rel=bound)
    assert parts == samples(tmp_path / "whole", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_killed_at_any_step(saving, tmp_path, name):
    world_size, changes = LAYOUTS[name]
    whole = train(saving, tmp_path / "whole", world_size, **changes)
    for step in range(1, 20):
        output = tmp_path / f"killed-{step}"
        train_until_killed(saving, output, step, world_size, **changes)
        assert curve(train(saving, output, world_size, **changes)) == curve(whole), step


@pytest.mark.slow
def test_killed_again_and_again(saving, tmp_path):
    whole = train(saving, tmp_path / "whole", 2)
    for step in (3, 6, 7, 7, 11, 13, 16, 19):
        train_until_killed(saving, tmp_path / "killed", step, 2)
    assert curve(train(saving, tmp_path / "killed", 2)) == curve(whole)
