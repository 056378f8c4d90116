import json
import os
import random
import string

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from titan_data import tiktoken_engine
from titan_data.bpe import train_bpe
from titan_data.tiktoken_engine import Untranslatable, byte_alphabet, translate
from titan_data.tiktoken_file import LLAMA3_PATTERN

TEXTS = [
    "Whose woods these are I think I know.\n\n  His house's in the VILLAGE though;\r\n",
    "def f(x):\n\treturn [x for x in range(1234567)]  # naïve café 東京 🙂\n",
    "He's they'Ll Größe e\u0301 \u00e9 \u1112\u1161\u11ab 한국어 ١٢٣٤ <think> </think> <|end_of_text|>\n",
] * 30

unicode_text = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("a's \n\r\t1e\u0301<|>"), max_size=200
)


def make(change=None, **parts):
    """A byte-level BPE with these parts replaced."""
    tokenizer = tokenizers.Tokenizer.from_buffer(train_bpe(TEXTS, 600)["tokenizer.json"])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    if change is not None:
        content = json.loads(tokenizer.to_str())
        change(content)
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


def split(pattern, behavior="isolated", invert=False):
    parts = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


def shuffled_ids(content):
    vocabulary = content["model"]["vocab"]
    special = {token["content"] for token in content["added_tokens"]}
    names = [name for name in vocabulary if name not in special]
    ids = [vocabulary[name] for name in names]
    random.Random(0).shuffle(ids)
    vocabulary.update(zip(names, ids, strict=True))


def words_without_merges(content):
    content["model"]["ignore_merges"] = True
    for word in ("zebra", "Ġquixotic"):
        content["model"]["vocab"][word] = len(content["model"]["vocab"])


def with_added(**options):
    tokenizer = make(**options)
    tokenizer.add_tokens(
        [AddedToken("<think>", special=False), AddedToken("</think>", special=False, normalized=False)]
    )
    return tokenizer


SAME = {
    "GPT-2": make,
    "Llama 3": lambda: make(pre_tokenizer=split(LLAMA3_PATTERN)),
    "matches kept": lambda: make(pre_tokenizer=split(LLAMA3_PATTERN, "removed", invert=True)),
    "shuffled ids": lambda: make(shuffled_ids),
    "NFC": lambda: make(normalizer=normalizers.NFC()),
    "words without merges": lambda: make(words_without_merges),
    "added tokens": with_added,
    "added tokens and NFC": lambda: with_added(normalizer=normalizers.NFC()),
}


@pytest.fixture(scope="module", params=SAME)
def pair(request):
    tokenizer = SAME[request.param]()
    engine = translate(tokenizer)
    engine.check(tokenizer)
    return tokenizer, engine


def theirs(tokenizer, texts):
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@given(text=unicode_text)
def test_makes_the_same_tokens_of_any_text(pair, text):
    tokenizer, engine = pair
    assert [ids.tolist() for ids in engine.encode_batch([text])] == theirs(tokenizer, [text])


def test_makes_the_same_tokens_of_probes_and_look_alikes(pair):
    tokenizer, engine = pair
    texts = [
        *TEXTS[:3],
        "a<|end_of_text|><|pad|>b",
        "<think>hm</think>",
        "<think>\u0338 e\u0301",
        "zebra quixotic zebras",
    ]
    assert [ids.tolist() for ids in engine.encode_batch(texts)] == theirs(tokenizer, texts)


def test_threads_keep_the_order(monkeypatch):
    monkeypatch.setattr(tiktoken_engine, "thread_count", lambda: 4)
    monkeypatch.setattr(tiktoken_engine, "_CHARS_A_THREAD", 1)
    engine = translate(make())
    texts = [str(i) * (i % 7) for i in range(300)]
    assert [ids.tolist() for ids in engine.encode_batch(texts)] == theirs(make(), texts)


