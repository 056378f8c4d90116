"""What a run ran on: versions, devices, environment and command line, as `environment.json` in the run directory.

Values of environment variables that look like secrets, and passwords in addresses, are left out.
"""

import json
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

_RELEVANT = re.compile(
    r"(CUDA|CUBLAS|NCCL|GLOO|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|OMP|MKL|HIP|ROCR|RCCL|SLURM|TITAN|THP|XDG_CACHE"
    r"|HF)_.*|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|PYTHONHASHSEED|LD_PRELOAD"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|AUTH", re.IGNORECASE)
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")


def write_environment(path: Path, **more: object) -> None:
    """Writes `environment()` and whatever else is known about the run, over what an earlier start wrote."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(environment() | more, indent=2, default=str) + "\n")
    partial.replace(path)


def environment() -> dict[str, Any]:
    """Versions, host, devices, relevant environment variables, git revision and command line of this process."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "titan": _titan_versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "driver": _driver(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "variables": {name: _clean(name, value) for name, value in sorted(os.environ.items()) if _is_relevant(name)},
        "git": _git(),
        "command": [_PASSWORD.sub("…@", argument) for argument in sys.argv],
        "directory": str(Path.cwd()),
    }


def _titan_versions() -> dict[str, str]:
    # Their folders say it; to open what every installed package says of itself takes a tenth of a second.
    folders = [path.stem for entry in sys.path for path in Path(entry).glob("titan_*.dist-info")]
    return {name.replace("_", "-"): version for name, _, version in (folder.partition("-") for folder in folders)}


def _is_relevant(name: str) -> bool:
    return _RELEVANT.fullmatch(name) is not None


def _clean(name: str, value: str) -> str:
    return "…" if _SECRET.search(name) else _PASSWORD.sub("…@", value)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", version.read_text()) if version.exists() else None
    return found[0] if found else None


def _git() -> dict[str, Any] | None:
    """Revision of the working directory's repository, and whether it differs from it; None if there is none."""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": run.stdout.strip(), "changed": bool(changes.stdout.strip())}
