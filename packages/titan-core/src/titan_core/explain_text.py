"""An explanation of a layout as text for a terminal."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from titan_core.explain import Axis, Explanation, Parameters, Stage
from titan_core.timeline import Timeline, draw
from titan_core.traffic import Flow


def render(explanation: Explanation, width: int = 120) -> str:
    """The explanation in sections; pipelines are drawn in `width` characters."""
    sections = [
        ("mesh", _mesh(explanation)),
        ("roles", _roles(explanation)),
        ("pipeline stages", _stages(explanation.stages)),
        ("pipeline schedule", _timeline(explanation.timeline, width)),
        ("collectives a step", _traffic(explanation)),
    ]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections if lines)


def _mesh(explanation: Explanation) -> list[str]:
    if not explanation.views:
        return ["1 rank: nothing is shared"]
    lines = [f"{explanation.world_size} ranks; neighbours as rank {explanation.rank} has them"]
    for view in explanation.views:
        lines.append(f"{view.name}: {' x '.join(f'{axis.name} {len(axis.ranks)}' for axis in view.axes)}")
        lines += [f"  {axis.name}: {_neighbours(axis)}" for axis in view.axes if len(axis.ranks) > 1]
    return lines


def _neighbours(axis: Axis) -> str:
    first, second, *_ = axis.ranks
    last, stride = axis.ranks[-1], second - first
    if stride == 1:
        return f"ranks {first}-{last} (stride 1)"
    named = ", ".join(map(str, axis.ranks)) if len(axis.ranks) <= 4 else f"{first}, {second}, ... {last}"
    return f"ranks {named} (stride {stride})"


def _roles(explanation: Explanation) -> list[str]:
    lines = []
    for treatment in explanation.roles:
        modules = f"{treatment.modules} module{'s' if treatment.modules > 1 else ''}"
        lines.append(f"{treatment.role} ({modules})" + (":" if treatment.techniques else ""))
        lines += [f"  - {technique}" for technique in treatment.techniques]
        own = [line for line in explanation.parameters if line.role == treatment.role]
        width = max((len(_name(line)) for line in own), default=0)
        lines += [f"  {_name(line):<{width}}  {_placed(line)}" for line in own]
    return lines


def _name(line: Parameters) -> str:
    return line.pattern + (f" ({line.count} equal)" if line.count > 1 else "")


def _placed(line: Parameters) -> str:
    placements = f" [{', '.join(f'{axis}: {mark}' for axis, mark in line.placements)}]" if line.placements else ""
    return f"{list(line.shape)}{placements} -> {list(line.local_shape)} {line.dtype} a rank"


def _stages(stages: Sequence[Stage]) -> list[str]:
    return [
        f"stage {stage.number} on rank {stage.rank}: {_run(stage.modules)}, {stage.cost_share:.1%} of the cost, "
        f"{stage.parameters:,} parameters"
        for stage in stages
    ]


def _run(modules: Sequence[str]) -> str:
    """Neighbouring modules that differ in a number only as `first to last`."""
    runs = [list(run) for _, run in groupby(modules, key=lambda name: name.rpartition(".")[0] or name)]
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1].rpartition('.')[2]}" for run in runs)


def _timeline(timeline: Timeline | None, width: int) -> list[str]:
    if timeline is None:
        return []
    return [
        f"bubble {timeline.bubble:.1%}: the share of time in which ranks wait",
        "(if a backward takes two forwards, all stages cost the same, and sending costs nothing)",
        *draw(timeline, width - 2),
    ]


def _traffic(explanation: Explanation) -> list[str]:
    if not explanation.traffic:
        return []
    flows = sorted(explanation.traffic, key=lambda flow: -(flow.sent_bytes + flow.received_bytes))
    rows = [("axis", "kind", "count", "sent", "received", "why"), *map(_row, flows)]
    rows.append(_sum(flows))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        f"of rank {explanation.rank}; bytes are those it sends to others and receives from them around a ring",
        *("  ".join([*_aligned(row, widths), row[5]]).rstrip() for row in rows),
    ]


def _row(flow: Flow) -> tuple[str, ...]:
    numbers = f"{flow.count:,}", human(flow.sent_bytes), human(flow.received_bytes)
    return (flow.axis, flow.kind, *numbers, flow.cause)


def _sum(flows: Iterable[Flow]) -> tuple[str, ...]:
    sums = [sum(numbers) for numbers in zip(*((f.count, f.sent_bytes, f.received_bytes) for f in flows), strict=True)]
    return ("all", "", f"{sums[0]:,}", human(sums[1]), human(sums[2]), "")


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    left = [row[i].ljust(widths[i]) for i in range(2)]
    return left + [row[i].rjust(widths[i]) for i in range(2, 5)]


def human(size: float) -> str:
    """A number of bytes for a person: 1,536 -> `1.50 KiB`."""
    if size < 1024:
        return f"{size:.0f} B"
    power = min(int(math.log2(size) // 10), 5)
    return f"{size / 1024**power:.2f} {'KMGTP'[power - 1]}iB"
