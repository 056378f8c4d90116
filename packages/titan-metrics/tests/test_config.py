import subprocess
import sys

import pytest

from titan_metrics.config import DebugConfig, MetricsConfig, ProfilingConfig, SpansConfig, WatchdogConfig


@pytest.mark.parametrize("section", [DebugConfig, MetricsConfig, ProfilingConfig, SpansConfig, WatchdogConfig])
def test_the_defaults_are_valid(section):
    assert section().problems() == []


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (MetricsConfig(norms_every=-1), ["metrics.norms_every"]),
        (SpansConfig(enabled=True, flush_seconds=0, ranks=(0, -2)), ["spans.flush_seconds", "spans.ranks"]),
        (
            ProfilingConfig(profile_at=-1, profile_steps=0, profile_ranks=(-1,)),
            ["profiling.profile_at", "profiling.profile_steps", "profiling.profile_ranks"],
        ),
        (ProfilingConfig(profile_at=1, profile_every=2), ["profiling.profile_every"]),
        (ProfilingConfig(snapshot_entries=0), ["profiling.snapshot_entries"]),
        (
            WatchdogConfig(stall_seconds=float("nan"), heartbeat_seconds=0, exit_code=0),
            ["watchdog.stall_seconds", "watchdog.heartbeat_seconds", "watchdog.exit_code"],
        ),
        (WatchdogConfig(stall_seconds=60, exit_seconds=30), ["watchdog.exit_seconds"]),
        (DebugConfig(check_replicas_every=-1), ["debug.check_replicas_every"]),
    ],
)
def test_what_cannot_be_used_is_named(config, names):
    problems = config.problems()
    assert len(problems) == len(names)
    assert all(name in problem for name, problem in zip(names, problems, strict=True))


def test_a_watchdog_is_on_if_it_has_something_to_do():
    assert not WatchdogConfig().enabled
    assert WatchdogConfig(stall_seconds=1).enabled
    assert WatchdogConfig(exit_seconds=1).enabled


def test_all_problems_are_listed_at_once():
    config = MetricsConfig(log_every=0, peak_tflops=-1.0, wandb=True, wandb_project="")
    problems = config.problems()
    assert len(problems) == 3
    for name, problem in zip(("log_every", "peak_tflops", "wandb_project"), problems, strict=True):
        assert f"metrics.{name}" in problem


@pytest.mark.parametrize("peak", [0.0, float("nan"), float("inf")])
def test_a_peak_that_is_no_peak_is_refused(peak):
    assert len(MetricsConfig(peak_tflops=peak).problems()) == 1


@pytest.mark.parametrize(
    "module",
    [
        "collectives",
        "compare",
        "config",
        "goodput",
        "machine",
        "memory",
        "meter",
        "peaks",
        "profiling",
        "sinks",
        "spans",
        "trace",
        "watchdog",
    ],
)
def test_importing_costs_neither_torch_nor_rich(module):
    code = f"import sys, titan_metrics.{module}; print(*{{'torch', 'rich', 'tensorboard', 'wandb'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
