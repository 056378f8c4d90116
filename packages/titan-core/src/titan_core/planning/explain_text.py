"""An explanation of a layout as text for a terminal."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from titan_core.planning.explain import Axis, Explanation, Parameters, Stage
from titan_core.planning.timeline import Timeline, draw
from titan_core.planning.traffic import Flow
from titan_core.text import human, wrap


def render(explanation: Explanation, width: int = 120) -> str:
    """The explanation in sections, in lines of `width` characters."""
    sections = [
        ("mesh", _mesh(explanation)),
        ("roles", _roles(explanation, width - 2)),
        ("pipeline stages", _stages(explanation)),
        ("pipeline schedule", _timeline(explanation.timeline, width - 2)),
        ("collectives a step", _traffic(explanation, width - 2)),
    ]
    return "\n\n".join(
        "\n".join([title, *(wrap(f"  {line}", width) for line in lines)]) for title, lines in sections if lines
    )


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


def _roles(explanation: Explanation, width: int) -> list[str]:
    lines = []
    for treatment in explanation.roles:
        modules = f"{treatment.modules} module{'s' if treatment.modules > 1 else ''}"
        lines.append(f"{treatment.role} ({modules})" + (":" if treatment.techniques else ""))
        lines += [f"  - {technique}" for technique in treatment.techniques]
        own = [line for line in explanation.parameters if line.role == treatment.role]
        column = max((len(_name(line)) for line in own), default=0)
        table = [f"  {_name(line):<{column}}  {_placed(line)}" for line in own]
        if all(len(line) <= width for line in table):
            lines += table
        else:
            lines += [text for line in own for text in (f"  {_name(line)}", f"      {_placed(line)}")]
    return lines


def _name(line: Parameters) -> str:
    return line.pattern + (f" ({line.count} equal)" if line.count > 1 else "")


def _placed(line: Parameters) -> str:
    placements = f" [{', '.join(f'{axis}: {mark}' for axis, mark in line.placements)}]" if line.placements else ""
    return f"{list(line.shape)}{placements} -> {list(line.local_shape)} {line.dtype} a rank"


def _stages(explanation: Explanation) -> list[str]:
    pp = 1 + max((stage.rank for stage in explanation.stages), default=0)
    return [
        f"stage {stage.number} on pp rank {stage.rank} ({_members(stage, explanation.world_size // pp)}): "
        f"{_run(stage.modules)}, {stage.cost_share:.1%} of the cost, {stage.parameters:,} parameters"
        for stage in explanation.stages
    ]


def _members(stage: Stage, count: int) -> str:
    """The ranks of the world that run a stage: pp is the outermost axis of the meshes."""
    first, last = stage.rank * count, (stage.rank + 1) * count - 1
    return f"rank {first}" if count == 1 else f"ranks {first}-{last}"


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
        *draw(timeline, width),
    ]


def _traffic(explanation: Explanation, width: int) -> list[str]:
    if not explanation.traffic:
        return []
    flows = sorted(explanation.traffic, key=lambda flow: -(flow.sent_bytes + flow.received_bytes))
    rows = [("axis", "kind", "of", "count", "sent", "received", "why"), *map(_row, flows)]
    rows.append(_sum(flows))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    table = [("  ".join(_aligned(row, widths)), row[6]) for row in rows]
    if all(len(numbers) + 2 + len(why) <= width for numbers, why in table):
        lines = [f"{numbers}  {why}".rstrip() for numbers, why in table]
    else:
        lines = [text for numbers, why in table for text in (numbers, f"    {why}") if text.strip()]
    return [
        f"of rank {explanation.rank}; bytes are those it sends to others and receives from them around a ring",
        *lines,
    ]


def _row(flow: Flow) -> tuple[str, ...]:
    numbers = f"{flow.count:,}", human(flow.sent_bytes), human(flow.received_bytes)
    return (flow.axis, flow.kind, flow.dtype, *numbers, flow.cause)


def _sum(flows: Iterable[Flow]) -> tuple[str, ...]:
    sums = [sum(numbers) for numbers in zip(*((f.count, f.sent_bytes, f.received_bytes) for f in flows), strict=True)]
    return ("all", "", "", f"{sums[0]:,}", human(sums[1]), human(sums[2]), "")


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    left = [row[i].ljust(widths[i]) for i in range(3)]
    return left + [row[i].rjust(widths[i]) for i in range(3, 6)]
