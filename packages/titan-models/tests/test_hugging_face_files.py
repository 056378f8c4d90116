import json
from typing import Any

import pytest

from titan_models.families.qwen3 import Qwen3Config
from titan_models.hugging_face_files import settings_files, special_tokens


def found(tokenizer: Any, vocab_size: int = 100, **settings: Any) -> dict[str, int]:
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
    return special_tokens({name: json.dumps(values).encode() for name, values in files.items()}, vocab_size)


@pytest.mark.parametrize("vocab", [{"x": 0, "<end>": 1}, [["x", -1.0], ["<end>", -2.5]]])
def test_tokens_are_found_in_every_kind_of_vocabulary(vocab: Any) -> None:
    assert found({"model": {"vocab": vocab}}, eos_token="<end>") == {"eos_token_id": 1}
    added = {"model": {"vocab": vocab}, "added_tokens": [{"id": 9, "content": "<pad>"}]}
    assert found(added, eos_token={"content": "<end>"}, pad_token="<pad>", bos_token=None) == {
        "eos_token_id": 1,
        "pad_token_id": 9,
    }


def test_what_the_model_or_the_tokenizer_does_not_know_is_left_out() -> None:
    assert found({"model": {"vocab": {"<end>": 100}}}, eos_token="<end>") == {}
    assert found({"model": {"vocab": {"a": 0}}}, eos_token="<end>", bos_token=["a"]) == {}
    assert found({"version": "1.0", "model": None}, eos_token="<end>") == {}
    assert special_tokens({}, 100) == special_tokens({"tokenizer.json": b"{", "tokenizer_config.json": b"[]"}, 9) == {}


def test_the_settings_of_the_tokenizer_go_before_its_map_of_special_tokens() -> None:
    tokenizer = json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}).encode()
    settings = {"tokenizer_config.json": b'{"eos_token": "a"}', "special_tokens_map.json": b'{"eos_token": "b"}'}
    files = {"tokenizer.json": tokenizer, **settings}
    assert special_tokens(files, 2) == {"eos_token_id": 0}
    del files["tokenizer_config.json"]
    assert special_tokens(files, 2) == {"eos_token_id": 1}


CONFIG = Qwen3Config(vocab_size=64, dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, hidden_dim=48)


def test_the_files_of_a_run_name_the_tokens_of_its_tokenizer() -> None:
    carried = {
        "config.json": b'{"type": "a run\'s own", "dim": 3}',
        "tokenizer.json": b'{"model": {"vocab": {"a": 0, "<s>": 3, "</s>": 4}}}',
        "tokenizer_config.json": b'{"eos_token": "</s>", "bos_token": "<s>"}',
    }
    files = settings_files(CONFIG, "bfloat16", carried, {"eos_token_id": 9})
    assert list(files) == ["generation_config.json", "config.json"]
    values = {name: json.loads(content) for name, content in files.items()}
    assert values["generation_config.json"] == {"_from_model_config": True, "bos_token_id": 3, "eos_token_id": 9}
    assert values["config.json"]["model_type"] == "qwen3"
    assert values["config.json"]["eos_token_id"] == 9
    assert "dim" not in values["config.json"]


def test_what_the_model_came_with_is_kept() -> None:
    carried = {
        "config.json": b'{"model_type": "qwen3", "eos_token_id": [1, 2], "max_position_embeddings": 77}',
        "generation_config.json": b'{"temperature": 0.6}',
        "tokenizer_config.json": b'{"eos_token": "a"}',
        "tokenizer.json": b'{"model": {"vocab": {"a": 0}}}',
    }
    files = settings_files(CONFIG, "float32", carried)
    assert files["generation_config.json"] == carried["generation_config.json"]
    values = json.loads(files["config.json"])
    assert (values["eos_token_id"], values["max_position_embeddings"]) == ([1, 2], 77)
    del carried["generation_config.json"]
    generation = json.loads(settings_files(CONFIG, "float32", carried)["generation_config.json"])
    assert generation == {"_from_model_config": True, "eos_token_id": [1, 2]}
