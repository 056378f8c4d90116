import base64
import inspect
import itertools
import json
import pickle
import textwrap

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from titan_data.bpe import train_bpe
from titan_data.errors import DataError
from titan_data.tiktoken_engine import byte_alphabet
from titan_data.tiktoken_file import (
    LLAMA3_PATTERN,
    LLAMA3_RANKS,
    TiktokenTokenizer,
    llama3_special_tokens,
)
from titan_data.tokenizer_files import load_tokenizer

TEXTS = ["Whose woods these are I think I know; it's naïve, 東京 한국어 مرحبا 🙂🏽 1234567\n\n\tdef f(x):\r\n"] * 50
SETTINGS = {"pattern": LLAMA3_PATTERN, "special_tokens": {"<|endoftext|>": 1000, "<|pad|>": 1003}}
HARD = [
    "It's we'RE '\u017f K's 1234567890 ١٢٣٤٥ ³½Ⅷ  a\u00a0b\u3000c\u2028d\u0085\u200b\ufeff e\u0301 é ﬁ İı ẞ",
    " \n \r\n\r\n\t  x   \n\n", "\U0001f469\u200d\U0001f680\U0001f1e9\U0001f1ea \U0010ffff\ue000\x00\x7f",
    "<|begin_of_text|>a<|eot_id|> <|start_header_id|>user<|end_header_id|>\n\n<|reserved_special_token_5|>",
    "नमस्ते ไทย עִבְרִית العربية \u1112\u1161\u11ab", "", " ", "\n", "a" * 2000 + "!" * 2000 + " " * 2000,
]  # fmt: skip


def trained_ranks():
    content = json.loads(train_bpe([*TEXTS, inspect.getsource(textwrap)], 700)["tokenizer.json"])
    alphabet = byte_alphabet()
    special = {token["content"] for token in content["added_tokens"]}
    tokens = [name for name in content["model"]["vocab"] if name not in special]
    return [bytes(alphabet[character] for character in token) for token in tokens]


def rank_lines(tokens):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def llama3_ranks():
    """As many ranks as Llama 3 has: what training made, then words put together from it."""
    tokens = dict.fromkeys(trained_ranks())
    for left, right in itertools.product(list(tokens), repeat=2):
        if len(tokens) == LLAMA3_RANKS:
            break
        tokens.setdefault(left + right)
    assert len(tokens) == LLAMA3_RANKS
    return list(tokens)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama3")
    (folder / "tokenizer.model").write_bytes(rank_lines(llama3_ranks()))
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own.tiktoken").write_bytes(rank_lines(trained_ranks()))
    (tmp_path / "tiktoken.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def test_llama3_is_recognised_and_has_its_special_tokens(llama3):
    tokenizer = load_tokenizer(llama3)
    assert tokenizer.vocab_size == 128_256
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (128_000, 128_001, 128_004)
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ]
    assert [llama3_special_tokens()[name] for name in names] == [128_000, 128_001, 128_006, 128_007, 128_008, 128_009]
    assert tokenizer.decode([128_010, 128_002, 128_255]) == (
        "<|python_tag|><|reserved_special_token_0|><|reserved_special_token_247|>"
    )
    assert len(llama3_special_tokens()) == 256


def test_llama3_makes_the_tokens_of_tiktoken_and_of_transformers_conversion(llama3):
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tokenizer = load_tokenizer(llama3)
    ranks = {token: rank for rank, token in enumerate(llama3_ranks())}
    reference = tiktoken.Encoding(
        "reference", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=llama3_special_tokens()
    )
    converter = TikTokenConverter(str(llama3 / "tokenizer.model"), extra_special_tokens=llama3_special_tokens())
    converted = converter.converted()
    converted.encode_special_tokens = True
    for text, ids in zip(HARD + TEXTS[:1], tokenizer.encode_batch(HARD + TEXTS[:1]), strict=True):
        assert ids.tolist() == reference.encode_ordinary(text) == converted.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_special_tokens_in_text_are_text(llama3):
    (ids,) = load_tokenizer(llama3).encode_batch(["<|begin_of_text|><|eot_id|><|reserved_special_token_3|>"])
    assert max(ids) < LLAMA3_RANKS


