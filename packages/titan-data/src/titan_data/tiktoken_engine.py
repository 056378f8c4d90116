"""Byte-level BPE on tiktoken's engine, which encodes several times as fast as the `tokenizers` library.

`translate` expresses a Hugging Face tokenizer in tiktoken's terms: a pattern that splits text into words, and a rank
for each token, by which neighbours within a word are joined, lowest first. What cannot be said in these terms is left
to `tokenizers`, and so is any text in which an added token that is not special could occur (special ones are never
found in text). The two differ in more than that: `tokenizers` joins only pairs that its list of merges names, tiktoken
any two whose bytes together are a token. For vocabularies that training has made it comes to the same; `check`
establishes it for the vocabulary at hand: on each of its entries, alone and in a row with others, on characters of all
kinds in all positions, and on texts that have told implementations apart.
"""

import concurrent.futures
import json
import random
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray

from titan_data.threads import library_threads, thread_count

# tokenizers' own pattern for its ByteLevel pre-tokenizer; it is GPT-2's.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# These leave ASCII as it is.
_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
# tiktoken wants at least one, and does not look for it.
_NEVER_FOUND = "<|no token of titan-data|>"
_MOST_LITERALS = 64
# Fewer than this are not worth a thread.
_CHARS_A_THREAD = 1 << 15

_HARD_TEXTS = (
    "It's we'RE they'Ll I'D 'S '\u017f K's x\u2019s 's''s'T",
    "0 00 000 0000 1234567890 3.14 1,000,000 ١٢٣٤٥ ⅷ²③ 1a2b3c 12三\uff14\uff15",
    "a  b   c\td\t\te\n\nf\r\ng \n h\r\n\r\n  i\u00a0j\u3000k\u2028l\u0085m\u200bn\ufeffo \n \n\t\n ",
    "    def f(x):\n        return {'a': [1, 2]}  # why?!\n\n\n\tpass;;;\n",
    "Größe naïve e\u0301 a\u0300\u0323 ﬁ Å Å ÅΩΩ ŉ ΐ İıŞ Dž straße STRASSE",
    "東京は晴れ、北京。서울 각 \u1100\u1161\u11a8 ไทย हिन्दी क्षि العربية עִבְרִית \u202eabc\u202c",
    "🙂🏽\u200d🚀👨\u200d👩\u200d👧\u200d👦🇩🇪🏴\U000e0067\U000e0062\U000e007f ☕\ufe0e☕\ufe0f \U0001d518\U0001d52b 𐍈",
    "\U0010ffff\ue000\ufffd\0\1\x7f",
    "https://example.org/a?b=c&d=%20#e  <p class='x'>&amp;</p> $\\frac{1}{2}$ --->>> ..... ______ =====\n=====",
    " leading", "trailing ", " ", "  ", "\n", "\r", "\t", " \n", "\n ", "a", "'", "",
    "x" * 300 + " " * 300 + "\n" * 300 + "é" * 300 + "!?" * 150 + "0" * 300,
)  # fmt: skip
_POSITIONS = "a{0} {0}1{0}\n{0}{0}'{0}. {0}"
_EVERY_CODE_POINT = 211


class Untranslatable(Exception):  # noqa: N818
    """Why a tokenizer cannot run on tiktoken, in words that follow "since"."""


