"""Every kind of data through whole runs: the same batches on any layout, across restarts, and what is refused."""

import json
import sqlite3
from pathlib import Path

import pytest

from titan_data.mixture_config import MixtureConfig, WeightChange
from titan_data.sft_config import SFTConfig
from titan_data.stream_config import StreamConfig
from titan_train.config import DataSection, TrainConfig
from titan_train.config_file import to_json
from training_runs import TINY, change, curve, layout, metrics, samples, titan_train, train

POEM = "Whose woods these are I think I know. His house is in the village though. "
OTHER = "He will not see me stopping here to watch his woods fill up with snow. "


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpora")
    for name, text in (("poem", POEM), ("other", OTHER)):
        lines = [json.dumps({"text": text * (1 + i % 5)}) for i in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {name: str(folder / f"{name}.jsonl") for name in ("poem", "other")}


@pytest.fixture(scope="module")
def kinds(corpora: dict[str, str]) -> dict[str, DataSection]:
    mixture = MixtureConfig(
        sources=corpora,
        weights={"poem": 3.0, "other": 1.0},
        changes=(WeightChange(step=4, weights={"poem": 1.0, "other": 1.0}),),
        block_size=12,
    )
    return {
        "text": change(TINY.data, source=corpora["poem"]),
        "mixture": change(TINY.data, kind="mixture", mixture=mixture),
        "sft": change(
            TINY.data, kind="sft", source="conversations", sft=SFTConfig(template="chatml", too_long="truncate")
        ),
        "stream": change(TINY.data, kind="stream", source=corpora["poem"], stream=StreamConfig(streams=4)),
    }


def short(data: DataSection, **changes: object) -> TrainConfig:
    return change(TINY, data=data, **({"training.steps": 6, "schedule.total_steps": 6} | changes))


@pytest.mark.parametrize("kind", [pytest.param("text", marks=pytest.mark.slow), "mixture", "sft", "stream"])
def test_a_run_goes_on_with_other_ranks(kinds: dict[str, DataSection], kind: str, tmp_path: Path) -> None:
    held_out = kinds["text" if kind == "mixture" else kind].source
    config = short(kinds[kind], **{"validation.every": 3, "validation.sets": {"mine": held_out}})
    straight = train(config, tmp_path / "straight")
    train(config, tmp_path / "cut", 2, **layout(dp_shard=2), **{"training.steps": 3})
    train(config, tmp_path / "cut", 4, **layout(dp_shard=2, dp_replicate=2), **{"training.steps": 5})
    resumed = train(config, tmp_path / "cut")
    assert samples(tmp_path / "cut", 4) == samples(tmp_path / "straight", 1)
    assert curve(resumed) == pytest.approx(curve(straight), rel=1e-5)
    for name in ("loss", "perplexity", "bits_per_byte"):
        before, after = ([line.get(f"validation.mine.{name}") for line in lines] for lines in (straight, resumed))
        assert [step for step, value in enumerate(before, 1) if value is not None] == [3, 6]
        assert [after[2], after[5]] == pytest.approx([before[2], before[5]], rel=1e-5)


def test_workers_read_the_same(kinds: dict[str, DataSection], tmp_path: Path) -> None:
    config = short(kinds["stream"])
    expected = curve(train(config, tmp_path / "here"))
    workers = {"data.loader.workers": 2, "data.loader.prefetch": 1}
    (tmp_path / "config.json").write_text(to_json(change(config, output=str(tmp_path / "workers"), **workers)))
    result = titan_train("--config", tmp_path / "config.json")
    assert result.returncode == 0, result.stderr
    assert curve(metrics(tmp_path / "workers")) == expected
    assert samples(tmp_path / "workers", 1) == samples(tmp_path / "here", 1)


def test_a_mixture_says_how_far_each_source_is(kinds: dict[str, DataSection], tmp_path: Path) -> None:
    lines = train(short(kinds["mixture"]), tmp_path / "run")
    poem, other = curve(lines, "epoch.poem"), curve(lines, "epoch.other")
    assert poem[0] / 9 == pytest.approx((poem[5] - poem[4]) / 6)  # its share of a batch falls from 9 rows to 6
    assert other[-1] > other[0] > 0


LAYOUTS = {
    "fsdp 2": (2, {"dp_shard": 2}),
    "tp 2": (2, {"tp": 2}),
    "cp 2": (2, {"cp": 2}),
    "pp 2 x fsdp 2": (4, {"pp": 2, "dp_shard": 2}),
    "pp 2, a V": (2, {"pp": 2, "pp_schedule": "ZBVZeroBubble"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("fsdp 2", "pp 2, a V"))) for name in LAYOUTS]
)
def test_validation_is_the_same_on_every_layout(corpora: dict[str, str], name: str, tmp_path: Path) -> None:
    """Also where its rows are not a multiple of anything, and with several sets."""
    steps_and_sets = {"training.steps": 2, "validation.sets": corpora, "validation.max_rows": 11}
    config = change(TINY, **{"training.global_batch_size": 8, "model.layers": 4}, **steps_and_sets)
    world_size, degrees = LAYOUTS[name]
    alone = train(config, tmp_path / "alone")[-1]
    ours = train(config, tmp_path / "ours", world_size, **layout(**degrees))[-1]
    names = [f"validation.{key}.{value}" for key in corpora for value in ("loss", "perplexity", "bits_per_byte")]
    assert [ours[key] for key in names] == pytest.approx([alone[key] for key in names], rel=1e-5)


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_a_kernel_for_documents_changes_nothing(kinds: dict[str, DataSection], kernel: str, tmp_path: Path) -> None:
    config = short(kinds["text"], **{"training.steps": 2})
    expected = curve(train(config, tmp_path / "sdpa"))
    config = change(config, **{"model.attention_kernel": kernel, "remat.mode": "selective"})
    assert curve(train(config, tmp_path / "alone")) == pytest.approx(expected, rel=1e-6)
    ulysses = layout(cp=2, cp_method="ulysses")
    assert curve(train(config, tmp_path / "ulysses", 2, **ulysses)) == pytest.approx(expected, rel=1e-6)


