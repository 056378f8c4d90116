"""Optimizer states in few bytes, in whole runs: on any layout, over restarts, and changed on the way."""

import pytest

from ranks import run_ranks
from titan_core.compat import trusted_pipeline_shapes
from titan_train.environment import environment
from titan_train.forked import in_processes
from titan_train.rehearsal import measured_step, rehearsable, rehearse
from titan_train.resume import ResumeError
from training_runs import FLOAT64, TINY, change, curve, layout, train

STEPS = 3  # before the change, and as many after it


@pytest.fixture
def config(corpus):
    # Matrices of 8,192 elements; tp 2 cuts rows of 128, which are one block.
    return change(
        TINY,
        **{
            "data.source": str(corpus),
            "model.dim": 64,
            "model.heads": 8,
            "model.hidden_dim": 128,
            "training.steps": 2 * STEPS,
            "checkpoint.every": STEPS,
            "precision": FLOAT64,
            "optimizer.state_dtype": "int8",
        },
    )


def test_any_layout_goes_on_from_any_other(config, tmp_path):
    expected = train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", 4, **layout(tp=2), **{"training.steps": STEPS})
    lines = train(config, tmp_path / "parts", 2)
    assert len(lines) == 2 * STEPS
    for key in ("loss", "grad_norm"):
        assert curve(lines, key) == pytest.approx(curve(expected, key), rel=1e-9)


def test_a_run_goes_on_with_other_states_if_that_is_allowed(config, tmp_path):
    expected = curve(train(config, tmp_path / "whole", **{"optimizer.state_dtype": "float32"}))
    for before, after in (("float32", "int8"), ("int8", "bfloat16")):
        output = tmp_path / after
        train(config, output, 2, **{"training.steps": STEPS, "optimizer.state_dtype": before})
        changed = {"optimizer.state_dtype": after}
        with pytest.raises(ResumeError, match=f"optimizer.state_dtype: {before} -> {after}"):
            train(config, output, **changed)
        found = curve(train(config, output, **changed, **{"checkpoint.allow_changes": True}))
        assert found[: STEPS + 1] == pytest.approx(expected[: STEPS + 1], rel=1e-3)
        assert found == pytest.approx(expected, rel=1e-2)
        assert found[STEPS + 1 :] != pytest.approx(expected[STEPS + 1 :], rel=1e-9)


@pytest.mark.parametrize("state_dtype", ["int4", "bfloat16"])
def test_fake_ranks_hold_and_send_what_real_ones_do(config, state_dtype):
    config = change(config, **layout(tp=2), **{"optimizer.state_dtype": state_dtype})

    def real():
        with environment(config) as env:
            return measured_step(rehearsable(config), env, tensors=trusted_pipeline_shapes())

    measured, *_ = run_ranks(2, real)
    (fake,) = in_processes(rehearse, [(config, 2, 0)])
    assert fake.traffic == measured.traffic
    assert fake.memory.optimizer == measured.memory.optimizer
    whole = change(config, **{"optimizer.state_dtype": "float32"})
    (wide,) = in_processes(rehearse, [(whole, 2, 0)])
    assert fake.memory.optimizer < 0.6 * wide.memory.optimizer


def test_moments_that_are_offloaded_are_the_hosts(config):
    """Needs no GPU: where they would be is counted."""
    offloading = change(config, **{"optimizer.state_offload": True})
    plain, offloaded = in_processes(rehearse, [(config, 2, 0), (offloading, 2, 0)])
    assert offloaded.host_memory.total == offloaded.host_memory.optimizer == plain.memory.optimizer
    assert offloaded.memory.optimizer == plain.host_memory.total == 0
    assert offloaded.memory.parameters == plain.memory.parameters