def test_any_other_file_takes_its_pattern_from_beside_it(folder):
    tokenizer = load_tokenizer(folder / "own.tiktoken")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1004, None, 1000, 1003)
    assert tokenizer.decode([*tokenizer.encode_batch(["woods"])[0], 1000]) == "woods<|endoftext|>"
    assert tokenizer.engine == "tiktoken"
    assert "own.tiktoken: 1,004 tokens, end of text is 1000" in tokenizer.describe()


@pytest.fixture(scope="module")
def tokenizer(llama3):
    return load_tokenizer(llama3)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=100))
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_its_files_and_its_pickle_make_it_again(folder):
    tokenizer = load_tokenizer(folder)
    assert set(tokenizer.files) == {"own.tiktoken", "tiktoken.json"}
    for copy in (TiktokenTokenizer(tokenizer.files, name="x"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.hash == tokenizer.hash
        assert copy.encode_batch(TEXTS[:1])[0].tolist() == tokenizer.encode_batch(TEXTS[:1])[0].tolist()


def test_the_hash_changes_with_ranks_pattern_and_end_of_text(folder):
    hashes = [load_tokenizer(folder).hash]
    for settings in (SETTINGS | {"pattern": r"\s+|\S+"}, SETTINGS | {"special_tokens": {"<|endoftext|>": 1001}}):
        (folder / "tiktoken.json").write_text(json.dumps(settings))
        hashes.append(load_tokenizer(folder).hash)
    (folder / "tiktoken.json").write_text(json.dumps(SETTINGS))
    (folder / "own.tiktoken").write_bytes(rank_lines(trained_ranks()[:-1]))
    hashes.append(load_tokenizer(folder).hash)
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, r"own\.tiktoken has \d+ ranks, so it is not Llama 3's \(128,000\), and no tiktoken\.json"),
        ("{", r"tiktoken\.json beside .* cannot be used \(JSONDecodeError"),
        ("[]", "cannot be used"),
        ('{"pattern": "."}', "cannot be used"),
        ('{"pattern": ".", "special_tokens": {}}', "cannot be used"),
        ('{"pattern": ".", "special_tokens": {"a": "b"}}', "cannot be used"),
        ('{"pattern": "(", "special_tokens": {"</s>": 1000}}', r"tiktoken cannot use it \("),
        ('{"pattern": ".", "special_tokens": {"</s>": 10}}', "the id 10 is both a rank and a special token"),
        ('{"pattern": ".", "special_tokens": {"[END]": 1000}}', "has no end-of-text token"),
    ],
)
def test_a_pattern_file_that_cannot_be_used_is_refused(folder, settings, message):
    (folder / "tiktoken.json").unlink()
    if settings is not None:
        (folder / "tiktoken.json").write_text(settings)
    with pytest.raises(DataError, match=message):
        load_tokenizer(folder / "own.tiktoken")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: it holds no ranks"),
        (b"\x0a\x0e\x0a\x05<unk>", "is a SentencePiece model"),
        (b"YQ== 0\n\nYg==\n", "line 3: not a token in base64 and its rank"),
        (b"YQ== 0\n*** 1\n", "line 2: not a token in base64"),
        (b"YQ== 0\nYQ== 1\n", "line 2: the token or the rank 1 stands in an earlier line"),
        (b"YQ== 0\nYg== 0\n", "line 2: the token or the rank 0 stands in an earlier line"),
        (b"YQ== 0\n", "has no rank for the byte 0x00"),
    ],
)
def test_a_file_that_is_no_rank_file_is_refused(folder, content, message):
    (folder / "own.tiktoken").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(folder / "own.tiktoken")
