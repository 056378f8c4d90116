"""Every degree, size and schedule that does not fit is refused in words that name it and what would work."""

import dataclasses
import re
import subprocess
import sys

import pytest

from titan_core.config import CompileConfig, ParallelConfig, RematConfig
from titan_core.degrees import resolve_degrees
from titan_core.limits import Shapes, limit_problems

SHAPES = Shapes(heads=8, kv_heads=4, layers=8, vocab_size=96, seq_len=64, micro_batches=8)
MIXTURE = dataclasses.replace(SHAPES, experts=8)


def problems(world_size, shapes=SHAPES, *, device="cpu", remat=RematConfig(), compiling=CompileConfig(), **layout):
    config = ParallelConfig(**layout)
    degrees = resolve_degrees(config, world_size)
    return limit_problems(config, degrees, shapes, remat=remat, compiling=compiling, device=device)


FITTING = [
    (1, SHAPES, {}),
    (8, SHAPES, {"tp": 4, "reshard_after_forward": "never"}),
    (2, SHAPES, {"pp": 2, "reshard_after_forward": "always"}),
    (8, SHAPES, {"reshard_after_forward": 4}),
    (8, SHAPES, {"cp": 4, "cp_method": "ulysses"}),
    (8, SHAPES, {"tp": 2, "cp": 2, "pp": 2, "pp_schedule": "DualPipeV"}),
    (8, MIXTURE, {"tp": 2, "ep": 8}),
    (8, SHAPES, {"pp": 4, "pp_schedule": "Interleaved1F1B"}),
    (2, SHAPES, {"pp": 2, "pp_split": ("layers.3",)}),
    (4, SHAPES, {"pp": 4, "pp_schedule": "LoopedBFS", "pp_stages_per_rank": 1}),
]


@pytest.mark.parametrize(("world_size", "shapes", "layout"), FITTING)
def test_what_fits_is_not_refused(world_size, shapes, layout):
    assert problems(world_size, shapes, **layout) == []


def few(**changes):
    return dataclasses.replace(SHAPES, **changes)