@dataclass(frozen=True)
class TiktokenEngine:
    """Encodes text as a `tiktoken.Encoding` does, in threads, with special tokens' names as plain text."""

    encoding: tiktoken.Encoding
    ids: NDArray[np.uint32] | None = None
    """The token id of each rank; None if they are the same."""
    normalize: Callable[[str], str] | None = None
    """What is done first to text that is not ASCII."""
    literals: tuple[str, ...] = ()
    """Text that holds one of these is left to `slow`."""
    slow: Callable[[str], Sequence[int]] | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Returns each text's token ids, uint32 [T]."""
        threads = min(thread_count(), len(texts), 1 + sum(map(len, texts)) // _CHARS_A_THREAD)
        if threads == 1:
            return [self._encode(text) for text in texts]
        # A pool for each batch, since threads that outlived it would not survive a fork.
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, texts))

    def check(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Compares with the original.

        Raises:
            Untranslatable: at the first text that has other tokens.
        """
        texts = list(_probes(tokenizer))
        with library_threads():
            expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, ours, theirs in zip(texts, self.encode_batch(texts), expected, strict=True):
            if ours.tolist() != theirs.ids:
                shown = text if len(text) <= 40 else f"{text[:40]}..."
                raise Untranslatable(f"they disagree on {shown!r}")

    def _encode(self, text: str) -> NDArray[np.uint32]:
        if self.slow is not None and any(literal in text for literal in self.literals):
            return np.array(self.slow(text), dtype=np.uint32)
        if self.normalize is not None and not text.isascii():
            normal = self.normalize(text)
            if self.slow is not None and any(literal in normal for literal in self.literals):
                return np.array(self.slow(text), dtype=np.uint32)
            text = normal
        ranks = self.encoding.encode_to_numpy(text, disallowed_special=())
        return ranks if self.ids is None else self.ids[ranks]


def translate(tokenizer: tokenizers.Tokenizer) -> TiktokenEngine:
    """Expresses a byte-level BPE in tiktoken's terms; whether it is the same is for `TiktokenEngine.check` to say.

    Raises:
        Untranslatable: if it is no byte-level BPE, or one with features that tiktoken does not have.
    """
    spec = json.loads(tokenizer.to_str())
    pattern = _pattern(spec["pre_tokenizer"])
    ranks, ids = _ranks(spec["model"], {token["content"] for token in spec["added_tokens"]})
    literals = tuple(token["content"] for token in spec["added_tokens"] if not token["special"])
    if len(literals) > _MOST_LITERALS:
        raise Untranslatable(f"it has {len(literals)} added tokens that are looked for in text")
    normalizer = spec["normalizer"]
    if normalizer is not None and normalizer["type"] not in _UNICODE_FORMS:
        raise Untranslatable(f"it has a normalizer of type {normalizer['type']}")
    try:
        encoding = tiktoken.Encoding(
            "titan-data", pat_str=pattern, mergeable_ranks=ranks, special_tokens={_NEVER_FOUND: max(ranks.values()) + 1}
        )
    except ValueError as error:
        raise Untranslatable(f"tiktoken cannot use its pattern ({error})") from error
    return TiktokenEngine(
        encoding,
        ids,
        normalize=None if normalizer is None else tokenizer.normalizer.normalize_str,
        literals=literals,
        slow=(lambda text: tokenizer.encode(text, add_special_tokens=False).ids) if literals else None,
    )


def _pattern(spec: Mapping[str, Any] | None) -> str:
    """The pattern by which text is split into words, if that is all that the pre-tokenizer does."""
    steps = [spec] if spec and spec["type"] != "Sequence" else (spec or {}).get("pretokenizers", [])
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise Untranslatable("it is no byte-level BPE, or adds a space")
    if len(steps) == 1 and steps[0]["use_regex"]:
        return _GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        split = steps[0]
        keeps_matches = split["behavior"] == "Isolated" or (split["behavior"] == "Removed" and split["invert"])
        if keeps_matches and "Regex" in split["pattern"]:
            return split["pattern"]["Regex"]
    raise Untranslatable(f"its text is split in another way ({', '.join(kinds)})")


def _ranks(model: Mapping[str, Any], added: set[str]) -> tuple[dict[bytes, int], NDArray[np.uint32] | None]:
    """Each token's bytes and rank, and the token id of each rank where they differ."""
    if model.get("type") != "BPE":
        raise Untranslatable(f"its model is {model.get('type')}, not BPE")
    for feature in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(feature):
            raise Untranslatable(f"it has {feature}")
    vocabulary: Mapping[str, int] = model["vocab"]
    alphabet = byte_alphabet()
    if not all(character in vocabulary for character in alphabet):
        raise Untranslatable("its vocabulary lacks some bytes")
    # Bytes stand for themselves; what merges make follows in their order; the rest is only found as a whole word.
    order = dict.fromkeys(sorted(alphabet, key=vocabulary.__getitem__))
    order.update(dict.fromkeys(left + right for left, right in map(_pair, model["merges"])))
    if model.get("ignore_merges"):
        rest = (token for token in vocabulary if token not in order and token not in added)
        order.update(dict.fromkeys(sorted(rest, key=vocabulary.__getitem__)))
    tokens = [token for token in order if set(token) <= alphabet.keys()]
    ids = np.array([vocabulary[token] for token in tokens], dtype=np.uint32)
    contents = [bytes(map(alphabet.__getitem__, token)) for token in tokens]
    # Bytes are never the result of a merge, so that their ranks decide nothing.
    if (np.diff(ids[len(alphabet) :].astype(np.int64)) > 0).all():
        return dict(zip(contents, ids.tolist(), strict=True)), None
    return dict(zip(contents, range(len(contents)), strict=True)), ids


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for, as GPT-2 has fixed it.

    A byte that prints in Latin-1 is its own character; the others are the characters from 256 on, in order.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _probes(tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    yield from _HARD_TEXTS
    for added in tokenizer.get_added_tokens_decoder().values():
        yield f"a{added.content}b {added.content}\n{added.content}{added.content[:-1]} {added.content[1:]}"
    yield from _characters()
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    entries = [tokenizer.decode([id], skip_special_tokens=False) for id in ids]
    yield from entries
    random.Random(0).shuffle(entries)
    for start in range(0, len(entries), 16):
        yield "".join(entries[start : start + 8]) + " ".join(entries[start + 8 : start + 16])


def _characters() -> Iterator[str]:
    """Characters of every kind in every position: all code points where the kind changes to the next, and a sample."""
    kind = None
    text: list[str] = []
    for code in range(sys.maxunicode + 1):
        before, kind = kind, unicodedata.category(chr(code))
        if kind != "Cs" and (kind != before or code % _EVERY_CODE_POINT == 0):
            text.append(_POSITIONS.format(chr(code)))
            if len(text) == 64:
                yield "".join(text)
                text.clear()
    yield "".join(text)
