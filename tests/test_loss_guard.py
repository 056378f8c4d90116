"""Runs that meet a NaN or a spike: they end, skip it, or go back, alike on every layout."""

import json
import math

import pytest
import torch

from ranks import RankFailure, run_ranks
from titan_core.config import OptimizerConfig
from titan_train import trainer
from titan_train.config import CheckpointSection
from titan_train.guard import DivergedError
from titan_train.hooks import Hook
from titan_train.interrupt import Interrupt
from titan_train.validate import problems
from training_runs import FLOAT64, TINY, change, curve, layout, metrics, samples, train


class Poison(Hook):
    """Makes the loss of the given batches NaN, or the given number of times larger, in whatever step reads them."""

    def __init__(self, trainer, batches, factor):
        self.trainer, self.batches, self.factor = trainer, batches, factor
        self.accumulate = trainer.layout.accumulate
        trainer.layout.accumulate = self.poisoned

    def poisoned(self, inputs, divisor):
        batch = self.trainer.loader.state_dict()["next_batch"]
        loss = self.accumulate(inputs, divisor=divisor)
        if batch in self.batches:
            for parameter in self.trainer.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.factor)
            loss = loss * self.factor
        return loss

    def close(self):
        self.trainer.layout.accumulate = self.accumulate


def poisoned_run(config, output, batches, factor=math.nan, world_size=1):
    """The lines of metrics.jsonl of a run whose batches, counted from 1, are poisoned."""
    config = change(config, output=str(output))

    def run():
        build = trainer.build_hooks
        trainer.build_hooks = lambda made, *rest: [*build(made, *rest), Poison(made, batches, factor)]
        try:
            return trainer.train(config, Interrupt(alone=world_size == 1), name="test")
        finally:
            trainer.build_hooks = build

    if world_size == 1:
        assert run() is None
    else:
        assert run_ranks(world_size, run) == [None] * world_size
    return metrics(output)


def left_out(output):
    return [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]


@pytest.fixture
def exact(tiny):
    """Float64, a checkpoint every third step, ten steps."""
    return change(
        tiny,
        precision=FLOAT64,
        checkpoint=CheckpointSection(every=3, asynchronous=False),
        **{"training.steps": 10, "schedule.total_steps": 10},
    )


def test_a_run_ends_at_a_nan_and_saves_nothing_after_it(exact, tmp_path):
    with pytest.raises(DivergedError, match=r"The loss is nan .* at step 5\. The run has diverged"):
        poisoned_run(exact, tmp_path, {5})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


def test_every_rank_ends_alike(exact, tmp_path):
    with pytest.raises(RankFailure, match="DivergedError"):
        poisoned_run(change(exact, **layout(dp_shard=2)), tmp_path, {9, 10}, world_size=2)
    assert max(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()) == 6


LAYOUTS = {"one process": (1, {}), "fsdp 2": (2, {"dp_shard": 2}), "pp 2": (2, {"pp": 2}), "tp 2": (2, {"tp": 2})}


def skipping(config, **guard):
    return change(config, **{"guard.policy": "skip", **{f"guard.{name}": value for name, value in guard.items()}})


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_skipped_step_moves_nothing_on_any_layout(name, exact, tmp_path):
    world_size, degrees = LAYOUTS[name]
    losses = curve(poisoned_run(skipping(change(exact, **layout(**degrees))), tmp_path, {4}, world_size=world_size))
    assert losses[3] == "NaN"
    (line,) = left_out(tmp_path)
    assert (line["step"], line["policy"], line["loss"], len(line["sample_ids"])) == (4, "skip", "NaN", 12)
    assert sorted(samples(tmp_path, 2)[4]) == line["sample_ids"]
    # The reference: plain steps, but for the fourth, whose update does not happen.
    reference = reference_with_a_hole(skipping(exact), tmp_path / "reference", 4)
    assert losses[4:] == pytest.approx(reference[4:], rel=1e-12)
    assert losses[:3] == pytest.approx(reference[:3], rel=1e-12)


