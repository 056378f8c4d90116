"""What saving a checkpoint costs: the time that training waits, and the speed of a save that it waits for.

    uv run python benchmarks/checkpoint_saving.py --gib 1 --rounds 7

Each round measures, one after another, in an order that turns from round to round: a memcpy of the state into memory
that has been touched before; how long `start_save` keeps its caller (what it leaves to do is waited for, not counted);
writing the same bytes to one file with write(2) and fsync, nothing else; and `save`, hashes, manifest and all. The
first round is not counted: "second and later saves". Ratios are of one round; shown are their median and quartiles.

State: float32 tensors like those of a transformer with its Adam moments, plain, on the CPU, in one process. Files
go to --directory, which should be on the disk in question, and are deleted.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from titan_ckpt.checkpointer import Checkpointer

GIB = 1 << 30
WRITE_BYTES = 1 << 23


class State:
    """A dict of tensors of about `size` bytes, none of them above a twentieth of it."""

    def __init__(self, size: int) -> None:
        rows, self.tensors, left = size // 4 // 20 // 1024, {}, size
        while left > 0:
            shape = (min(rows, max(left // 4096, 1)), 1024)
            self.tensors[f"layers.{len(self.tensors)}"] = torch.randn(shape)
            left -= shape[0] * 4096

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tensors = state


def write_raw(path: Path, data: memoryview) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for start in range(0, len(data), WRITE_BYTES):
        rest = data[start : start + WRITE_BYTES]
        while rest:
            rest = rest[os.write(file, rest) :]
    os.fsync(file)
    os.close(file)


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(directory: Path, size: int, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Seconds of each kind by round, the first left out."""
    state = State(size)
    flat = torch.cat([tensor.view(-1) for tensor in state.tensors.values()])
    touched = torch.zeros_like(flat)
    data = memoryview(cast(bytearray, flat.view(torch.uint8).numpy()))
    checkpointer = Checkpointer(directory / "checkpoints", asynchronous=True)
    step = 0

    def save() -> float:
        nonlocal step
        step += 1
        return seconds(lambda: checkpointer.save(step, {"model": state}))

    def start_save() -> float:
        nonlocal step
        step += 1
        checkpointer.start_save(step, {"model": state})
        checkpointer.wait()
        return checkpointer.last_blocking_seconds

    def raw() -> float:
        path = directory / "raw"
        taken = seconds(lambda: write_raw(path, data))
        path.unlink()
        return taken

    kinds: dict[str, Callable[[], float]] = {
        "memcpy": lambda: seconds(lambda: touched.copy_(flat)),
        "start_save": start_save,
        "raw": raw,
        "save": save,
        "sha256": lambda: seconds(lambda: hashlib.sha256(data).digest()),
    }
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        names = list(kinds)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            elapsed = kinds[name]()
            if number:
                taken[name].append(elapsed)
    checkpointer.close()
    return state.nbytes, taken


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=Path("checkpoint-saving"))
    options = parser.parse_args()
    size = int(options.gib * GIB)
    options.directory.mkdir()
    try:
        free = shutil.disk_usage(options.directory).free
        if free < 4 * size + 5 * GIB:
            raise SystemExit(f"{options.directory} has {free / GIB:.0f} GiB free; 4 states and 5 GiB are needed.")
        size, taken = measure(options.directory, size, options.rounds)
    finally:
        shutil.rmtree(options.directory)
    for name, values in taken.items():
        print(f"{name:12s} {spread([size / GIB / value for value in values])} GiB/s")
    blocking = [a / b for a, b in zip(taken["start_save"], taken["memcpy"], strict=True)]
    saving = [raw / save for raw, save in zip(taken["raw"], taken["save"], strict=True)]
    print(f"start_save takes {spread(blocking)} of the time of a memcpy")
    print(f"save reaches {spread(saving)} of the speed of write and fsync")


if __name__ == "__main__":
    main()
