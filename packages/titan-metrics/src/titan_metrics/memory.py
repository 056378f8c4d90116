"""How much memory a run takes: of the device on a GPU, of the process on a CPU.

Reading costs no synchronization with the device: a GPU's numbers are those of PyTorch's caching allocator, which the
host keeps.
"""

import re
import resource
import sys
from pathlib import Path

# getrusage(2) would give a peak on Linux too, but a process started by a larger one inherits that one's peak there
# (execve keeps the high-water mark). /proc/self/status counts this program alone.
_STATUS_KIB = {
    "memory.used": re.compile(r"^VmRSS:\s+(\d+) kB", re.MULTILINE),
    "memory.peak": re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE),
}


def memory(device_type: str) -> dict[str, float]:
    """Memory of the current device (`cuda`, which is also AMD's name in PyTorch) or of this process (`cpu`).

    Returns:
        In bytes `memory.used`, in use now, and `memory.peak`.

        On a GPU these are the allocator's active bytes, the peak being that since the last reading (which this call
        starts anew), and there are further `memory.reserved_peak`, likewise, and `allocator.retries` and
        `allocator.ooms`, counted since the process started: allocations that succeeded only after cached blocks were
        given back (each stalls the device), and those that failed.

        On a CPU they are the process's resident set and its highest value since the program started. macOS tells a
        process its peak only, so `memory.used` is missing there.

    Raises:
        ValueError: for any other type of device.
    """
    if device_type == "cuda":
        return _device_memory()
    if device_type == "cpu":
        return _process_memory()
    raise ValueError(f"Memory of device type {device_type!r} cannot be read; it can be of 'cuda' and 'cpu'.")


def _device_memory() -> dict[str, float]:
    import torch  # takes a second, and a process that only watches its own memory has no use for it

    stats = torch.cuda.memory_stats()
    torch.cuda.reset_peak_memory_stats()
    return {
        "memory.used": stats.get("active_bytes.all.current", 0),
        "memory.peak": stats.get("active_bytes.all.peak", 0),
        "memory.reserved_peak": stats.get("reserved_bytes.all.peak", 0),
        "allocator.retries": stats.get("num_alloc_retries", 0),
        "allocator.ooms": stats.get("num_ooms", 0),
    }


def _process_memory() -> dict[str, float]:
    if sys.platform == "darwin":
        return {"memory.peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}  # bytes, KiB elsewhere
    status = Path("/proc/self/status").read_text()
    return {key: int(found[1]) * 1024 for key, line in _STATUS_KIB.items() if (found := line.search(status))}
