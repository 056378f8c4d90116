import json

import pytest

from titan_data.errors import DataError
from titan_data.special_tokens import find_special_tokens


def find(names, **companions):
    files = {f"{name}.json": json.dumps(content).encode() for name, content in companions.items()}
    return find_special_tokens(files, {name: id for id, name in enumerate(names)}.get, name="mine")


@pytest.mark.parametrize(
    "names",
    [
        ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
        ("<s>", "</s>", "<pad>"),
        ("<bos>", "<eos>", "<pad>"),
        ("<|startoftext|>", "<|endoftext|>", "<|pad|>"),
    ],
)
def test_usual_names_are_known(names):
    assert find(names) == (0, 1, 2)


def test_companion_files_name_them_and_the_first_decides():
    config = {"eos_token": {"content": "[C]"}, "bos_token": None}
    others = {"eos_token": "[A]", "bos_token": "[B]"}
    assert find(("[A]", "[B]", "[C]"), tokenizer_config=config, special_tokens_map=others) == (1, 2, None)


def test_without_an_end_of_text_the_remedy_is_named():
    with pytest.raises(DataError, match=r"mine has no end-of-text token.*tokenizer_config\.json"):
        find(("[A]", "[B]"))


def test_a_companion_file_that_contradicts_the_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"mine: its eos_token '<\|stop\|>' is not in its vocabulary"):
        find(("</s>",), tokenizer_config={"eos_token": "<|stop|>"})
    with pytest.raises(DataError, match=r"tokenizer_config\.json beside mine is not JSON"):
        find_special_tokens({"tokenizer_config.json": b"{"}, {"</s>": 0}.get, name="mine")
