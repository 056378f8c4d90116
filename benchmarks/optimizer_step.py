"""A step of AdamW with moments in few bytes against torch's fused AdamW with float32 moments: time and bytes.

    uv run python benchmarks/optimizer_step.py            # two minutes on one core
    uv run python benchmarks/optimizer_step.py --rounds 40

All optimizers of a table live in one process and move the same weights by the same gradients, in turns; whatever else
the machine does then hits all of them. Time is that of the CPU, on one thread, and of each round the ratio to torch's
is taken, and of those the quartiles. Bytes are those of the state's tensors, and by how much a first and second step
raise the largest resident set (`VmHWM`, Linux only) of a process of its own.
"""

import argparse
import ctypes
import multiprocessing
import random
import statistics
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from titan_core.config import OptimizerConfig
from titan_core.optimizers.adamw import AdamW

# The matrices of 8 blocks of a Llama 768 wide, with 12 heads and a vocabulary of 16,384: 69 million weights.
SHAPES = [(768, 768), (768, 768), (768, 768), (768, 768), (2048, 768), (2048, 768), (768, 2048), (768,), (768,)] * 8
SHAPES += [(16384, 768)]

USUAL = OptimizerConfig(lr=1e-4)
KINDS = {
    "float32": USUAL,
    "bfloat16": replace(USUAL, state_dtype="bfloat16"),
    "bfloat16, stochastic": replace(USUAL, state_dtype="bfloat16", state_rounding="stochastic"),
    "int8": replace(USUAL, state_dtype="int8"),
    "int4": replace(USUAL, state_dtype="int4"),
}
# Of weights that are kept in bfloat16.
STOCHASTIC = {
    f"{kind}, weights too": replace(KINDS[kind], parameter_rounding="stochastic")
    for kind in ("float32", "bfloat16, stochastic", "int8")
}


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    """Weights with gradients whose sizes differ by row."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES:
        # In place, so that no memory is left over that a step could use.
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator))
        sizes = torch.logspace(-4, -2, shape[0]).view(-1, *[1] * (len(shape) - 1))
        parameter.grad = torch.empty(shape, dtype=dtype).normal_(generator=generator).mul_(sizes)
        found.append(parameter)
    return found


def build(parameters: list[nn.Parameter], config: OptimizerConfig | None) -> Optimizer:
    """Our own step, also for float32; None: torch's, which keeps moments in the weights' dtype."""
    if config is None:
        betas = USUAL.beta1, USUAL.beta2
        return torch.optim.AdamW(parameters, lr=USUAL.lr, betas=betas, weight_decay=USUAL.weight_decay, fused=True)
    named = [(str(i), parameter) for i, parameter in enumerate(parameters)]
    return AdamW([{"params": named, "lr": config.lr, "weight_decay": config.weight_decay}], config, seed=0)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors of an optimizer's state."""
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


def compare(dtype: torch.dtype, rounds: int) -> None:
    """Prints a table of all kinds for weights of one dtype."""
    parameters = weights(dtype)
    count = sum(parameter.numel() for parameter in parameters)
    name = str(dtype).removeprefix("torch.")
    configs: dict[str, OptimizerConfig | None] = {f"torch, fused, {name}": None, **KINDS}
    if dtype == torch.bfloat16:
        configs |= STOCHASTIC
    optimizers = {kind: build(parameters, config) for kind, config in configs.items()}
    for optimizer in optimizers.values():
        optimizer.step()
    base, *_ = optimizers
    seconds: dict[str, list[float]] = {kind: [] for kind in optimizers}
    order = list(optimizers)
    for _ in range(rounds):
        random.shuffle(order)
        for kind in order:
            started = time.process_time()
            optimizers[kind].step()
            seconds[kind].append(time.process_time() - started)
    print(f"{name} weights, {count / 1e6:.1f} million, 1 thread, {rounds} rounds")
    print("| moments | ns of CPU a weight | of torch's time | bytes a weight | all that a step needs |")
    print("|---|---|---|---|---|")
    for kind, optimizer in optimizers.items():
        ratios = [one / other for one, other in zip(seconds[kind], seconds[base], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        nanoseconds = statistics.median(seconds[kind]) / count * 1e9
        size = state_bytes(optimizer) / count
        print(
            f"| {kind} | {nanoseconds:.2f} | {median:.2f} [{low:.2f}, {high:.2f}] | {size:.3f} | "
            f"{peak(dtype, configs[kind]) / count:.2f} |"
        )


def peak(dtype: torch.dtype, config: OptimizerConfig | None) -> int:
    """By how many bytes two steps raise the largest resident set of a new process."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=serve_peak, args=(dtype, config, other))
    process.start()
    result = mine.recv()
    process.join()
    return result


def serve_peak(dtype: torch.dtype, config: OptimizerConfig | None, pipe: Connection) -> None:
    """Sends what `peak` returns."""
    torch.set_num_threads(1)
    optimizer = build(weights(dtype), config)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else what imports have left is used first, and not seen
    before = resident("VmRSS")
    for _ in range(2):
        optimizer.step()
    pipe.send(resident("VmHWM") - before)


def resident(name: str) -> int:
    """A line of this process's status in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))


def main() -> None:
    """Parses the command line and prints a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in arguments.dtypes:
        compare(getattr(torch, dtype), arguments.rounds)


if __name__ == "__main__":
    main()
