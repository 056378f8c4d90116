"""The per-rank timeline as the page draws it: a row a rank, a block a span, positions in percent of the window."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from titan_metrics.report.phases import colors as colors_of
from titan_metrics.report.phases import in_order
from titan_metrics.report.run import Run
from titan_metrics.report.spans import RunSpans
from titan_metrics.report.values import seconds
from titan_metrics.stragglers import Straggler
from titan_metrics.trace import RecordedSpan

_STEPS = 3  # of the latest window
_RANKS = 32  # rows of the page
_BLOCKS = 6000  # of one window; deeper spans are left out first
_DEPTHS = 3
_SMALLEST = 0.02  # percent of a window: a tenth of a pixel


@dataclass(frozen=True)
class Block:
    """A span: `left` and `width` in percent, `color` an index of the page's palette of phases."""

    left: float
    width: float
    depth: int
    color: int
    text: str


@dataclass(frozen=True)
class Window:
    """Some steps on the clock, with the rows of the ranks: (rank, its blocks)."""

    title: str
    length: str
    depths: int
    rows: list[tuple[int, list[Block]]]


@dataclass(frozen=True)
class Phase:
    """A row of the table of phases: for each rank its time a step, and 0 to 1 how far it is above the median."""

    name: str
    color: int
    cells: list[tuple[str, float]]


@dataclass(frozen=True)
class Timeline:
    """One run's windows, its phases' times by rank, and who was slow; `left_out` counts ranks that are not shown."""

    run: int
    name: str
    steps: str
    windows: list[Window]
    ranks: list[int]
    legend: list[tuple[str, int]]
    phases: list[Phase]
    stragglers: list[Straggler]
    left_out: int


def timelines(runs: Sequence[Run]) -> list[Timeline]:
    """The timeline of each run that has spans of steps which all ranks have."""
    return [_timeline(index, run.name, run.spans) for index, run in enumerate(runs) if run.spans.steps]


def _timeline(index: int, name: str, spans: RunSpans) -> Timeline:
    slow = [straggler.rank for straggler in spans.stragglers]
    others = [rank for rank in spans.by_rank if rank not in slow]
    ranks = sorted([*dict.fromkeys(slow), *others][:_RANKS])
    inner = (span.name for rank in ranks for span in spans.by_rank[rank])
    colors = colors_of([*in_order(spans.means), *inner])
    latest = spans.steps[-_STEPS:]
    windows = [_window(spans, ranks, latest, "the latest", colors)]
    slowest = max(spans.steps, key=spans.step_seconds)
    if slowest not in latest:
        windows.append(_window(spans, ranks, [slowest], f"the slowest of {_steps(spans.steps)}", colors))
    return Timeline(
        run=index,
        name=name,
        steps=_steps(spans.steps),
        windows=windows,
        ranks=ranks,
        legend=list(colors.items()),
        phases=[Phase(phase, colors[phase], _cells(spans.means[phase], ranks)) for phase in in_order(spans.means)],
        stragglers=spans.stragglers,
        left_out=len(spans.by_rank) - len(ranks),
    )


def _window(spans: RunSpans, ranks: list[int], steps: list[int], what: str, colors: dict[str, int]) -> Window:
    by_rank = {rank: found for rank, found in spans.only(steps).items() if rank in ranks}
    everything = [span for found in by_rank.values() for span in found]
    depths = min(_DEPTHS, max(span.depth for span in everything) + 1)
    while depths > 1 and sum(span.depth < depths for span in everything) > _BLOCKS:
        depths -= 1
    begin = min(span.start for span in everything)
    length = max(max(span.start + span.seconds for span in everything) - begin, 1e-9)
    rows = []
    for rank in ranks:
        blocks = [_block(span, begin, length, colors) for span in by_rank[rank] if span.depth < depths]
        rows.append((rank, [block for block in blocks if block.width >= _SMALLEST]))
    return Window(f"{_steps(steps).capitalize()}, {what}", seconds(length), depths, rows)


def _block(span: RecordedSpan, begin: float, length: float, colors: dict[str, int]) -> Block:
    told = [f"{span.name} of step {span.step}", seconds(span.seconds)]
    for name, value in span.attributes.items():
        told.append(f"{seconds(value)} of it waiting" if name == "waited" else f"{name.replace('_', '-')} {value}")
    left = round(100 * (span.start - begin) / length, 3)
    return Block(left, round(100 * span.seconds / length, 3), span.depth, colors[span.name], ", ".join(told))


def _cells(by_rank: dict[int, float], ranks: list[int]) -> list[tuple[str, float]]:
    middle = median(by_rank.values())
    most = max(by_rank.values()) - middle
    if most <= 0.1 * middle:
        return [(seconds(by_rank[rank]), 0.0) for rank in ranks]
    return [(seconds(by_rank[rank]), round(max(by_rank[rank] - middle, 0.0) / most, 2)) for rank in ranks]


def _steps(steps: list[int]) -> str:
    return f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
