"""Every private torch import of this package, in one place; checked on torch 2.13."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def foreach_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The Euclidean norm of each tensor, computed in `dtype`, in as few kernels as the device allows."""
    return list(torch._foreach_norm(list(tensors), 2, dtype))


def collective_records() -> dict[str, Any] | None:
    """What the Flight Recorder of this process holds, without stacks: NCCL's, else gloo's; None if it is empty."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)  # the first is only in CUDA builds
        records = json.loads(dump(True, False)) if dump is not None else {}
        if records.get("entries"):
            return records
    return None


def group_ranks() -> dict[str, list[int]]:
    """Name of each process group that this process is in -> the global ranks in it."""
    world = dist.distributed_c10d._world
    return {name: dist.get_process_group_ranks(group) for group, name in world.pg_names.items()}


def record_memory(entries: int) -> None:
    """Makes the CUDA allocator remember that many allocations and frees, with their stacks."""
    torch.cuda.memory._record_memory_history(max_entries=entries)


def stop_recording_memory() -> None:
    """Makes the CUDA allocator forget them."""
    torch.cuda.memory._record_memory_history(enabled=None)


def dump_memory(path: Path) -> None:
    """Writes what the CUDA allocator holds and remembers, for https://docs.pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(str(path))


def on_out_of_memory(callback: Callable[[], None]) -> None:
    """Calls `callback` whenever the CUDA allocator has run out of memory, before it raises; cannot be undone."""
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer")  # noqa: B009 (only in CUDA builds)
    attach(lambda *_: callback())
