import subprocess
import sys

import pytest

from titan_metrics.config import MetricsConfig


def test_the_defaults_are_valid():
    assert MetricsConfig().problems() == []


def test_all_problems_are_listed_at_once():
    config = MetricsConfig(log_every=0, peak_tflops=-1.0, wandb=True, wandb_project="")
    problems = config.problems()
    assert len(problems) == 3
    for name, problem in zip(("log_every", "peak_tflops", "wandb_project"), problems, strict=True):
        assert f"metrics.{name}" in problem


@pytest.mark.parametrize("peak", [0.0, float("nan"), float("inf")])
def test_a_peak_that_is_no_peak_is_refused(peak):
    assert len(MetricsConfig(peak_tflops=peak).problems()) == 1


@pytest.mark.parametrize("module", ["config", "sinks", "meter", "peaks", "memory"])
def test_importing_costs_neither_torch_nor_rich(module):
    code = f"import sys, titan_metrics.{module}; print(*{{'torch', 'rich', 'tensorboard', 'wandb'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