def test_threads_leave_no_trace(monkeypatch):
    monkeypatch.setattr(tiktoken_engine, "thread_count", lambda: 4)
    monkeypatch.setattr(tiktoken_engine, "_CHARS_A_THREAD", 1)
    engine = translate(make())
    engine.encode_batch(["some text"] * 8)
    pid = os.fork()
    if pid == 0:
        engine.encode_batch(["some text"] * 8)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def set_model(**options):
    return lambda content: content["model"].update(options)


def without_a_byte(content):
    del content["model"]["vocab"]["ÿ"]


UNTRANSLATABLE = {
    "another model": (
        lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0})),
        "no byte-level BPE",
    ),
    "words": (lambda: byte_level(models.WordLevel({"a": 0})), "its model is WordLevel, not BPE"),
    "a space before": (lambda: make(pre_tokenizer=pre_tokenizers.ByteLevel()), "adds a space"),
    "two splits": (
        lambda: make(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])),
        r"split in another way \(Digits, ByteLevel\)",
    ),
    "matches dropped": (lambda: make(pre_tokenizer=split(r"\s+", "removed")), "split in another way"),
    "dropout": (lambda: make(set_model(dropout=0.5)), "it has dropout"),
    "byte fallback": (lambda: make(set_model(byte_fallback=True)), "it has byte_fallback"),
    "suffix": (lambda: make(set_model(end_of_word_suffix="@")), "it has end_of_word_suffix"),
    "lower case": (lambda: make(normalizer=normalizers.Lowercase()), "a normalizer of type Lowercase"),
    "a byte missing": (lambda: make(without_a_byte), "lacks some bytes"),
    "a pattern of Oniguruma's own": (lambda: make(pre_tokenizer=split(r"\p{^L}|\X|(?~a)")), "tiktoken cannot use"),
    "many added tokens": (lambda: added(100), "it has 100 added tokens"),
}


def byte_level(model):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def added(count):
    tokenizer = make()
    tokenizer.add_tokens([f"<{number}>" for number in range(count)])
    return tokenizer


@pytest.mark.parametrize("case", UNTRANSLATABLE)
def test_what_tiktoken_cannot_say_is_named(case):
    make, reason = UNTRANSLATABLE[case]
    with pytest.raises(Untranslatable, match=reason):
        translate(make())


def merges(*pairs):
    """A byte-level BPE of these merges."""
    vocabulary = dict(byte_alphabet())
    for left, right in pairs:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = byte_level(models.BPE(vocabulary, list(pairs)))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


DIFFERENT = {
    # "abc" is never made of a and bc, which is what there is once b and c are joined.
    "a merge that tiktoken would find": lambda: merges(("b", "c"), ("a", "b"), ("ab", "c")),
    "text between matches": lambda: make(pre_tokenizer=split(r"\p{L}+")),
    "words that merges do not reach": lambda: make(
        lambda content: (
            content["model"]["merges"].append(["Ġqu", "ixotic"])
            or content["model"]["vocab"].update({"Ġqu": 9000, "ixotic": 9001, "Ġquixotic": 9002})
        )
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_differences_are_found(case):
    tokenizer = DIFFERENT[case]()
    with pytest.raises(Untranslatable, match="they disagree on"):
        translate(tokenizer).check(tokenizer)


def test_the_alphabet_is_that_of_the_library():
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    decoder = decoders.ByteLevel()
    for character, byte in byte_alphabet().items():
        if chr(byte) in string.printable:
            assert decoder.decode([character]) == chr(byte)
    assert sorted(byte_alphabet().values()) == list(range(256))


@pytest.mark.slow
def test_both_libraries_know_the_same_characters():
    tokenizer = make(pre_tokenizer=split(LLAMA3_PATTERN))
    engine = translate(tokenizer)
    codes = np.arange(0x110000)
    for block in np.array_split(codes[(codes < 0xD800) | (codes >= 0xE000)], 200):
        texts = [f"a{chr(code)}1{chr(code)} {chr(code)}{chr(code)}\n'{chr(code)}" for code in block]
        assert [ids.tolist() for ids in engine.encode_batch(texts)] == theirs(tokenizer, texts)
