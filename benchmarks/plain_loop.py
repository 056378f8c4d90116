"""Our training step and start-up against a plain PyTorch loop written by hand: same model, same batches, same dtype.

    uv run python benchmarks/plain_loop.py              # all: ten minutes on two cores
    uv run python benchmarks/plain_loop.py --parts step --dtypes bf16 --rounds 20

Both sides of a comparison live side by side, each in a process of its own, and take turns: whatever else the machine
does then hits both. Work is counted in tokens per second of CPU time, which shared cores disturb least, on one thread.
The ratio of each pair of turns is taken, and of those the quartiles. Peak memory is the largest resident set of each
process (`VmHWM`, Linux only).

The plain loop is what the PyTorch tutorials teach: `F.cross_entropy` on the model's logits, `clip_grad_norm_`, fused
AdamW, and for bf16 `torch.autocast`. It reads its batches from a list in memory.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from titan_models.families.llama3 import Llama3Config

SEQ_LEN, BATCH = 512, 2
# 34 million parameters for the step; for the start as few as leave only the start to be seen.
MODEL = Llama3Config(vocab_size=8192, dim=512, layers=8, heads=8, kv_heads=4, head_dim=64, hidden_dim=1536)
SMALL = Llama3Config(vocab_size=4096, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden_dim=128)


def make_config(dtype: str, model: Llama3Config):
    """The run that both sides train."""
    from titan_core.config import ScheduleConfig
    from titan_metrics.config import MetricsConfig
    from titan_quant.config import MixedPrecision
    from titan_train.config import CheckpointSection, DataSection, TrainConfig, TrainingConfig

    return TrainConfig(
        model=model,
        data=DataSection(confine_attention=False),
        training=TrainingConfig(seq_len=SEQ_LEN, global_batch_size=BATCH, steps=10**6),
        schedule=ScheduleConfig(total_steps=10**6),
        precision=MixedPrecision(param_dtype="bfloat16") if dtype == "bf16" else MixedPrecision(),
        device="cpu",
        checkpoint=CheckpointSection(enabled=False),
        metrics=MetricsConfig(console=False),
    )


def titan_side(dtype: str, model: Llama3Config = MODEL):
    """Returns a function that takes one of our steps."""
    from titan_data.dataset import open_dataset
    from titan_train.environment import environment
    from titan_train.recorder import Recorder
    from titan_train.trainer import Trainer
    from titan_train.votes import Votes

    config = make_config(dtype, model)
    with environment(config) as env:
        trainer = Trainer(config, env, open_dataset(config.data), {}, Recorder(config, env))
        return lambda: trainer.step(Votes())


def plain_side(dtype: str, model: Llama3Config = MODEL):
    """Returns a function that takes one step of the plain loop."""
    import torch
    from torch.nn import functional as F

    from titan_data.dataset import open_dataset
    from titan_data.loader import BatchLoader

    config = make_config(dtype, model)
    loader = BatchLoader(
        open_dataset(config.data), seq_len=SEQ_LEN, global_batch_size=BATCH, seed=0, confine_attention=False, prefetch=0
    )
    batches = [next(loader) for _ in range(64)]
    built = config.model.build()
    for name, parameter in built.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(built.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    taken = 0

    def step() -> None:
        nonlocal taken
        batch = batches[taken % len(batches)]
        taken += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            logits = built(batch["tokens"], batch["positions"])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(built.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def serve(side: str, dtype: str, pipe: Connection) -> None:
    """Runs in a process of its own: for each number received takes that many steps and answers with CPU seconds."""
    import torch

    torch.set_num_threads(1)
    step = {"titan": titan_side, "plain": plain_side}[side](dtype)
    step()
    pipe.send("ready")
    while steps := pipe.recv():
        started = time.process_time()
        for _ in range(steps):
            step()
        pipe.send(time.process_time() - started)
    pipe.send(peak_memory())


def peak_memory() -> int:
    """Largest resident set of this process in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def compare_steps(dtype: str, rounds: int, steps: int) -> None:
    """Prints tokens per CPU-second of both sides, their ratio, and peak memory."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in ("titan", "plain"):
        pipes[side], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(side, dtype, theirs)))
        processes[-1].start()
        pipes[side].recv()
    rates: dict[str, list[float]] = {"titan": [], "plain": []}
    for i in range(rounds):
        order = ("titan", "plain") if i % 2 else ("plain", "titan")
        for side in order:
            pipes[side].send(steps)
            rates[side].append(steps * BATCH * SEQ_LEN / pipes[side].recv())
    memory = {}
    for side, pipe in pipes.items():
        pipe.send(0)
        memory[side] = pipe.recv()
    for process in processes:
        process.join()
    for side, values in rates.items():
        print(f"  {side}: {spread(values, ',.0f')} tokens per CPU-second, peak memory {memory[side] / 2**20:,.0f} MiB")
    ratios = [ours / theirs for ours, theirs in zip(rates["titan"], rates["plain"], strict=True)]
    print(f"  speed: {spread(ratios, '.3f')} of the plain loop", end="")
    print(f"; memory: {memory['titan'] / memory['plain']:.2f} of the plain loop" if all(memory.values()) else "")


def compare_startup(rounds: int) -> None:
    """Prints the wall time from command to the end of the first step and of the process, both sides in turns."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        from titan_train.config_file import to_json

        config.write_text(to_json(make_config("fp32", SMALL)))
        ours = ["titan-train", "--config", str(config), "--training.steps", "1", "--output", f"{folder}/run"]
        theirs = [sys.executable, __file__, "--plain-once"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
        seconds: dict[str, list[float]] = {"titan": [], "plain": []}
        for i in range(rounds + 1):
            for side, command in (("titan", ours), ("plain", theirs)):
                started = time.perf_counter()
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                if i:  # the first fills the caches of both
                    seconds[side].append(time.perf_counter() - started)
    for side, values in seconds.items():
        print(f"  {side}: {spread(values, '.2f')} s")
    ratios = [ours / theirs for ours, theirs in zip(seconds["titan"], seconds["plain"], strict=True)]
    print(f"  time: {spread(ratios, '.2f')} of the plain loop's")


def spread(values: list[float], form: str) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:{form}} [{low:{form}}, {high:{form}}]"


def main() -> None:
    """Parses the command line and runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["step", "startup"], choices=["step", "startup"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=24, help="turns of each side")
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn")
    parser.add_argument("--plain-once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain_once:
        plain_side("fp32", SMALL)()
        return
    for dtype in arguments.dtypes if "step" in arguments.parts else ():
        print(
            f"step, {dtype}, {SEQ_LEN} x {BATCH} tokens, 1 thread, {arguments.rounds} turns of {arguments.steps} steps"
        )
        compare_steps(dtype, arguments.rounds, arguments.steps)
    if "startup" in arguments.parts:
        print(f"from command to the end of the first step and of the process, small model, {arguments.rounds} turns")
        compare_startup(arguments.rounds)


if __name__ == "__main__":
    main()
