"""`titan-train --explain`: a layout explained without its ranks."""

import re

import pytest

from titan_models.shape import MoEConfig
from titan_train.explain import explain, explanation_text
from training_runs import TINY, change, layout, titan_train

TINY_FLAGS = """
    --model.vocab-size 300 --model.dim 32 --model.layers 4 --model.heads 4 --model.kv-heads 2 --model.head-dim 8
    --model.hidden-dim 64 --training.seq-len 16 --training.global-batch-size 8 --training.micro-batch-size 1
"""
PROGRESS = r".+: \d+ of \d+ done after \d+ s\n"  # on a busy machine


def test_the_command_explains_a_pipeline_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--parallel.pp", 2, "--parallel.tp", 2, "--remat.mode", "full", "--data.source", "nowhere"]
    done = titan_train("--explain", "--world-size", 8, *TINY_FLAGS.split(), *flags)
    assert (done.returncode, re.sub(PROGRESS, "", done.stderr)) == (0, "")
    text = re.sub(r" {2,}", " ", done.stdout)
    for expected in (
        "data: pp 2 x dp_replicate 1 x dp_shard 2 x cp 1 x tp 2",
        "tp: ranks 4-5 (stride 1)",
        "activations recomputed in backward (full)",
        "layers.*.attention.wq.weight (4 equal) [32, 32] [fsdp: S(0), tp: S(0)] -> [8, 32] float32 a rank",
        "stage 0 on pp rank 0 (ranks 0-3): tok_embeddings, layers.0 to",
        "bubble 20.0%",
        "pp rank 1 .. F0 B0 -- F1 B1 --",
        "hidden states to the next stage, gradients to the one before",
    ):
        assert expected in text
    assert list(tmp_path.iterdir()) == []


def test_an_explanation_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    moe = MoEConfig(experts=4, hidden_dim=16)
    config = change(TINY, **{"model.layers": 4, "model.moe": moe, **layout(pp=2, tp=2, dp_replicate=2, cp=2, ep=2)})
    lines = explanation_text(config, 16).splitlines()
    assert max(map(len, lines)) <= 80
    # What does not fit beside is beneath.
    name = next(i for i, line in enumerate(lines) if "layers.*.attention.wq.weight" in line)
    assert lines[name].split() == ["layers.*.attention.wq.weight", "(4", "equal)"]
    assert lines[name + 1].strip().startswith("[32, 32] [dp_replicate: R, fsdp: S(0), tp: S(0)] -> [8, 32] float32")


def test_every_stage_is_looked_at():
    config = change(TINY, **{"model.layers": 4, "training.micro_batch_size": 3, **layout(pp=4)})
    found = explain(config, 4)
    counts = {line.pattern: line.count for line in found.parameters}
    assert counts["layers.*.attention.wq.weight"] == 4
    assert counts["tok_embeddings.weight"] == counts["lm_head.weight"] == 1
    assert [stage.rank for stage in found.stages] == [0, 1, 2, 3]
    assert sum(stage.cost_share for stage in found.stages) == pytest.approx(1)
    # Traffic is that of the costliest stage, the last.
    assert found.rank == 3
    assert {flow.axis for flow in found.traffic} == {"pp"}


def test_one_rank_sends_nothing():
    found = explain(TINY, 1)
    assert (found.views, found.stages, found.timeline, found.traffic) == ((), (), None, ())
    assert {treatment.role for treatment in found.roles} >= {"embedding", "block", "head"}


def test_even_routing_is_said_to_be_assumed():
    config = change(TINY, **{"model.moe": MoEConfig(experts=4, hidden_dim=16), **layout(ep=2)})
    found = explain(config, 2)
    moved = {flow.dtype: flow for flow in found.traffic if flow.cause == "tokens to their experts and back"}
    # Two layers: counts, rows there and back, and the gradients of both.
    assert {dtype: flow.count for dtype, flow in moved.items()} == {"int64": 2, "float32": 2 * 4}
    half_of_the_copies = 6 * 32 * 2 // 2
    assert moved["float32"].sent_bytes == 2 * 4 * half_of_the_copies * 32 * 4
    assert moved["int64"].sent_bytes == 2 * 2 * 8
