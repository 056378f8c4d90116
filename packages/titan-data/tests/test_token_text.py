import base64
import json

import tokenizers
from tokenizers import decoders, models

from titan_data.token_text import control_tokens, token_bytes
from titan_data.tokenizer_files import load_tokenizer, tokenizer_from_files

TEXTS = ("Whose woods these are", "Größe, naïve, 東京 🙂\r\n\t x", "", "<|eot_id|> is text here")


def test_the_bytes_of_a_byte_level_tokenizer_add_up(chat_folder):
    tokenizer = load_tokenizer(chat_folder)
    sizes = token_bytes(tokenizer)
    assert len(sizes) == tokenizer.vocab_size
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert sizes[ids].sum() == len(text.encode())
    assert sizes[tokenizer.eos_id] == 0
    control = control_tokens(tokenizer)
    assert {"<|eot_id|>", "[INST]", "<|end_of_text|>"} <= control.keys()
    assert all(sizes[token.id] == 0 for token in control.values())


def test_the_bytes_of_a_rank_file_add_up():
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the", "ß".encode()]
    content = b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(ranks))
    settings = {"pattern": r"\S+|\s+", "special_tokens": {"<|endoftext|>": 300, "<|im_end|>": 301}}
    tokenizer = tokenizer_from_files({"x.tiktoken": content, "tiktoken.json": json.dumps(settings).encode()}, name="x")
    sizes = token_bytes(tokenizer)
    assert len(sizes) == 302
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert sizes[ids].sum() == len(text.encode())
    assert control_tokens(tokenizer)["<|im_end|>"].id == 301
    assert sizes[300:].tolist() == [0, 0]


def test_pieces_in_the_way_of_sentencepiece():
    vocab = {"<0x0A>": 0, "▁the": 1, "ß": 2, "</s>": 3, "<think>": 4, "<0xyz": 5}
    engine = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    engine.decoder = decoders.Replace("▁", " ")
    engine.add_special_tokens(["</s>"])
    engine.add_tokens(["<think>"])
    tokenizer = tokenizer_from_files({"tokenizer.json": engine.to_str().encode()}, name="x")
    assert token_bytes(tokenizer).tolist() == [1, 4, 2, 0, 7, 5]
    assert control_tokens(tokenizer).keys() == {"</s>"}


def test_control_tokens_say_which_white_space_they_take(chat_folder):
    settings = json.loads((chat_folder / "tokenizer.json").read_bytes())
    settings["added_tokens"][-1] |= {"lstrip": True, "rstrip": True}
    tokenizer = tokenizer_from_files({"tokenizer.json": json.dumps(settings).encode()}, name="x")
    last = control_tokens(tokenizer)["[/INST]"]
    assert (last.takes_left, last.takes_right) == (True, True)
    assert not control_tokens(tokenizer)["[INST]"].takes_right
