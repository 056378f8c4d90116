"""Checkpoints of a run in an object store: a real S3 server, real processes."""

import fsspec
import pytest

from training_runs import change, curve, layout, metrics, samples, titan_train, train, train_until_killed


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_is_killed_and_goes_on_from_the_bucket(s3_server, tiny, tmp_path, world_size):
    directory = f"s3://titan/killed-on-{world_size}"
    parallel = layout() if world_size > 1 else {}
    config = change(tiny, **{"checkpoint.every": 5, "checkpoint.directory": directory, **parallel})
    whole = train(change(config, **{"checkpoint.directory": None}), tmp_path / "whole", world_size)
    train_until_killed(config, tmp_path / "killed", 13, world_size)
    assert curve(train(config, tmp_path / "killed", world_size)) == curve(whole)
    assert samples(tmp_path / "killed", world_size) == samples(tmp_path / "whole", world_size)
    assert not (tmp_path / "killed" / "checkpoints").exists()
    folders = fsspec.filesystem("s3").ls(directory, refresh=True, detail=False)
    assert sorted(name.rpartition("/")[2] for name in folders) == ["step-15", "step-20"]
    # Another machine, with nothing but the URL: it goes on, and a new run starts from the weights.
    elsewhere = train(change(config, **{"training.steps": 22}), tmp_path / "elsewhere")
    assert [line["step"] for line in elsewhere] == [21, 22]
    new = change(tiny, **{"checkpoint.init_from": directory, "training.steps": 1})
    assert train(new, tmp_path / "new")[0]["loss"] < metrics(tmp_path / "whole")[0]["loss"]


def test_a_bucket_that_is_not_there_is_one_clear_paragraph(s3_server, corpus, tmp_path):
    flags = ["--data.source", corpus, "--training.steps=1", "--device=cpu", "--output", tmp_path / "run"]
    result = titan_train(*flags, "--checkpoint.directory", "s3://nowhere/run")
    assert result.returncode == 1
    assert result.stderr.startswith("titan-train: "), result.stderr
    assert "nowhere" in result.stderr
