"""Two runs side by side: the first step at which their metrics are not the same.

    titan-compare RUN_A RUN_B                        # equal to the last bit?
    titan-compare RUN_A RUN_B --tolerance 1e-5       # or within a relative difference

Compared is what a run computes: its `metrics.jsonl` without what depends on the layout and the machine, which are no
part of the experiment (`depends_on_layout`). Steps that only one run has logged are counted and left out.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_metrics.jsonl import DamagedFileError, read_jsonl

_LAYOUT = {"mfu", "tflops_per_device", "tokens_per_second", "tokens_per_second_per_device", "data_wait_share"}
_LAYOUT |= {"time", "loss_max"}  # the greatest mean loss of one rank's rows: which rows those are follows the layout
_LAYOUT_GROUPS = ("time.", "memory.", "allocator.", "replica.")
_SECONDS = "_seconds"


class NothingToCompareError(RuntimeError):
    """A run has no metrics, or the two have no step in common."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first step at which two runs differ, and the metric that differs most there."""

    step: int
    metric: str
    first: float | str
    """The first run's value."""
    second: float | str
    """The second run's."""
    difference: float
    """Relative to the greater of the two; infinite between a number and something that is none."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How two runs compare."""

    divergence: Divergence | None
    """None if they are the same within the tolerance wherever both have logged."""
    steps: int
    """How many steps both have logged."""
    alone: tuple[int, int]
    """How many steps only the first has logged, and only the second."""
    greatest: dict[str, float]
    """Name of each metric -> its greatest relative difference at any step."""


def compare_runs(first: Path, second: Path, tolerance: float = 0.0) -> Comparison:
    """Compares the metrics of two run directories.

    Args:
        first: a run directory.
        second: another.
        tolerance: the greatest relative difference that counts as none.

    Raises:
        NothingToCompareError: if there is no step that both have logged.
        DamagedFileError: if a line of one of them is not what a run logs.
    """
    one, other = _load(first), _load(second)
    common = sorted(one.keys() & other.keys())
    if not common:
        raise NothingToCompareError(
            f"{first} and {second} have logged no step in common ({len(one)} and {len(other)} steps). Compare runs "
            "that log at the same steps, with the same --metrics.log-every."
        )
    greatest: dict[str, float] = {}
    divergence = None
    for step in common:
        here = {
            name: relative_difference(value, other[step][name])
            for name, value in one[step].items()
            if name in other[step]
        }
        for name, value in here.items():
            greatest[name] = max(greatest.get(name, 0.0), value)
        beyond = {name: value for name, value in here.items() if value > tolerance}
        if divergence is None and beyond:
            name = max(beyond, key=lambda name: beyond[name])
            divergence = Divergence(
                step=step, metric=name, first=one[step][name], second=other[step][name], difference=beyond[name]
            )
    alone = (len(one.keys() - other.keys()), len(other.keys() - one.keys()))
    return Comparison(divergence=divergence, steps=len(common), alone=alone, greatest=greatest)


def relative_difference(first: float | str, second: float | str) -> float:
    """|first - second| relative to the greater of the two; 0 between equal values, NaN among them."""
    first, second = _number(first), _number(second)
    if first == second:
        return 0.0
    if isinstance(first, str) or isinstance(second, str):
        return math.inf
    if math.isnan(first) and math.isnan(second):
        return 0.0
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.inf
    return abs(first - second) / max(abs(first), abs(second))


def _number(value: float | str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _load(run: Path) -> dict[int, dict[str, float | str]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        raise NothingToCompareError(f"{path} does not exist; give the directory of a run that has logged a step.")
    return {
        line["step"]: {name: value for name, value in line.items() if name != "step" and not depends_on_layout(name)}
        for line in read_jsonl(path)
        if "step" in line
    }


def depends_on_layout(metric: str) -> bool:
    """Whether two equal runs may differ in this metric: speeds, memory, `loss_max`, and whatever ends in `_seconds`."""
    return metric in _LAYOUT or metric.startswith(_LAYOUT_GROUPS) or metric.endswith(_SECONDS)


def describe(comparison: Comparison) -> str:
    """The comparison in a few lines."""
    found = comparison.divergence
    lines = [
        f"The runs are the same at all {comparison.steps} steps that both have logged."
        if found is None
        else f"The runs differ from step {found.step} on: {found.metric} is {found.first} and {found.second}, a "
        f"relative difference of {found.difference:.2g}."
    ]
    if any(comparison.alone):
        lines.append(
            f"Logged by the first run only: {comparison.alone[0]} steps; by the second: {comparison.alone[1]}."
        )
    worst = sorted(((value, name) for name, value in comparison.greatest.items() if value > 0), reverse=True)[:8]
    lines += [f"  {name}: {value:.2g} at most" for value, name in worst]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `titan-compare`: 0 if the runs are the same, 1 if they differ, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="titan-compare", description="The first step at which two runs differ.")
    parser.add_argument("first", type=Path, help="a run directory")
    parser.add_argument("second", type=Path, help="another")
    parser.add_argument(
        "--tolerance", type=_tolerance, default=0.0, help="greatest relative difference that counts as none"
    )
    given = parser.parse_args(arguments)
    try:
        comparison = compare_runs(given.first, given.second, given.tolerance)
    except (NothingToCompareError, DamagedFileError) as error:
        sys.stderr.write(f"titan-compare: {error}\n")
        return 2
    sys.stdout.write(describe(comparison) + "\n")
    return 0 if comparison.divergence is None else 1


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no tolerance; give a number from 0 up, such as 1e-5")
    return value