REFUSED = [
    (8, SHAPES, {"tp": 8}, r"parallel\.tp 8 does not divide model\.kv_heads 4; use one of \[1, 2, 4\]"),
    (4, few(heads=6, kv_heads=6), {"tp": 4}, r"parallel\.tp 4 does not divide model\.heads 6"),
    (4, few(vocab_size=5), {"tp": 4}, r"parallel\.tp 4 leaves a rank without a row of the model\.vocab_size 5"),
    (4, few(seq_len=66), {"tp": 4}, r"^parallel\.tp 4 cuts a sequence into 4 parts, .*66; .*sequence_parallel off"),
    (8, few(seq_len=66), {"tp": 4, "cp": 2}, r"parallel\.tp 4 x parallel\.cp 2 cut a sequence into 8 parts"),
    (4, few(seq_len=66, experts=8), {"tp": 4}, r"use a multiple of 4, or lower parallel\.tp\.$"),
    (2, SHAPES, {"sequence_parallel": False}, r"sequence_parallel is switched off, but there is no tensor parallelism"),
    (2, SHAPES, {"async_tp": True}, r"async_tp has no effect without tensor parallelism"),
    (2, SHAPES, {"tp": 2, "async_tp": True}, r"needs GPUs whose memory the others can read.*this run is on cpu"),
    (
        2,
        SHAPES,
        {"tp": 2, "async_tp": True, "device": "cuda"},
        r"async_tp is done by the compiler; add --compile.enabled",
    ),
    (
        2,
        SHAPES,
        {"tp": 2, "async_tp": True, "device": "cuda", "sequence_parallel": False},
        r"overlaps what sequence parallelism sends",
    ),
    (
        2,
        SHAPES,
        {"tp": 2, "async_tp": True, "device": "cuda", "compiling": CompileConfig(enabled=True, backend="aot_eager")},
        r"async_tp is done by inductor, not by aot_eager",
    ),
    (2, few(seq_len=62), {"cp": 2}, r"parallel\.cp 2 cuts a sequence into 4 parts to balance the load.*multiple of 4"),
    (
        2,
        few(seq_len=63),
        {"cp": 2, "cp_load_balance": False},
        r"into 2 parts, which does not divide training\.seq_len 63",
    ),
    (
        8,
        SHAPES,
        {"cp": 8, "cp_method": "ulysses"},
        r"ulysses spreads the 4 model\.kv_heads of each tp rank over 8 ranks",
    ),
    (2, SHAPES, {"cp_method": "ulysses"}, r"cp_method is set, but there is no context parallelism"),
    (2, SHAPES, {"cp_load_balance": False}, r"cp_load_balance is set, but there is no context parallelism"),
    (2, SHAPES, {"ep": 2}, r"parallel\.ep is 2, but this model has no experts"),
    (6, MIXTURE, {"ep": 3}, r"parallel\.ep 3 does not divide the 8 experts of model\.moe; use one of \[1, 2, 4, 8\]"),
    (
        4,
        MIXTURE,
        {"tp": 2, "sequence_parallel": False},
        r"the same tokens to the experts; .*multiple of 2, or set parallel\.tp to 1",
    ),
    (8, SHAPES, {"tp": 2, "reshard_after_forward": 2}, r"works with dp_replicate, dp_shard and cp only"),
    (8, SHAPES, {"pp": 2, "reshard_after_forward": 2}, r"works with dp_replicate, dp_shard and cp only"),
    (4, MIXTURE, {"ep": 2, "reshard_after_forward": 2}, r"works with dp_replicate, dp_shard and cp only"),
    (1, SHAPES, {"reshard_after_forward": "always"}, r"reshard_after_forward has no effect on one process"),
    (1, SHAPES, {"grad_sync": "every"}, r"grad_sync has no effect on one process"),
    (8, SHAPES, {"reshard_after_forward": 3}, r"reshard_after_forward 3 is no part of the 8 ranks.*\[2, 4\]"),
    (
        2,
        SHAPES,
        {"reshard_after_forward": 2},
        r"reshard_after_forward 2 is no part of the 2 ranks.*use always or never",
    ),
    (2, SHAPES, {"cpu_offload": True}, r"cpu_offload has no effect on a CPU"),
    (
        1,
        SHAPES,
        {"cpu_offload": True, "device": "cuda"},
        r"cpu_offload works through FSDP, which needs at least 2 ranks",
    ),
    (2, SHAPES, {"pp_schedule": "GPipe"}, r"parallel\.pp_schedule is set, but there is no pipeline"),
    (2, SHAPES, {"pp_split": ("layers.1",)}, r"parallel\.pp_split is set, but there is no pipeline"),
    (2, SHAPES, {"pp_stages_per_rank": 2}, r"parallel\.pp_stages_per_rank is set, but there is no pipeline"),
    (2, SHAPES, {"pp_schedule_csv": "x.csv"}, r"parallel\.pp_schedule_csv is set, but there is no pipeline"),
    (2, SHAPES, {"pp": 2, "pp_schedule_csv": "no.csv"}, r"pp_schedule_csv no\.csv cannot be read"),
    (2, SHAPES, {"pp": 2, "pp_stages_per_rank": 0}, r"pp_stages_per_rank is 0; it must be at least 1"),
    (2, SHAPES, {"pp": 2, "pp_stages_per_rank": 2}, r"pp_stages_per_rank is 2, but 1F1B works with 1 only"),
    (
        2,
        SHAPES,
        {"pp": 2, "pp_schedule": "ZBVZeroBubble", "pp_stages_per_rank": 1},
        r"pp_stages_per_rank is 1, but ZBVZeroBubble works with 2 only",
    ),
    (8, few(layers=6), {"pp": 8}, r"The pipeline has 8 stages, but the model only 6 layers; lower parallel\.pp\.$"),
    (
        4,
        few(layers=6),
        {"pp": 4, "pp_schedule": "ZBVZeroBubble"},
        r"ZBVZeroBubble needs 2 a rank; lower parallel\.pp, or use a schedule with one stage a rank, such as 1F1B",
    ),
    (
        4,
        few(layers=6),
        {"pp": 4, "pp_schedule": "LoopedBFS"},
        r"has 8 stages, but the model only 6 layers; lower parallel\.pp_stages_per_rank or parallel\.pp\.$",
    ),
    (2, SHAPES, {"pp": 2, "pp_split": ("layers.1", "layers.2")}, r"names 2 blocks, but 2 stages begin at 1 of them"),
    (4, few(micro_batches=2), {"pp": 4}, r"1F1B with 4 stages needs at least 4 micro-batches a step, but there are 2"),
    (2, few(micro_batches=3), {"pp": 2, "pp_schedule": "DualPipeV"}, r"DualPipeV with 4 stages needs at least 4"),
    (
        2,
        few(micro_batches=5),
        {"pp": 2, "pp_schedule": "Interleaved1F1B"},
        r"cannot run 5 micro-batches.*multiple of 2",
    ),
    (2, few(micro_batches=5), {"pp": 2, "pp_schedule": "InterleavedZeroBubble"}, r"cannot run 5 micro-batches"),
    (2, few(tied=True), {"pp": 2}, r"model\.tie_embeddings lets them share a weight"),
    (4, SHAPES, {"pp": 2, "grad_sync": "every"}, r"A pipeline reduces gradients once a step"),
]


