"""The first thing on the page: what became of each run, in a dozen numbers, and what a reader should be warned of."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from titan_metrics.report.curve import Curve
from titan_metrics.report.run import Run
from titan_metrics.report.shares import USEFUL, goodput_bars
from titan_metrics.report.values import DASH, bytes_, large, percent, plain, seconds


@dataclass(frozen=True)
class Fact:
    """A number of the summary: one value and one remark (maybe empty) a run."""

    name: str
    values: list[str]
    remarks: list[str]

    @property
    def known(self) -> bool:
        """Whether any run has it."""
        return any(value != DASH for value in self.values)


@dataclass(frozen=True)
class Notice:
    """A warning about a run."""

    run: str
    text: str


def facts(runs: Sequence[Run]) -> list[Fact]:
    """The summary's numbers that at least one run has."""
    useful = {bar.run: share.share for bar in goodput_bars(runs) for share in bar.shares if share.name == USEFUL}
    measured: dict[str, list[tuple[str, str]]] = {
        "Loss": [_lowest(run.curves.get("loss")) for run in runs],
        "Validation loss": [_lowest(_validation(run)) for run in runs],
        "Steps": [_steps(run) for run in runs],
        "Tokens": [(large(run.tokens.last.value if run.tokens.last else None), "") for run in runs],
        "Tokens per second": [_typical(run.curves.get("tokens_per_second"), large) for run in runs],
        "MFU": [_typical(run.curves.get("mfu"), percent) for run in runs],
        "TFLOP/s": [_typical(run.curves.get("tflops_per_device"), plain, "a device") for run in runs],
        "Step time": [_typical(run.curves.get("step_seconds"), seconds) for run in runs],
        "Peak memory": [(bytes_(_peak(run)), "") for run in runs],
        "Goodput": [(percent(useful.get(index)), "") for index in range(len(runs))],
        "Wall time": [(seconds(run.seconds), "with pauses" if run.seconds else "") for run in runs],
        "Restarts": [_restarts(run) for run in runs],
    }
    found = [Fact(name, [value for value, _ in all_], [note for _, note in all_]) for name, all_ in measured.items()]
    return [fact for fact in found if fact.known]


def notices(runs: Sequence[Run]) -> list[Notice]:
    """What went wrong, a sentence each."""
    found = []
    for run in runs:
        if run.state == "failed":
            found.append(
                Notice(run.name, f"The run failed: {(run.status or {}).get('error', 'no reason was recorded')}")
            )
        for name, curve in run.curves.items():
            if curve.broken:
                times = "once" if curve.broken == 1 else f"{curve.broken:,} times"
                found.append(
                    Notice(run.name, f"{name} was NaN or infinite {times}, first at step {curve.broken_steps[0]:,}.")
                )
        found += [
            Notice(run.name, f"{str(straggler)[:1].upper()}{str(straggler)[1:]}.") for straggler in run.spans.stragglers
        ]
        if (ooms := run.curves.get("allocator.ooms")) and ooms.high and ooms.high.value > 0:
            found.append(Notice(run.name, f"The device ran out of memory {ooms.high.value:,.0f} times."))
    return found


def planned_steps(run: Run) -> int | None:
    """The steps that the configuration asks for, if it has them where titan-train does."""
    training: Any = (run.config or {}).get("training")
    steps = training.get("steps") if isinstance(training, dict) else None
    return steps if isinstance(steps, int) and not isinstance(steps, bool) else None


def _lowest(curve: Curve | None) -> tuple[str, str]:
    if curve is None or curve.last is None or curve.low is None:
        return DASH, ""
    return plain(curve.last.value), f"lowest {plain(curve.low.value)} at step {curve.low.step:,.0f}"


def _validation(run: Run) -> Curve | None:
    return next((curve for name, curve in run.named("validation.").items() if name.rpartition(".")[2] == "loss"), None)


def _steps(run: Run) -> tuple[str, str]:
    if run.last_step is None:
        return DASH, ""
    planned = planned_steps(run)
    return f"{run.last_step:,}", f"of {planned:,}" if planned else ""


def _typical(curve: Curve | None, show: Any, remark: str = "median") -> tuple[str, str]:
    return (show(curve.typical), remark) if curve is not None and curve.count else (DASH, "")


def _peak(run: Run) -> float | None:
    peak = run.curves.get("memory.peak")
    return peak.high.value if peak and peak.high else None


def _restarts(run: Run) -> tuple[str, str]:
    restarts = sum(mark.kind == "restart" for mark in run.marks)
    redone = len(set(run.redone_steps))
    return (f"{restarts:,}" if restarts or run.events else DASH), f"{redone:,} logged steps redone" if redone else ""


def elapsed_hours(times: Sequence[float]) -> list[float]:
    """Unix times in seconds as hours since the first; a clock that was set back does not go back."""
    hours = [0.0] * len(times[:1])
    for before, now in pairwise(times):
        hours.append(hours[-1] + max(now - before, 0.0) / 3600)
    return hours
