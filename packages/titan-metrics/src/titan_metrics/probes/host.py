"""What a process finds on its host: all that `titan_metrics.machine` writes down, libraries, memory and limits.

And which ranks found something else than the others, which is seldom meant.
"""

import importlib.metadata
import json
import os
import re
import resource
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_metrics.machine import environment

_LIBRARIES = ("numpy", "safetensors", "tokenizers", "torchao", "torchft-nightly", "transformers", "triton")
_LIMITS = {"open files": "NOFILE", "processes": "NPROC", "locked bytes": "MEMLOCK", "core file bytes": "CORE"}
# What differs between ranks or starts by nature.
_OWN = re.compile(
    r"host|command|directory|git|memory_available_bytes|shared_memory_free_bytes"
    r"|variables\.(.*RANK.*|TORCHELASTIC_.*|SLURM_.*|CUDA_VISIBLE_DEVICES)"
)


def describe_host() -> dict[str, Any]:
    """Versions, devices, variables, memory and limits of this process; sizes in bytes, and null where nobody knows."""
    import torch

    described = environment()
    described["libraries"] = {name: version for name in _LIBRARIES if (version := _version(name))}
    described["device_memory_bytes"] = [
        torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
    ]
    described["cores_allowed"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described["memory_available_bytes"] = _available_memory()
    described |= _shared_memory()
    described["limits"] = {name: _limit(kind) for name, kind in _LIMITS.items()}
    return described


def differences(hosts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What ranks found that most ranks did not, a line for each value: `driver: 570.1 on rank 3; 580.2 on the others`.

    `hosts`: what `describe_host` has returned on each rank.
    """
    flat = [dict(_flatten(host)) for host in hosts]
    lines = []
    for name in sorted({name for host in flat for name in host if not _OWN.fullmatch(name)}):
        values = [host.get(name, "unset") for host in flat]
        (usual, _), *unusual = Counter(values).most_common()
        for value, _ in unusual:
            ranks = [str(rank) for rank, found in enumerate(values) if found == value]
            who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
            lines.append(f"{name}: {value} on {who}; {usual} on most others")
    return lines


def _flatten(host: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in host.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _available_memory() -> int | None:
    path = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found[1]) * 1024 if found else None


def _shared_memory() -> dict[str, int]:
    folder = Path("/dev/shm")  # noqa: S108  (nothing is written there)
    if not folder.exists():
        return {}
    usage = shutil.disk_usage(folder)
    return {"shared_memory_bytes": usage.total, "shared_memory_free_bytes": usage.free}


def _limit(kind: str) -> int | None:
    """The soft limit, null if there is none."""
    soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))
    return None if soft == resource.RLIM_INFINITY else soft