@pytest.mark.parametrize(("world_size", "shapes", "layout", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(world_size, shapes, layout, message):
    found = problems(world_size, shapes, **layout)
    assert any(re.search(message, problem) for problem in found), found


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"remat": RematConfig(mode="full", every=0)}, r"remat\.every is 0; it must be at least 1"),
        ({"remat": RematConfig(every=2)}, r"remat\.every has no effect with --remat\.mode none"),
        (
            {"remat": RematConfig(mode="full", save_ops=("aten.mm",))},
            r"remat\.save_ops has no effect with --remat\.mode",
        ),
        ({"remat": RematConfig(mode="budget", budget=2)}, r"remat\.budget is 2; it must lie between 0 and 1"),
        ({"remat": RematConfig(mode="budget")}, r"remat\.mode budget is done by the compiler"),
        (
            {"compiling": CompileConfig(fullgraph=True)},
            r"compile\.fullgraph have no effect without --compile\.enabled; add it, or drop them\.$",
        ),
    ],
)
def test_recomputation_and_compilation_that_would_do_nothing_are_refused(layout, message):
    assert any(re.search(message, problem) for problem in problems(2, **layout))


COMPILED = CompileConfig(enabled=True)
WHOLE = CompileConfig(enabled=True, fullgraph=True)


@pytest.mark.parametrize(
    ("world_size", "shapes", "layout", "message"),
    [
        (
            2,
            SHAPES,
            {"pp": 2, "pp_schedule": "ZBVZeroBubble", "compiling": COMPILED},
            r"which compiled blocks cannot do",
        ),
        (
            2,
            SHAPES,
            {"pp": 2, "pp_schedule": "DualPipeV", "remat": RematConfig(mode="selective")},
            r"selective recomputation runs a block's backward only once",
        ),
        (
            2,
            SHAPES,
            {"pp": 2, "pp_schedule": "InterleavedZeroBubble", "reshard_after_forward": "always"},
            r"when parameters that are resharded are gone",
        ),
        (2, SHAPES, {"cp": 2, "compiling": WHOLE}, r"cp_method ring cannot be compiled"),
        (2, MIXTURE, {"ep": 2, "compiling": WHOLE}, r"the host reads how many tokens to send"),
    ],
)
def test_techniques_that_exclude_each_other_are_refused(world_size, shapes, layout, message):
    assert any(re.search(message, problem) for problem in problems(world_size, shapes, **layout))


def test_a_schedule_that_splits_the_backward_names_everything_it_excludes():
    found = problems(2, pp=2, pp_schedule="ZBVZeroBubble", compiling=COMPILED, remat=RematConfig(mode="selective"))
    assert len(found) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0F0,0B0", "1F0,1B0"], None),
        (["0F0,0I0,0W0", ",1F0,1B0"], None),
        (["0F0,0B0"], r"has 1 line, but parallel\.pp is 2"),
        (["0F0,0B0", "0F0,0B0"], r"has the stages \[\[0\], \[0\]\] on its lines; 2 stages need each of 0 to 1"),
        (["0F0", "1F0,1B0"], r"must have once each 0F0, and 0B0 or both 0I0 and 0W0; 1 such are missing or doubled"),
        (["0F0,0B0,0B0", "1F0,1B0"], r"missing or doubled"),
        (["0F0,0B0,0F1,0B1", "1F0,1B0,1F1,1B1"], r"has micro-batches beyond the 1 that a rank computes a step"),
        (["0F0,0X0", "1F0,1B0"], r"'0X0' in line 1 is no action; write actions such as 0F0"),
    ],
)
def test_schedules_from_files(tmp_path, rows, message):
    path = tmp_path / "schedule.csv"
    path.write_text("\n".join(rows) + "\n")
    found = problems(2, few(micro_batches=1), pp=2, pp_schedule_csv=str(path))
    assert found == [] if message is None else re.search(message, " ".join(found)), found
    if "0I0" in rows[0]:
        assert problems(2, few(micro_batches=1), pp=2, pp_schedule_csv=str(path), compiling=COMPILED)
    assert "has no effect beside" in " ".join(
        problems(2, few(micro_batches=1), pp=2, pp_schedule_csv=str(path), pp_schedule="GPipe")
    )


def test_a_schedule_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "schedule.csv").write_bytes(b"\xff\xfe\x00")
    (problem,) = problems(2, pp=2, pp_schedule_csv=str(tmp_path / "schedule.csv"))
    assert "cannot be read" in problem


def test_limits_can_be_checked_without_torch():
    code = "import sys, titan_core.limits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