def test_the_conversations_that_come_along(tmp_path: Path) -> None:
    result = titan_train(
        *("--config", "llama3_sft", "--training.steps", 3, "--output", tmp_path / "run", "--device", "cpu"),
        *("--model.dim", 32, "--model.hidden-dim", 64, "--model.layers", 2, "--model.heads", 4, "--model.kv-heads", 2),
        *("--model.head-dim", 8, "--validation.sets", "same", "conversations", "--validation.max-rows", 4),
        *("--export.format", "huggingface"),
    )
    assert result.returncode == 0, result.stderr
    assert "66 with" in result.stdout
    assert "Validation same after step 3: loss" in result.stdout
    template = (tmp_path / "run/hugging_face/step-3/chat_template.jinja").read_text()
    assert "<|start_header_id|>" in template
    assert (tmp_path / "run/checkpoints/step-3/files/chat_template.jinja").read_text() == template


def test_a_source_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example in titan-data's README."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    readme = (Path(__file__).parents[1] / "packages/titan-data/README.md").read_text()
    code = next(block for block in readme.split("```python\n") if "class Letters" in block).split("```")[0]
    (tmp_path / "my_sources.py").write_text(code)
    database = sqlite3.connect(tmp_path / "letters.db")
    database.execute("create table letters (number integer, text text)")
    database.executemany("insert into letters values (?, ?)", [(i, POEM) for i in range(40)])
    database.commit()
    database.close()
    (tmp_path / "config.json").write_text(to_json(change(TINY, output="run", **{"training.steps": 2})))
    result = titan_train("--config", tmp_path / "config.json", "--data.source", "my_sources:Letters")
    assert result.returncode == 0, result.stderr
    assert "letters.db, a table of letters" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--validation.sets", "", "x"], "validation.sets has an empty name for 'x'"),
        (
            ["--data.kind", "mixture", "--data.mixture.sources", "a", "x", "--data.mixture.weights", "a", "nan"],
            "data.mixture.weights gives a nan",
        ),
        (["--data.sft.template", "llama3"], "data.sft is set, and data.kind is 'text'; add --data.kind sft"),
        (["--data.kind", "mixture"], "data.mixture.sources names no source"),
        (
            ["--data.kind", "mixture", "--data.mixture.sources", "a", "x", "--data.mixture.weights", "b", "1"],
            "data.mixture.weights names b, but the sources are a",
        ),
        (["--data.kind", "stream", "--data.stream.streams", "5"], "does not divide training.global_batch_size 12"),
        (["--data.kind", "stream"], "data.stream.streams 64 does not divide training.global_batch_size 12"),
        (["--data.loader.workers", "2", "--data.loader.prefetch", "0"], "data.loader.prefetch is 0"),
        (["--data.loader.pin-memory", "True"], "there is no GPU to copy to"),
        (["--validation.every", "0"], "validation.every is 0"),
        (["--validation.max-rows", "0"], "validation.max_rows is 0"),
        (["--data.kind", "sft", "--data.tokenize-workers", "2"], "data.tokenize_workers has no effect"),
        (
            ["--model.attention-kernel", "flex", "--data.no-confine-attention"],
            "model.attention_kernel flex confines attention to documents",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(change(TINY, output=str(tmp_path / "run"))))
    result = titan_train("--config", tmp_path / "config.json", *flags)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())


def test_streams_are_dealt_to_ranks_as_wholes(kinds: dict[str, DataSection], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(short(kinds["stream"], output=str(tmp_path / "run"))))
    rehearsal = ("--dry-run", "--world-size", 3, "--parallel.dp-shard", 3)
    result = titan_train("--config", tmp_path / "config.json", *rehearsal)
    assert "do not divide data.stream.streams 4" in " ".join(result.stderr.split())


def test_a_set_that_is_not_there_ends_a_run_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(change(TINY, output=str(tmp_path / "run"))))
    result = titan_train("--config", tmp_path / "config.json", "--validation.sets", "mine", tmp_path / "absent")
    assert result.returncode == 1
    assert f"titan-train: validation.sets mine: there is no corpus '{tmp_path}/absent'" in result.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
