import hashlib
import json
import os
import subprocess
import sys

import pytest

from titan_data import bpe
from titan_data.bpe import train_bpe, trained_bpe
from titan_data.errors import DataError
from titan_data.source import Piece

TEXTS = [f"def function_{i}(argument):\n    return argument * {i} + café\n" for i in range(200)]


class TextCorpus:
    """Documents in memory, that counts what is asked of it; a source of one part."""

    def __init__(self, texts, fingerprint="f"):
        self.texts, self.fingerprint = texts, fingerprint
        self.size_bytes = sum(len(text.encode()) for text in texts)
        self.parts = [self]
        self.read = 0

    def pieces(self, counts):
        for text in self.texts:
            self.read += 1
            yield Piece(text, True)

    def describe(self):
        return "texts in memory"


def silent(message):
    pass


def test_training_makes_a_byte_level_vocabulary_of_the_size_asked_for(tmp_path):
    tokenizer = trained_bpe(TextCorpus(TEXTS), 320, tmp_path, progress=silent)
    assert tokenizer.vocab_size == 320
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(["any 東京 text", TEXTS[0]])] == [
        "any 東京 text",
        TEXTS[0],
    ]
    assert len(tokenizer.encode_batch([TEXTS[0]])[0]) < len(TEXTS[0]) / 2


@pytest.mark.parametrize("environment", [{"RAYON_NUM_THREADS": "1"}, {"TOKENIZERS_PARALLELISM": "false"}])
def test_the_same_text_gives_the_same_bits_in_any_process_with_any_threads(environment):
    code = (
        "import hashlib, json, sys; from titan_data.bpe import train_bpe\n"
        "files = train_bpe(json.load(sys.stdin), 400)\n"
        "print(hashlib.sha256(files['tokenizer.json']).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(TEXTS),
        env=os.environ | {"PYTHONHASHSEED": "7"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    here = train_bpe(TEXTS, 400)["tokenizer.json"]
    assert hashlib.sha256(here).hexdigest() == other.stdout.strip()
    assert train_bpe(TEXTS, 400)["tokenizer.json"] == here


def test_special_tokens_in_the_text_stay_text_in_training():
    poisoned = [text.replace("return", "<|end_of_text|>") for text in TEXTS]
    vocabulary = json.loads(train_bpe(poisoned, 500)["tokenizer.json"])["model"]["vocab"]
    assert vocabulary["<|end_of_text|>"] == 1
    assert [token for token in vocabulary if "end" in token and token != "<|end_of_text|>"]


def test_is_trained_once_for_each_corpus_and_size(tmp_path):
    messages = []
    corpus = TextCorpus(TEXTS)
    first = trained_bpe(corpus, 300, tmp_path, progress=messages.append)
    read = corpus.read
    assert trained_bpe(corpus, 300, tmp_path, progress=messages.append).hash == first.hash
    assert corpus.read == read
    assert len(messages) == 1
    trained_bpe(corpus, 301, tmp_path, progress=messages.append)
    trained_bpe(TextCorpus(TEXTS, "other"), 300, tmp_path, progress=messages.append)
    assert len(messages) == 3


def test_a_damaged_one_is_trained_again(tmp_path):
    corpus = TextCorpus(TEXTS)
    first = trained_bpe(corpus, 300, tmp_path, progress=silent)
    (file,) = tmp_path.glob("*/tokenizer.json")
    file.write_bytes(file.read_bytes()[:1000])
    messages = []
    assert trained_bpe(corpus, 300, tmp_path, progress=messages.append).hash == first.hash
    assert "damaged" in messages[0]


def test_the_sample_is_bounded_and_spread_over_the_corpus(tmp_path, monkeypatch):
    corpus = TextCorpus([chr(ord("a") + i // 10) * 100 for i in range(200)])
    monkeypatch.setattr(bpe, "SAMPLE_BYTES", 2000)
    sample = list(bpe._sample(corpus))
    assert len(sample) == 20
    assert [text[0] for text in sample] == [chr(ord("a") + i) for i in range(20)]
    uneven = TextCorpus(["x"] * 10_000 + ["y" * 3000] * 10)
    assert sum(map(len, bpe._sample(uneven))) <= 2000 + 3000


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.vocab_size is 258; .* at least 259"):
        trained_bpe(TextCorpus(TEXTS), 258, tmp_path, progress=silent)


def test_transformers_style_companion_names_the_special_tokens():
    config = json.loads(train_bpe(TEXTS, 300)["tokenizer_config.json"])
    assert config["eos_token"] == "<|end_of_text|>"
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
