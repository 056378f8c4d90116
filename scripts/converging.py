"""Loss curves of one small experiment on several layouts: the figure and the table of docs/converging.md.

    uv run --group docs python scripts/converging.py --output docs/images/converging.svg

Trains every layout of `EXPERIMENTS` with torchrun on this machine's CPU, one after another, each in a directory of its
own below `--runs`, where a run that is finished is not done again. Then it draws the curves and prints the table. It
downloads no data: the text is Python's own standard library.
"""

import argparse
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is computed, and the layouts on which it is."""

    flags: str
    layouts: Mapping[str, tuple[int, str]]
    """Name -> number of ranks, and flags; the others are held against the first."""


_SMALL = (
    "--model.vocab-size 2048 --data.vocab-size 2048 --model.dim 128 --model.layers 4 --model.heads 4 "
    "--model.kv-heads 2 --model.hidden-dim 384 --training.seq-len 128 --device cpu "
    "--metrics.log-every 1 --metrics.no-console"
)
_EXPERTS = f"--module qwen3 --config qwen3_debug_moe --model.moe.hidden-dim 96 {_SMALL}"
EXPERIMENTS: Mapping[str, Experiment] = {
    "dense": Experiment(
        flags=f"--config llama3_debug {_SMALL}",
        layouts={
            "one process": (1, ""),
            "fsdp 2": (2, "--parallel.dp-shard 2"),
            "tp 2": (2, "--parallel.tp 2"),
            "cp 2": (2, "--parallel.cp 2"),
            "pp 2, 1F1B": (2, "--parallel.pp 2"),
            "fsdp 2 x tp 2": (4, "--parallel.dp-shard 2 --parallel.tp 2"),
        },
    ),
    "experts": Experiment(
        flags=_EXPERTS,
        layouts={"one process": (1, ""), "ep 2": (2, "--parallel.ep 2")},
    ),
    "experts, float64": Experiment(
        flags=f"{_EXPERTS} --precision.master-dtype float64",
        layouts={"one process": (1, ""), "ep 2": (2, "--parallel.ep 2")},
    ),
}

Train = Callable[[int, Sequence[str]], object]
Curves = Mapping[str, list[float]]
"""Layout -> the loss of each step; the first layout is the one that others are held against."""


def torchrun(ranks: int, arguments: Sequence[str]) -> None:
    """Runs titan-train on so many new processes of one thread each.

    Raises:
        CalledProcessError: if it fails; what it said went to standard error.
    """
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, "-m", "titan_train", *arguments]
    print(shlex.join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def measure(experiment: Experiment, steps: int, runs: Path, train: Train, extra: Sequence[str] = ()) -> Curves:
    """Trains on each layout, in `runs`, unless that is done; `extra` flags go to every run."""
    curves = {}
    for name, (ranks, layout) in experiment.layouts.items():
        output = runs / _folder(name)
        flags = [*shlex.split(f"{experiment.flags} {layout}"), *extra, f"--training.steps={steps}"]
        train(ranks, [*flags, f"--output={output}"])
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [line["loss"] for line in lines]
        if len(curves[name]) != steps:
            raise RuntimeError(f"{output} has {len(curves[name])} steps instead of {steps}; delete it and start again.")
    return curves


def _folder(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def differences(curves: Curves) -> Curves:
    """|loss - that of the first layout| / that of the first layout, step by step, of the other layouts."""
    base, *others = curves
    return {
        name: [abs(own - first) / first for own, first in zip(curves[name], curves[base], strict=True)]
        for name in others
    }


def table(experiments: Mapping[str, Curves]) -> str:
    """Markdown: a row for each layout."""
    rows = ["| model | layout | ranks | last loss | largest relative difference |", "|---|---|---|---|---|"]
    for model, curves in experiments.items():
        relative = differences(curves)
        for name, losses in curves.items():
            ranks = EXPERIMENTS[model].layouts[name][0]
            largest = f"{max(relative[name]):.1e}" if name in relative else ""
            rows.append(f"| {model} | {name} | {ranks} | {losses[-1]:.6f} | {largest} |")
    return "\n".join(rows)


def draw(experiments: Mapping[str, Curves], path: Path) -> None:
    """Writes an SVG: above the curves, below how far they have been from the first one so far."""
    # The same curves make the same file, whose text stays text.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "titan", "path.simplify_threshold": 1})
    plt.rcParams.update({"font.size": 8, "font.sans-serif": ["DejaVu Sans"]})
    figure, axes = plt.subplots(2, len(experiments), figsize=(10, 6), sharex=True, squeeze=False, layout="constrained")
    for column, (model, curves) in enumerate(experiments.items()):
        above, below = axes[0, column], axes[1, column]
        for name, losses in curves.items():
            above.plot(range(1, len(losses) + 1), losses, label=name, linewidth=1)
        for color, relative in enumerate(differences(curves).values(), start=1):
            so_far = list(itertools.accumulate(relative, max))
            below.plot(range(1, len(so_far) + 1), so_far, linewidth=1, color=f"C{color}")
        above.locator_params(nbins=5)
        above.set(title=model, ylabel="loss")
        below.set(yscale="log", xlabel="step", ylabel="largest relative difference from one process")
        below.minorticks_off()
        above.legend()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A tenth of a point is fine enough, and a file in version control should be small.
    path.write_text(re.sub(r"\s*\n\s*", "\n", re.sub(r"(\d\.\d)\d+", r"\1", drawn.getvalue())))


def main(arguments: Sequence[str] | None = None, train: Train = torchrun) -> None:
    """Trains, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="SVG to write")
    parser.add_argument("--runs", type=Path, default=Path("runs/converging"), help="default: runs/converging")
    parser.add_argument("--steps", type=int, default=200, help="of each run; default: 200")
    chosen, extra = parser.parse_known_args(arguments)
    found = {
        name: measure(experiment, chosen.steps, chosen.runs / _folder(name), train, extra)
        for name, experiment in EXPERIMENTS.items()
    }
    draw(found, chosen.output)
    print(table(found))


if __name__ == "__main__":
    main()