def reference_with_a_hole(config, output, hole):
    """Losses of a run that does not call its optimizer at one step."""
    build = trainer.Trainer.step

    def step(self, vote):
        if self.progress.step + 1 != hole:
            return build(self, vote)
        before = {name: tensor.clone() for name, tensor in flat(self.state).items()}
        done = build(self, vote)
        with torch.no_grad():
            for tensor, old in zip(flat(self.state).values(), before.values(), strict=True):
                tensor.copy_(old)
        return done

    def flat(state):
        return state["model"].state_dict() | state["optimizer"].state_dict()

    trainer.Trainer.step = step
    try:
        return curve(train(config, output))
    finally:
        trainer.Trainer.step = build


def test_a_spike_is_a_loss_far_above_the_last_ones(exact, tmp_path, capsys):
    config = skipping(exact, sigma=6.0, window=4)
    losses = curve(poisoned_run(config, tmp_path, {3, 8}, factor=50.0))
    assert [line["step"] for line in left_out(tmp_path)] == [8]  # at step 3 there were not enough to tell
    assert "The loss at step 8 is a spike: " in capsys.readouterr().out
    assert losses[7] > 40
    assert losses[8] < 7


def test_too_many_skips_in_a_row_end_the_run(exact, tmp_path):
    with pytest.raises(DivergedError, match=r"step 7, and 2 steps before it were skipped \(guard\.max_skips\)"):
        poisoned_run(skipping(exact, max_skips=2), tmp_path, {2, 3, 5, 6, 7})


def rewinding(config, **guard):
    return change(config, **{"guard.policy": "rewind", **{f"guard.{name}": value for name, value in guard.items()}})


@pytest.mark.parametrize(
    ("name", "asynchronous"),
    [
        ("one process", True),
        ("fsdp 2", False),
        pytest.param("one process", False, marks=pytest.mark.slow),
        pytest.param("fsdp 2", True, marks=pytest.mark.slow),
    ],
)
def test_going_back_leaves_out_the_batches_up_to_the_bad_one(name, asynchronous, exact, tmp_path):
    world_size, degrees = LAYOUTS[name]
    config = change(rewinding(exact), **layout(**degrees), **{"checkpoint.asynchronous": asynchronous})
    losses = curve(poisoned_run(config, tmp_path / "run", {5}, world_size=world_size))
    assert [line["step"] for line in left_out(tmp_path / "run")] == [4, 5]
    # The same samples as a run that never met batches 4 and 5: the data that follows, from the same weights.
    untouched = train(exact, tmp_path / "untouched", **{"training.steps": 12})
    assert losses[:3] == pytest.approx(curve(untouched)[:3], rel=1e-12)
    read, plain = samples(tmp_path / "run", world_size), samples(tmp_path / "untouched", 1)
    assert [sorted(read[step]) for step in range(4, 11)] == [sorted(plain[step + 2]) for step in range(4, 11)]
    assert [line["sample_ids"] for line in left_out(tmp_path / "run")] == [sorted(plain[4]), sorted(plain[5])]
    assert losses == pytest.approx(without_batches(exact, tmp_path / "without", {4, 5}), rel=1e-12)


def without_batches(config, output, holes):
    """Losses of a run whose loader passes over some batches, counted from 1."""
    build = trainer.build_loader

    def build_loader(*args, **options):
        loader = build(*args, **options)
        take = loader._take

        def taken():
            while loader.state_dict()["next_batch"] + 1 in holes:
                loader.close()
                loader.load_state_dict({"next_batch": loader.state_dict()["next_batch"] + 1})
            return take()

        loader._take = taken
        return loader

    trainer.build_loader = build_loader
    try:
        return curve(train(config, output))
    finally:
        trainer.build_loader = build


