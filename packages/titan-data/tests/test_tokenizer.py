import json
import shutil
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from titan_data.errors import DataError
from titan_data.tokenizer import HuggingFaceTokenizer, load_tokenizer


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
    assert encoded[2] == []
    assert 259 < tokenizer.vocab_size <= 310


def test_a_folder_and_its_file_are_the_same_tokenizer(bpe_folder):
    assert load_tokenizer(bpe_folder).hash == load_tokenizer(bpe_folder / "tokenizer.json").hash


def test_text_that_looks_like_a_special_token_is_text(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    text = "a<|end_of_text|>b<|begin_of_text|><|pad|>"
    (ids,) = tokenizer.encode_batch([text])
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
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

    plain = load_tokenizer(folder).encode_batch(["Whose woods these are"])
    rewrite(folder, change)
    assert load_tokenizer(folder).encode_batch(["Whose woods these are"]) == plain


@pytest.mark.parametrize(
    "names",
    [
        ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
        ("<s>", "</s>", "<pad>"),
        ("<bos>", "<eos>", "<pad>"),
        ("<|startoftext|>", "<|endoftext|>", "<|pad|>"),
    ],
)
def test_usual_names_of_special_tokens_are_known(folder, names):
    (folder / "tokenizer_config.json").unlink()
    rename_specials(folder, names)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)


def test_companion_files_name_the_special_tokens(folder):
    rename_specials(folder, ("[A]", "[B]", "[C]"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "[C]"}, "bos_token": null}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "[A]", "bos_token": "[B]"}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)


def test_the_hash_changes_with_the_tokens_and_with_the_end_of_text_only(folder):
    original = load_tokenizer(folder).hash
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>", "model_max_length": 7}')
    assert load_tokenizer(folder).hash == original
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
    assert load_tokenizer(folder).hash != original
    (folder / "tokenizer_config.json").unlink()
    rewrite(folder, lambda content: content["model"]["merges"].pop())
    assert load_tokenizer(folder).hash != original


def test_its_files_make_the_same_tokenizer_again(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "unrelated.bin").write_text("x")
    tokenizer = load_tokenizer(folder)
    assert set(tokenizer.files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in tokenizer.files.items():
        (copy / name).write_bytes(content)
    assert load_tokenizer(copy).hash == tokenizer.hash
    assert load_tokenizer(copy).eos_id == tokenizer.eos_id


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


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer '.*nowhere' does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_of_text_is_refused_with_the_remedy(folder):
    rename_specials(folder, ("[A]", "[B]", "[C]"))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"has no end-of-text token.*tokenizer_config\.json"):
        load_tokenizer(folder)


def test_a_companion_file_that_contradicts_the_vocabulary_is_refused(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    with pytest.raises(DataError, match=r"its eos_token '<\|stop\|>' is not in its vocabulary"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json beside .* is not JSON"):
        load_tokenizer(folder)


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
    assert tokenizer.encode_batch(["a b </s>"]) == [[2, 0, 0, 0, 0]]


FORK_AFTER_USE = """
import os, sys
from pathlib import Path
from titan_data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]))
tokenizer.encode_batch(["some text"] * 100)
pid = os.fork()
if pid == 0:
    tokenizer.encode_batch(["some text"] * 100)
    os._exit(0)
print(os.waitpid(pid, 0)[1], os.environ["TOKENIZERS_PARALLELISM"])
"""


@pytest.mark.parametrize(("chosen", "left"), [(None, "false"), ("true", "true"), ("false", "false")])
def test_a_fork_after_use_is_quiet_and_does_not_hang(bpe_folder, chosen, left):
    import os

    env = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    env |= {"RAYON_NUM_THREADS": "2"} | ({"TOKENIZERS_PARALLELISM": chosen} if chosen else {})
    if chosen == "true":
        code = FORK_AFTER_USE.replace("    tokenizer.encode_batch", "    tokenizer.decode([1]) #")
    else:
        code = FORK_AFTER_USE
    run = subprocess.run(
        [sys.executable, "-c", code, str(bpe_folder)], env=env, capture_output=True, text=True, timeout=30
    )
    assert run.stderr == ""
    assert run.stdout.split() == ["0", left]
