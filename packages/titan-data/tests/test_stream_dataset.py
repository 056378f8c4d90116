import dataclasses
import json
import subprocess
import sys

import pytest

from titan_data.cli import main
from titan_data.config import DataConfig
from titan_data.dataset import open_dataset
from titan_data.errors import DataError
from titan_data.stream_config import StreamConfig
from titan_data.stream_dataset import open_streams
from titan_data.stream_loader import StreamLoader


@pytest.fixture
def config(corpus_folder, tmp_path):
    return DataConfig(source=str(corpus_folder), vocab_size=300, cache_dir=str(tmp_path / "cache"))


def opened(config, streams=3, **options):
    return open_streams(config, StreamConfig(streams=streams), **({"seq_len": 16, "seed": 0} | options))


def test_a_corpus_is_tokenized_while_it_is_read(config, corpus_folder):
    data = opened(config)
    loader = StreamLoader(data.rows, global_batch_size=3, prefetch=0)
    batches = [next(loader) for _ in range(30)]
    assert loader.epoch > 1
    assert loader.epoch % 1
    text = data.tokenizer.decode([token for batch in batches for token in batch["tokens"][0].tolist()])
    assert text.startswith(sorted(corpus_folder.iterdir())[0].read_bytes().decode()[:100])
    assert not (corpus_folder.parent / "cache" / "tokens").exists()
    assert data.vocab_size == 300
    assert "tokenized on the fly, in 3 streams" in data.describe()


def test_the_fingerprint_is_that_of_the_same_text_in_the_cache(config):
    assert opened(config).fingerprint == open_dataset(config).fingerprint


STREAM = """
import sys
from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.stream_config import StreamConfig
from titan_data.stream_dataset import open_streams
from titan_data.stream_loader import StreamLoader
for source in sys.argv[2:]:
    try:
        config = DataConfig(source=source, tokenizer=sys.argv[1])
        data = open_streams(config, StreamConfig(streams=2), seq_len=8, seed=0)
        loader = StreamLoader(data.rows, global_batch_size=2, prefetch=0)
        print(repr(data.tokenizer.decode(next(loader)["tokens"][1].tolist())))
        loader.close()
    except DataError as error:
        print(str(error).replace(chr(10), " "))
"""


@pytest.mark.slow  # most of it is spent in the library, being offline
def test_a_dataset_of_the_hub_is_streamed(tmp_path, bpe_folder):
    # What load_dataset takes for a name of the hub is first looked for here.
    folder = tmp_path / "owner" / "poems"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"poem {i}"}) + "\n" for i in range(4)))
    other = tmp_path / "owner" / "words"
    other.mkdir()
    (other / "train.jsonl").write_text('{"words": "a"}\n{"words": "b"}\n')
    sources = ("hf:owner/poems", "hf:owner/words", "hf:owner/none", "hf::")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STREAM, bpe_folder, *sources],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    train, words, nothing, malformed = run.stdout.splitlines()
    assert train.startswith("'poem 1<|end_of_text|>")
    assert words.startswith("hf:owner/words, row 0: no field 'text'; it has 'words'")
    assert "cannot stream the source 'hf:owner/none'" in nothing
    assert "is not of the form hf:OWNER/NAME" in malformed


def test_what_cannot_take_effect_is_refused(config):
    with pytest.raises(DataError, match="is streamed, so that no tokenizer can be trained on it"):
        opened(dataclasses.replace(config, source="hf:owner/poems"))
    with pytest.raises(DataError, match=r"data\.stream\.streams is 0"):
        opened(config, streams=0)
    with pytest.raises(DataError, match="seq_len is 0"):
        opened(config, seq_len=0)


def test_an_empty_corpus_is_refused_when_it_is_opened(config, tmp_path):
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"the corpus is empty: .*empty\.jsonl: 1 files"):
        opened(dataclasses.replace(config, source=str(tmp_path / "empty.jsonl")))


def test_tokens_are_no_text(config, corpus_folder, tmp_path, bpe_folder):
    assert main([str(corpus_folder), str(tmp_path / "tokens"), "--tokenizer", str(bpe_folder), "--workers", "1"]) == 0
    with pytest.raises(DataError, match=r"tokens is tokenized already.*data\.kind text and mixture"):
        opened(dataclasses.replace(config, source=str(tmp_path / "tokens")))