def test_going_back_to_the_same_checkpoint_again_goes_further(exact, tmp_path):
    """The batch after a bad one may be bad too, or one a little later."""
    losses = curve(poisoned_run(rewinding(exact), tmp_path / "run", {5, 6, 8}))
    assert losses == pytest.approx(without_batches(exact, tmp_path / "without", {4, 5, 6, 7, 8}), rel=1e-12)
    plain = samples(tmp_path / "run", 1)
    train(exact, tmp_path / "untouched", **{"training.steps": 12})
    read = samples(tmp_path / "untouched", 1)
    assert [line["sample_ids"] for line in left_out(tmp_path / "run")] == [sorted(read[i]) for i in range(4, 9)]
    assert sorted(plain[4]) == sorted(read[9])


def test_a_row_of_skipped_steps_is_as_long_after_a_restart(exact, tmp_path):
    config = skipping(exact, max_skips=4)
    for _ in range(2):  # it fails at the same step however often it is started again
        with pytest.raises(DivergedError, match=r"step 9, and 4 steps before it were skipped"):
            poisoned_run(config, tmp_path, {5, 6, 7, 8, 9, 10})
        assert max(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()) == 6
        assert [line["step"] for line in left_out(tmp_path)] == [5, 6, 7, 8, 9]  # none twice


def test_a_run_goes_back_only_so_often_and_only_to_a_checkpoint(exact, tmp_path):
    with pytest.raises(DivergedError, match=r"gone back 2 times already \(guard\.max_rewinds\)"):
        poisoned_run(rewinding(exact, max_rewinds=2), tmp_path / "often", {5, 8, 11, 14})
    with pytest.raises(DivergedError, match="step 2, and there is no checkpoint to go back to"):
        poisoned_run(rewinding(exact), tmp_path / "early", {2})


def test_a_killed_run_remembers_what_it_left_out(exact, tmp_path):
    config = rewinding(exact, sigma=6.0, window=4)
    whole = poisoned_run(config, tmp_path / "whole", {5})
    poisoned_run(change(config, **{"training.steps": 8}), tmp_path / "parts", {5})
    parts = poisoned_run(config, tmp_path / "parts", {5})
    assert curve(parts) == curve(whole)


def test_going_back_takes_checkpoints():
    changes = {"guard.policy": "rewind", "checkpoint.every": 0, "data.source": "nowhere"}
    assert any("none is saved before the last step" in problem for problem in problems(change(TINY, **changes), 1))
    assert problems(change(TINY, **changes | {"checkpoint.every_minutes": 5.0}), 1) == []


@pytest.mark.parametrize(
    "optimizer", [OptimizerConfig(name="muon"), OptimizerConfig(state_dtype="int8")], ids=["muon", "int8"]
)
def test_other_optimizers_heed_it_too(optimizer, tiny, tmp_path):
    config = change(skipping(tiny), optimizer=optimizer, **{"training.steps": 6})
    losses = curve(poisoned_run(config, tmp_path, {3}))
    assert losses[2] == "NaN"
    assert all(math.isfinite(loss) for loss in losses[3:])


def test_a_mixture_of_experts_keeps_its_biases(tmp_path, corpus):
    from titan_models.families.qwen3 import Qwen3Config
    from titan_models.shape import MoEConfig

    moe = MoEConfig(experts=4, top_k=2, hidden_dim=16, bias_update_rate=0.1)
    model = Qwen3Config(vocab_size=300, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden_dim=64, moe=moe)
    config = change(TINY, model=model, **{"data.source": str(corpus), "training.steps": 3})
    biases = []

    class Watch(Hook):
        def __init__(self, made):
            self.made = made

        def end_step(self, step):
            biases.append({n: b.clone() for n, b in self.made.model.named_buffers() if n.endswith("bias")})

    build = trainer.build_hooks
    trainer.build_hooks = lambda made, *rest: [*build(made, *rest), Watch(made)]
    try:
        poisoned_run(skipping(config), tmp_path, {2})
    finally:
        trainer.build_hooks = build
    assert biases[0]
    assert all(torch.equal(bias, biases[1][name]) for name, bias in biases[0].items())
    assert any(not torch.equal(bias, biases[2][name]) for name, bias in biases[1].items())
