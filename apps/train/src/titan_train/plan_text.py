"""What `titan-plan` prints: a plan and the layouts that fit, as text or as JSON. Imports no torch."""

import json
from collections.abc import Mapping
from typing import Any

from titan_core.planning.ledger import Category
from titan_core.text import human, terminal_width, wrap
from titan_train.config import TrainConfig
from titan_train.plan import FRAGMENTATION, Plan
from titan_train.plan_fit import ORDER_RULE, Candidate, Fit

_MEANING: Mapping[Category, str] = {
    "parameters": "this rank's shards, and buffers",
    "gradients": "shards, and whole ones that wait for their reduction",
    "optimizer": "its state",
    "activations": "what forward keeps for backward, and what both are working on",
    "communication": "parameters gathered or cast, buffers of reductions and of the pipeline",
    "other": "the batch, and the optimizer's own work",
}
_SHOWN = 20  # layouts; all of them are in the JSON


def plan_text(config: TrainConfig, found: Plan, by_remat: Mapping[str, Plan], name: str) -> str:
    """A plan for a terminal."""
    rows = found.rows
    lines = [
        f"{name} on {_count(found.world_size, 'rank', 'ranks')}: {layout_name(found)}; "
        f"{_count(rows.micro_batches, 'micro-batch', 'micro-batches')} of "
        f"{rows.micro_batch_size} x {config.training.seq_len:,} tokens a step.",
        f"Pipeline rank {found.pipeline_rank} needs most; each of its ranks:"
        if found.degrees.pp > 1
        else "Each rank needs:",
        *(f"  {kind:<14}{human(size):>12}  {_MEANING[kind]}" for kind, size in found.memory.items()),
        f"  {'peak':<14}{human(found.peak):>12}  all of them, when most is alive",
        f"  {'fragmentation':<14}{human(found.fragmentation):>12}  {FRAGMENTATION:.0%} of it: assumed, not measured",
        f"  {'total':<14}{human(found.total):>12}",
        "",
        "With other recomputation (--remat.mode):",
        *(
            f"  {mode:<14}{human(other.memory['activations']):>12}  activations, {human(other.total)} in total"
            for mode, other in by_remat.items()
        ),
        "",
        *(f"assumed: {text}" for text in assumptions(config)),
    ]
    return _wrapped(lines)


def fit_text(found: Fit, name: str) -> str:
    """The layouts that fit, for a terminal."""
    memory = found.memory_bytes
    given = f"{memory / 1e9:g} GB ({human(memory)})"
    if not found.fitting:
        least = found.smallest
        short = human(least.plan.total - memory)
        return _wrapped(
            [
                f"None of the {found.tried} valid layouts of {name} fits into {given}. The smallest, "
                f"{candidate_name(least)}, needs {human(least.plan.total)}, so that {short} are short; most of it are "
                f"{_greatest(least.plan)}. More ranks, a smaller training.micro_batch_size or parallel.cp need less.",
            ]
        )
    fit = _count(len(found.fitting), "layout", "layouts")
    lines = [f"{fit} of {name} {'fits' if len(found.fitting) == 1 else 'fit'} into {given}; {ORDER_RULE}."]
    lines.append(f"  {'layout':<52}{'recomputation':<15}{'total':>11}{'headroom':>12}")
    for candidate in found.fitting[:_SHOWN]:
        total = candidate.plan.total
        lines.append(
            f"  {layout_name(candidate.plan):<52}{candidate.config.remat.mode:<15}{human(total):>11}"
            f"{human(memory - total):>12}"
        )
    if len(found.fitting) > _SHOWN:
        lines.append(f"  and {len(found.fitting) - _SHOWN} more, which --json lists")
    return _wrapped(lines)


def plan_json(config: TrainConfig, found: Plan, by_remat: Mapping[str, Plan]) -> str:
    """A plan for a machine; sizes in bytes."""
    content = {
        **_plan(found),
        "world_size": found.world_size,
        "pipeline_rank": found.pipeline_rank,
        "by_pipeline_rank": found.by_pipeline_rank,
        "micro_batches": found.rows.micro_batches,
        "micro_batch_size": found.rows.micro_batch_size,
        "by_remat": {mode: _plan(other) for mode, other in by_remat.items()},
        "assumptions": assumptions(config),
    }
    return json.dumps(content, indent=2)


def fit_json(found: Fit) -> str:
    """The layouts that fit, for a machine; sizes in bytes."""
    content = {
        "memory_bytes": found.memory_bytes,
        "order": ORDER_RULE,
        "tried": found.tried,
        "fitting": [_candidate(candidate, found.memory_bytes) for candidate in found.fitting],
        "smallest": _candidate(found.smallest, found.memory_bytes),
    }
    return json.dumps(content, indent=2)


def assumptions(config: TrainConfig) -> list[str]:
    """What the numbers rest on, each as a phrase."""
    notes = [
        "bytes of live tensors, found by arithmetic over shapes; no tensor is built",
        f"an allocator wastes {FRAGMENTATION:.0%}; contexts and communication libraries need a gigabyte or so more",
        "operators keep what torch's own do on a CPU; attention is a flash kernel, RMSNorm elementary operations",
        "the first rank of each axis, which has the largest parts; a step in full swing, gradients of the last "
        "micro-batch added to those before",
    ]
    if config.data.confine_attention and config.model.attention_kernel == "sdpa":
        notes.append("attention confined to documents keeps a mask of S x S for each row and block")
    if config.model.moe is not None:
        notes.append("tokens are dealt evenly to experts; a rank with popular ones needs more")
    if config.compile.enabled:
        notes.append("nothing is compiled; compiled blocks usually keep fewer activations")
    return notes


def layout_name(found: Plan) -> str:
    """The degrees that are more than 1."""
    degrees = found.degrees
    named = {name: getattr(degrees, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}
    return " x ".join(f"{name} {degree}" for name, degree in named.items() if degree > 1) or "one device"


def candidate_name(candidate: Candidate) -> str:
    """A layout and its recomputation."""
    return f"{layout_name(candidate.plan)} with --remat.mode {candidate.config.remat.mode}"


def _plan(found: Plan) -> dict[str, Any]:
    return {
        "layout": {name: getattr(found.degrees, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")},
        "bytes": dict(found.memory),
        "peak_bytes": found.peak,
        "fragmentation_bytes": found.fragmentation,
        "total_bytes": found.total,
    }


def _candidate(candidate: Candidate, memory: int) -> dict[str, Any]:
    headroom = memory - candidate.plan.total
    return {**_plan(candidate.plan), "remat": candidate.config.remat.mode, "headroom_bytes": headroom}


def _greatest(found: Plan) -> str:
    kind = max(found.memory, key=lambda kind: found.memory[kind])
    return f"{kind} ({human(found.memory[kind])})"


def _count(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def _wrapped(lines: list[str]) -> str:
    return "\n".join(wrap(line, terminal_width()) for line in lines)
