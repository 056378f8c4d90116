import json
import subprocess
import sys

import pytest

from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.hugging_face_datasets import saved_dataset
from titan_data.sources import open_source

TEXTS = [f"document {i}\n" for i in range(250)]

# In a process of its own: the library starts threads, after which tests should not fork.
SAVE = """
import sys, datasets
dataset = datasets.Dataset.from_dict({"text": [f"document {i}\\n" for i in range(250)]})
dataset.save_to_disk("plain", num_shards=3)
dataset.select(range(249, -1, -1)).save_to_disk("reversed")
datasets.DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk("splits")
"""
LOAD = """
import sys
from pathlib import Path
from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.source import all_pieces
from titan_data.sources import open_source
for source in sys.argv[1:]:
    try:
        source = open_source(DataConfig(source=source), cache=Path("cache"), progress=lambda message: None)
        print(source.fingerprint, len(list(all_pieces(source))), next(all_pieces(source)).text.strip())
    except DataError as error:
        print(error)
"""


def run(code, *arguments, cwd):
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    env = {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    ran = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run(SAVE, cwd=folder)
    return folder


@pytest.fixture
def texts_of(tmp_path, documents):
    def texts_of(source):
        config = DataConfig(source=str(source))
        return documents(open_source(config, cache=tmp_path / "cache", progress=lambda message: None).parts)

    return texts_of


def test_a_saved_dataset_is_read_in_its_order(saved, texts_of):
    assert len(saved_dataset(saved / "plain")) == 3
    assert texts_of(saved / "plain") == TEXTS
    assert texts_of(saved / "reversed") == TEXTS[::-1]
    assert texts_of(saved / "splits" / "test") == TEXTS[:3]


def test_a_folder_of_splits_names_them(saved, texts_of):
    with pytest.raises(DataError, match=r"several splits: train, test\. Name one, e\.g\. '.*splits/train'"):
        texts_of(saved / "splits")


def test_a_folder_that_is_no_saved_dataset_is_none(tmp_path):
    assert saved_dataset(tmp_path) is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", r"state\.json cannot be read"),
        ("[]", r"state\.json is not a JSON object"),
        ("{}", "does not name its data files"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', r"names gone\.arrow, which is not there"),
        ('{"_data_files": [], "_indices_data_files": ["x"]}', "with its rows out of order"),
    ],
)
def test_a_saved_dataset_that_is_not_whole_is_refused(tmp_path, state, message):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=message):
        saved_dataset(tmp_path)


def test_a_dataset_by_name_with_config_and_split(tmp_path):
    # What load_dataset takes for a name of the hub is first looked for here.
    folder = tmp_path / "owner" / "poems"
    folder.mkdir(parents=True)
    for split, texts in (("train", TEXTS), ("test", TEXTS[:2])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, again, test, nothing, sliced, malformed = run(
        LOAD,
        "hf:owner/poems",
        "hf:owner/poems:default:train",
        "hf:owner/poems::test",
        "hf:owner/nothing",
        "hf:owner/poems:default:train[10]",
        "hf:",
        cwd=tmp_path,
    )
    assert train == again
    assert train.split()[1:] == ["250", "document", "0"]
    assert test.split()[1:] == ["2", "document", "0"]
    assert "cannot open the source 'hf:owner/nothing'" in nothing
    assert "'train[10]' is not the name of a whole split" in sliced
    assert "is not of the form hf:OWNER/NAME" in malformed
