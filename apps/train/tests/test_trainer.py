"""The real trainer on a GPU; `tests/` has what runs on a CPU, since it needs all packages."""

import json

import pytest

from titan_train.cli import run

FLAGS = [
    "--model.dim=64",
    "--model.layers=2",
    "--model.hidden-dim=128",
    "--training.seq-len=64",
    "--training.steps=5",
    "--metrics.log-every=1",
    "--metrics.no-console",
]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [[], ["--precision.param-dtype=bfloat16"]])
def test_a_run_on_a_gpu_follows_the_one_on_the_cpu(tmp_path, precision):
    losses = {}
    for device in ("cpu", "cuda"):
        output = tmp_path / device
        assert run([*FLAGS, *precision, f"--device={device}", f"--output={output}"]) == 0
        lines = (output / "metrics.jsonl").read_text().splitlines()
        losses[device] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["cuda"]) == 5
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2 if precision else 1e-3)
