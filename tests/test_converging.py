"""scripts/converging.py on a model that is tiny; docs/converging.md shows what it drew and printed."""

import functools
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import command_runs
from commands import Command

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import converging  # noqa: E402  (it is no package)

TINY = """
    --model.vocab-size 300 --data.vocab-size 300 --model.dim 32 --model.layers 2 --model.head-dim 8
    --model.hidden-dim 48 --training.seq-len 32 --checkpoint.no-enabled
"""


def train(folder, ranks, arguments):
    command_runs.run(Command(text="", program="titan-train", arguments=tuple(arguments), ranks=ranks), folder)


@pytest.mark.slow
def test_layouts_are_trained_drawn_and_listed(corpus, tmp_path, capsys):
    flags = [*TINY.split(), "--data.source", str(corpus)]
    picture = tmp_path / "curves.svg"
    options = ["--output", str(picture), "--runs", str(tmp_path / "runs"), "--steps", "4"]
    converging.main([*options, *flags], functools.partial(train, tmp_path))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    names = [(model, layout) for model, found in converging.EXPERIMENTS.items() for layout in found.layouts]
    assert [(row[0], row[1]) for row in rows] == names
    differences = {(row[0], row[1]): float(row[4]) for row in rows if len(row) == 5}
    assert len(differences) == len(names) - len(converging.EXPERIMENTS)
    assert max(value for (model, _), value in differences.items() if model == "dense") < 1e-6
    assert differences["experts, float64", "ep 2"] < 1e-13
    drawn = " ".join(ElementTree.parse(picture).getroot().itertext())
    assert all(layout in drawn for _, layout in names)


def test_a_run_that_is_not_whole_is_named(tmp_path):
    def nothing(ranks, arguments):
        output = Path(arguments[-1].removeprefix("--output="))
        output.mkdir(parents=True)
        (output / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')

    with pytest.raises(RuntimeError, match=r"one-process has 1 steps instead of 4; delete it"):
        converging.measure(converging.EXPERIMENTS["dense"], 4, tmp_path, nothing)


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "converging.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\d) \| [\d.]+ \| ([\d.e-]*) +\|$", page, re.MULTILINE)
    listed = [(model, layout, int(ranks)) for model, layout, ranks, _ in rows]
    assert listed == [
        (model, layout, ranks)
        for model, found in converging.EXPERIMENTS.items()
        for layout, (ranks, _) in found.layouts.items()
    ]
    picture = ROOT / "docs" / "images" / "converging.svg"
    assert picture.stat().st_size < 60_000
    drawn = " ".join(ElementTree.parse(picture).getroot().itertext())
    assert all(layout in drawn for _, layout, _ in listed)
