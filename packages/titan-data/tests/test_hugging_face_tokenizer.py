import json
import pickle
import shutil

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from titan_data.errors import DataError
from titan_data.hugging_face_tokenizer import HuggingFaceTokenizer
from titan_data.tokenizer_files import load_tokenizer


@pytest.fixture
def folder(bpe_folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(bpe_folder, tmp_path / "tokenizer")


def rewrite(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rename_specials(folder, names):
    def change(content):
        for token, name in zip(content["added_tokens"], names, strict=True):
            content["model"]["vocab"][name] = content["model"]["vocab"].pop(token["content"])
            token["content"] = name

    rewrite(folder, change)


def test_round_trip(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    texts = ["Whose woods", " naïve 東京 🙂\r\n\t", ""]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert encoded[2].tolist() == []
    assert {ids.dtype for ids in encoded} == {np.dtype(np.uint32)}
    assert 259 < tokenizer.vocab_size <= 310


def test_text_that_looks_like_a_special_token_is_text(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    text = "a<|end_of_text|>b<|begin_of_text|><|pad|>"
    (ids,) = tokenizer.encode_batch([text])
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids.tolist())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eos_id]) == "<|end_of_text|>"


def test_no_tokens_are_added_cut_off_or_filled_up(folder):
    def change(content):
        content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {
            "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2,
            "pad_type_id": 0, "pad_token": "<|pad|>",
        }  # fmt: skip
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [0], "tokens": ["<|begin_of_text|>"]}
            },
        }

    (plain,) = load_tokenizer(folder).encode_batch(["Whose woods these are"])
    rewrite(folder, change)
    (changed,) = load_tokenizer(folder).encode_batch(["Whose woods these are"])
    assert changed.tolist() == plain.tolist()


def test_special_tokens_are_those_of_its_companions_or_of_the_usual_names(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 2)


def test_the_hash_changes_with_the_tokens_and_with_the_end_of_text_only(folder):
    original = load_tokenizer(folder).hash
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>", "model_max_length": 7}')
    assert load_tokenizer(folder).hash == original
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
    assert load_tokenizer(folder).hash != original
    (folder / "tokenizer_config.json").unlink()
    rewrite(folder, lambda content: content["model"]["merges"].pop())
    assert load_tokenizer(folder).hash != original


def test_vocab_size_covers_ids_with_gaps(folder):
    def change(content):
        content["added_tokens"].append(content["added_tokens"][2] | {"id": 1000, "content": "<|far|>"})

    rewrite(folder, change)
    assert load_tokenizer(folder).vocab_size in (311, 1001)  # newer releases of the library close the gap


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a tokenizer"),
        (b"\x0a\x0e\x0a\x05<unk>", "is not a tokenizer"),
        (b"{}", r"is not a tokenizer that the `tokenizers` library .* can read"),
        (b'{"version": "1.0", "added_tokens": [], "model": {"type": "Strange"}}', "is not a tokenizer"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_a_model_that_reads_special_tokens_out_of_text_is_refused():
    unigram = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0)], unk_id=0))
    unigram.add_special_tokens(["</s>"])
    with pytest.raises(DataError, match="turns the plain text '</s>' into its special token 1"):
        HuggingFaceTokenizer({"tokenizer.json": unigram.to_str().encode()}, name="unigram")


def test_an_unknown_token_that_stands_for_unknown_text_is_fine():
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>", "[UNK]"])
    tokenizer = HuggingFaceTokenizer({"tokenizer.json": words.to_str().encode()}, name="words")
    assert tokenizer.encode_batch(["a b </s>"])[0].tolist() == [2, 0, 0, 0, 0]


def test_goes_over_to_tiktoken_and_makes_the_same_tokens(bpe_folder):
    slow, fast = load_tokenizer(bpe_folder), load_tokenizer(bpe_folder)
    fast.speed_up()
    assert (slow.engine, fast.engine) == ("tokenizers", "tiktoken")
    texts = ["Whose woods these are\n", "<|end_of_text|>", "", "naïve 東京 🙂" * 10_000]
    for theirs, ours in zip(slow.encode_batch(texts), fast.encode_batch(texts), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert fast.hash == slow.hash


def test_stays_where_it_is_if_tiktoken_would_differ_and_says_why(folder):
    rewrite(folder, lambda content: content["pre_tokenizer"].update(add_prefix_space=True))
    tokenizer = load_tokenizer(folder)
    tokenizer.speed_up()
    tokenizer.speed_up()
    assert tokenizer.engine == "tokenizers (not tiktoken, since it is no byte-level BPE, or adds a space)"
    assert tokenizer.decode(tokenizer.encode_batch(["a"])[0]).strip() == "a"


def test_another_process_gets_the_same_without_finding_out_again(bpe_folder, monkeypatch):
    tokenizer = load_tokenizer(bpe_folder)
    tokenizer.speed_up()
    pickled = pickle.dumps(tokenizer)
    monkeypatch.setattr("titan_data.tiktoken_engine.TiktokenEngine.check", None)
    copy = pickle.loads(pickled)
    assert copy.engine == "tiktoken"
    assert copy.encode_batch(["Whose woods"])[0].tolist() == tokenizer.encode_batch(["Whose woods"])[0].tolist()
