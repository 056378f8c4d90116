"""titan-convert against `cp` and against safetensors: seconds and memory for a Llama of a given size.

    uv run python benchmarks/conversion.py --gigabytes 2 8 --rounds 3

For each size a folder of random numbers in Hugging Face's format is made (float32, one shard for 5 GB). Then, in turns,
in each round, each in a process of its own and into an empty place:

    cp             the same bytes, file by file
    safetensors    all tensors loaded with the safetensors package and saved again, shard by shard
    hf-to-dcp      titan-convert --no-check, hashes included
    dcp-to-hf      the same back, the source compared with its manifest's hashes, and without that

None of them waits for the disk, but `sync` is called between the measurements, so that none pays for another. Seconds
leave out the start of Python and all imports. Memory is the peak of pages that no file backs (RssAnon, sampled every
5 ms), above that after the imports.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from titan_ckpt.formats.hugging_face import shards
from titan_ckpt.formats.lazy import LazyTensor
from titan_ckpt.formats.safetensors import write_safetensors
from titan_ckpt.formats.streams import create
from titan_ckpt.local_place import LocalPlace
from titan_models.facts import parameter_count, parameter_shapes
from titan_models.families.llama3 import HUGGING_FACE_KEYS, Llama3Config
from titan_models.hugging_face import to_hugging_face

CHILD = """
import sys, threading, time
import torch, titan_convert.commands, safetensors.torch
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
before = peak = anonymous()
def sample():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)
threading.Thread(target=sample, daemon=True).start()
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
print(f"{{seconds}} {{peak - before}}")
"""
SAFETENSORS = """
from pathlib import Path
from safetensors.torch import load_file, save_file
for path in sorted(Path({src!r}).glob("*.safetensors")):
    save_file(load_file(path), Path({dst!r}) / path.name)
"""
COPY = """
import subprocess
subprocess.run(["cp", "-r", {src!r}, {dst!r} + "/copy"], check=True)
"""
CONVERT = """
from titan_convert.cli import main
assert main([{command!r}, {src!r}, {dst!r} + "/out", "--no-check"]) == 0
"""

UNVERIFIED = CONVERT.replace('"--no-check"', '"--no-check", "--no-verify-hashes"')


def model_of(gigabytes: float) -> Llama3Config:
    """A Llama whose float32 weights have about that size."""
    shape = {"vocab_size": 32_768, "dim": 2048, "heads": 16, "kv_heads": 8, "head_dim": 128, "hidden_dim": 8192}
    one, two = (parameter_count(Llama3Config(layers=n, **shape)) * 4 for n in (1, 2))
    return Llama3Config(layers=max(1, round(1 + (gigabytes * 1e9 - one) / (two - one))), **shape)


def make(folder: Path, config: Llama3Config) -> int:
    """Writes the model's folder; returns its bytes."""
    tensors = {}
    noise = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))

    def random(shape: tuple[int, ...]) -> LazyTensor:
        def read(start: int, stop: int) -> torch.Tensor:
            count = (stop - start) * (shape[1] if len(shape) == 2 else 1)
            return noise.repeat(-(-count // noise.numel()))[:count].view(stop - start, *shape[1:])

        return LazyTensor(torch.float32, shape, ("noise",), read)

    for name, shape in parameter_shapes(config).items():
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        entry = HUGGING_FACE_KEYS[name.replace(f".{layer}.", ".*.", 1) if layer else name]
        tensors[(entry if isinstance(entry, str) else entry[0]).replace("*", layer)] = random(shape)
    files, index = shards(tensors, 5 * 10**9)
    for name, group in files.items():
        with create(LocalPlace(folder), name) as file:
            write_safetensors(file, group)
    for name, content in index.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(to_hugging_face(config)))
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(work: str) -> tuple[float, int]:
    """Seconds and bytes of memory of a piece of work in a new process."""
    subprocess.run(["sync"], check=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD.format(work=work)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    seconds, memory = done.stdout.splitlines()[-1].split()
    return float(seconds), int(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's folder for temporary files")
    options = parser.parse_args()
    print("| model | work | seconds, median [min, max] | of cp's throughput | of safetensors' | memory, MiB |")
    print("|---|---|---|---|---|---|")
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory(dir=options.folder) as root:
            src, back = Path(root, "src"), Path(root, "dcp")
            src.mkdir()
            size = make(src, model_of(gigabytes))
            seen: dict[str, list[tuple[float, int]]] = {}
            measure(CONVERT.format(command="hf-to-dcp", src=str(src), dst=root))
            Path(root, "out").rename(back)
            for _ in range(options.rounds):
                for name, work, source in (
                    ("cp", COPY, src),
                    ("safetensors", SAFETENSORS, src),
                    ("hf-to-dcp", CONVERT, src),
                    ("dcp-to-hf", CONVERT, back),
                    ("dcp-to-hf --no-verify-hashes", UNVERIFIED, back),
                ):
                    dst = Path(root, "dst")
                    dst.mkdir()
                    seen.setdefault(name, []).append(
                        measure(work.format(command=name.split()[0], src=str(source), dst=str(dst)))
                    )
                    shutil.rmtree(dst)
            report(size, seen)
            time.sleep(1)


def report(size: int, seen: dict[str, list[tuple[float, int]]]) -> None:
    """Prints a row for each kind of work; the ratios are medians of those within a round."""
    for name, found in seen.items():
        seconds = [each[0] for each in found]
        spread = f"{statistics.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]"
        ratios = [
            statistics.median(other[0] / own[0] for other, own in zip(seen[base], found, strict=True))
            for base in ("cp", "safetensors")
        ]
        memory = max(each[1] for each in found) / 2**20
        print(f"| {size / 1e9:.2f} GB | {name} | {spread} | {ratios[0]:.2f} | {ratios[1]:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
