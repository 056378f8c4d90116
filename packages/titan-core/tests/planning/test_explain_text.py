from dataclasses import replace

import pytest

from titan_core.planning.explain import Axis, Explanation, Parameters, RoleTreatment, Stage, View
from titan_core.planning.explain_text import render
from titan_core.planning.timeline import play
from titan_core.planning.traffic import Flow
from titan_core.text import human, terminal_width, wrap

EXPLANATION = Explanation(
    world_size=16,
    rank=8,
    views=(
        View(
            name="dense",
            axes=(
                Axis(name="pp", ranks=(0, 8)),
                Axis(name="dp_replicate", ranks=(8,)),
                Axis(name="fsdp", ranks=(8, 9, 10, 11, 12, 13, 14, 15)),
            ),
        ),
    ),
    roles=(RoleTreatment(role="norm", modules=2, techniques=("is left alone",)),),
    parameters=(
        Parameters(
            pattern="layers.*.norm.weight",
            role="norm",
            shape=(16,),
            local_shape=(2,),
            dtype="float32",
            placements=(("fsdp", "S(0)"),),
            count=2,
        ),
    ),
    stages=(
        Stage(number=0, rank=0, modules=("embed", "layers.0", "layers.1"), cost_share=0.6, parameters=1000),
        Stage(number=1, rank=1, modules=("layers.2", "norm"), cost_share=0.4, parameters=10),
    ),
    timeline=play({0: [(0, "F", 0), (0, "B", 0)], 1: [(1, "F", 0), (1, "B", 0)]}),
    traffic=(
        Flow(axis="pp", kind="send", cause="hidden states", dtype="float32", count=1, sent_bytes=10, received_bytes=0),
        Flow(
            axis="fsdp",
            kind="all-gather",
            cause="parameters",
            dtype="bfloat16",
            count=1200,
            sent_bytes=2048,
            received_bytes=2048,
        ),
    ),
)

TEXT = """\
mesh
  16 ranks; neighbours as rank 8 has them
  dense: pp 2 x dp_replicate 1 x fsdp 8
    pp: ranks 0, 8 (stride 8)
    fsdp: ranks 8-15 (stride 1)

roles
  norm (2 modules):
    - is left alone
    layers.*.norm.weight (2 equal)  [16] [fsdp: S(0)] -> [2] float32 a rank

pipeline stages
  stage 0 on pp rank 0 (ranks 0-7): embed, layers.0 to 1, 60.0% of the cost, 1,000 parameters
  stage 1 on pp rank 1 (ranks 8-15): layers.2, norm, 40.0% of the cost, 10 parameters

pipeline schedule
  bubble 50.0%: the share of time in which ranks wait
  (if a backward takes two forwards, all stages cost the same, and sending costs nothing)
  pp rank 0 F0 .. .. .. B0 --
  pp rank 1 .. F0 B0 -- .. ..

collectives a step
  of rank 8; bytes are those it sends to others and receives from them around a ring
  axis  kind        of        count      sent  received  why
  fsdp  all-gather  bfloat16  1,200  2.00 KiB  2.00 KiB  parameters
  pp    send        float32       1      10 B       0 B  hidden states
  all                         1,201  2.01 KiB  2.00 KiB"""


def test_an_explanation_reads_as_sections():
    assert render(EXPLANATION) == TEXT


NARROW = """\
mesh
  16 ranks; neighbours as rank 8 has them
  dense: pp 2 x dp_replicate 1 x fsdp 8
    pp: ranks 0, 8 (stride 8)
    fsdp: ranks 8-15 (stride 1)

roles
  norm (2 modules):
    - is left alone
    layers.*.norm.weight (2 equal)
        [16] [fsdp: S(0)] -> [2] float32 a rank

pipeline stages
  stage 0 on pp rank 0 (ranks 0-7): embed, layers.0 to
      1, 60.0% of the cost, 1,000 parameters
  stage 1 on pp rank 1 (ranks 8-15): layers.2, norm,
      40.0% of the cost, 10 parameters

pipeline schedule
  bubble 50.0%: the share of time in which ranks wait
  (if a backward takes two forwards, all stages cost the
      same, and sending costs nothing)
  pp rank 0 F0 .. .. .. B0 --
  pp rank 1 .. F0 B0 -- .. ..

collectives a step
  of rank 8; bytes are those it sends to others and
      receives from them around a ring
  axis  kind        of        count      sent  received
      why
  fsdp  all-gather  bfloat16  1,200  2.00 KiB  2.00 KiB
      parameters
  pp    send        float32       1      10 B       0 B
      hidden states
  all                         1,201  2.01 KiB  2.00 KiB"""


def test_what_does_not_fit_a_line_goes_beneath():
    assert render(EXPLANATION, 56) == NARROW


def test_a_stage_on_one_rank_names_it():
    alone = replace(EXPLANATION, world_size=2)
    assert "stage 1 on pp rank 1 (rank 1): layers.2" in render(alone)


def test_lines_are_wrapped_but_words_stay_whole():
    assert wrap("  one two three", 9) == "  one two\n      three"
    assert wrap("  one", 5) == "  one"
    assert wrap("- abcdefghijk l", 6) == "-\n    abcdefghijk\n    l"


def test_the_terminal_says_how_wide_lines_are(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal_width() == 80
    monkeypatch.setenv("COLUMNS", "1000")
    assert terminal_width() == 200


def test_one_rank_has_little_to_explain():
    alone = Explanation(world_size=1, rank=0, views=(), roles=(), parameters=())
    assert render(alone) == "mesh\n  1 rank: nothing is shared"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**30, "1.00 GiB"), (2**62, "4096.00 PiB")]
)
def test_bytes_for_a_person(size, text):
    assert human(size) == text
