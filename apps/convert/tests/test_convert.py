"""The promises of the command: bitwise there and back, the same logits everywhere, and refusals of what is wrong."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiny_models import as_meta, logits, native_logits, same, weights
from titan_ckpt.checkpointer import Checkpointer
from titan_convert.cli import main
from titan_models.families.qwen3 import Qwen3Config
from titan_models.model_file import to_json
from titan_models.shape import MoEConfig

Saved = Callable[..., Path]


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hugging_face_to_dcp_and_back(saved: Saved, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    source, step, out = saved(kind, dtype), tmp_path / "step-0", tmp_path / "out"
    assert run("hf-to-dcp", source, step, "--no-check") == 0
    assert run("dcp-to-hf", step, out, "--no-check") == 0
    assert same(weights(source), weights(out))
    expected = logits(source)
    assert expected.std() > 0.1  # else a small difference would mean nothing
    assert (logits(out) - expected).abs().max() == 0
    if dtype == torch.float32:
        assert (native_logits(step) - expected).abs().max() < 1e-4
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    # What it took from us stays as it was; only the experts' number has its published name again.
    theirs.pop("num_local_experts", None)
    assert {name: ours.get(name) for name in theirs if theirs[name] not in (None, False)} == {
        name: value for name, value in theirs.items() if value not in (None, False)
    } | ({"layer_types": None} if "layer_types" in theirs else {})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_a_training_run_of_ours_becomes_a_folder_of_transformers(tmp_path: Path, tied: bool) -> None:
    config = Qwen3Config(vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden_dim=48)
    config = dataclasses.replace(config, tie_embeddings=tied, moe=MoEConfig(experts=4, top_k=2, hidden_dim=24))
    model = config.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    files = {"model.json": to_json(config).encode(), "config.json": b'{"type": "a run\'s own"}'}
    optimizer = torch.nn.ParameterDict({"exp_avg": torch.ones(3)})
    Checkpointer(tmp_path).save(5, {"model": model, "optimizer": optimizer}, files=files)
    assert run("dcp-to-hf", tmp_path / "step-5", tmp_path / "out", "--no-check") == 0
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        assert (logits(tmp_path / "out") - model(tokens, tokens)).abs().max() < 1e-4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "titan-convert.json",
    }


def test_a_router_with_a_bias_has_no_place_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Qwen3Config(vocab_size=64, dim=32, layers=1, moe=MoEConfig(experts=4, bias_update_rate=0.1))
    model = config.build()
    Checkpointer(tmp_path).save(5, {"model": model}, files={"model.json": to_json(config).encode()})
    assert run("dcp-to-hf", tmp_path / "step-5", tmp_path / "out") == 1
    assert "model.moe.bias_update_rate is 0.1" in capsys.readouterr().err


def test_many_shards_in_and_out(saved: Saved, tmp_path: Path) -> None:
    source = saved("qwen3-moe", max_shard_size="50KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    assert run("hf-to-dcp", source, tmp_path / "step-0", "--no-check") == 0
    assert run("dcp-to-hf", tmp_path / "step-0", tmp_path / "out", "--shard-size", "40KB", "--no-check") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > len(list(source.glob("*.safetensors")))
    assert same(weights(source), weights(tmp_path / "out"))
    assert (logits(tmp_path / "out") - logits(source)).abs().max() == 0


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("kind", ["llama-scaled", "llama-scaled-tied"])
def test_meta_to_dcp_to_hugging_face_to_dcp_to_meta(saved: Saved, tmp_path: Path, kind: str, shards: int) -> None:
    source, meta = saved(kind), tmp_path / "meta"
    as_meta(source, meta, shards)
    assert run("llama-to-dcp", meta, tmp_path / "step-1", "--no-check") == 0
    assert run("dcp-to-hf", tmp_path / "step-1", tmp_path / "hf", "--no-check") == 0
    assert same(weights(tmp_path / "hf"), weights(source))
    expected = logits(source)
    assert (logits(tmp_path / "hf") - expected).abs().max() < 1e-4
    assert (native_logits(tmp_path / "step-1") - expected).abs().max() < 1e-4
    assert run("hf-to-dcp", tmp_path / "hf", tmp_path / "step-2", "--no-check") == 0
    assert run("dcp-to-llama", tmp_path / "step-2", tmp_path / "again", "--shards", shards, "--no-check") == 0
    for rank in range(shards):
        name = f"consolidated.{rank:02}.pth"
        one, two = (torch.load(folder / name, weights_only=True) for folder in (meta, tmp_path / "again"))
        assert same(one, two)
    assert run("llama-to-dcp", tmp_path / "again", tmp_path / "step-3", "--no-check") == 0
    assert run("diff", tmp_path / "step-1", tmp_path / "step-3") == 0
    assert (tmp_path / "step-1" / "files" / "tokenizer.model").read_bytes() == b"tokens"


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("llama", "torchtitan"),
        ("llama-tied", "torchtitan"),
        ("llama", "torchtitan-0.2"),
        ("llama", "torchtune"),
        ("llama-tied", "torchtune"),
        ("qwen3-moe", "torchtitan"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_other_frameworks_names_in_dcp(saved: Saved, tmp_path: Path, kind: str, keys: str) -> None:
    import torch.distributed.checkpoint as torch_dcp

    from titan_ckpt import dcp

    source = saved(kind)
    assert run("hf-to-dcp", source, tmp_path / "theirs", "--keys", keys, "--no-check") == 0
    entries = dcp.tensor_entries(dcp.read_metadata(tmp_path / "theirs"))
    start = "model." if keys == "torchtune" else ""
    expected = {
        "torchtitan": "layers.0.attention.qkv_linear.wq.weight",
        "torchtitan-0.2": "layers.0.attention.wq.weight",
        "torchtune": "model.layers.0.attn.q_proj.weight",
    }[keys]
    assert expected in entries
    head = {"torchtitan": "lm_head.weight", "torchtitan-0.2": "output.weight", "torchtune": "model.output.weight"}[keys]
    assert (head in entries) == (kind != "llama-tied" or keys != "torchtune")
    # As they save it: with torch's own writer, other state beside the model, and no manifest.
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    torch_dcp.load(state, checkpoint_id=tmp_path / "theirs")
    state |= {"optimizer.state.w.exp_avg": torch.ones(3), "train_state": torch.ones(1)}
    torch_dcp.save(state, checkpoint_id=tmp_path / "plain")
    wq = state[expected].unflatten(0, (-1, 8))
    hf = weights(source)["model.layers.0.self_attn.q_proj.weight"].unflatten(0, (-1, 8))
    turned = kind.startswith("llama")
    assert torch.equal(wq[:, 1], hf[:, 4 if turned else 1])  # neighbours are partners, or rows i and i + H/2
    assert start in expected
    back = ("dcp-to-hf", tmp_path / "plain", tmp_path / "out", "--keys", keys)
    assert run(*back) == 1  # nothing says which model it is
    assert run(*back, "--config", source, "--no-check") == 0
    assert same(weights(tmp_path / "out"), weights(source))


def test_a_family_without_such_names_is_refused(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("hf-to-dcp", saved("qwen3"), tmp_path / "out", "--keys", "torchtune") == 1
    assert "no names of 'torchtune'; it has hf, torchtitan" in capsys.readouterr().err
    assert run("hf-to-dcp", tmp_path / "qwen3", tmp_path / "step-0", "--no-check") == 0
    assert run("dcp-to-llama", tmp_path / "step-0", tmp_path / "out") == 1


def test_a_folder_made_of_a_training_run_names_the_tokens_of_its_tokenizer(tmp_path: Path) -> None:
    config = Qwen3Config(vocab_size=64, dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, hidden_dim=48)
    files = {
        "model.json": to_json(config).encode(),
        "config.json": b'{"type": "a run\'s own"}',
        "tokenizer.json": b'{"added_tokens": [{"id": 7, "content": "<end>"}], "model": {"vocab": {"a": 0, "<s>": 3}}}',
        "tokenizer_config.json": b'{"eos_token": {"content": "<end>"}, "bos_token": "<s>", "pad_token": null}',
    }
    Checkpointer(tmp_path).save(5, {"model": config.build()}, files=files)
    assert run("dcp-to-hf", tmp_path / "step-5", tmp_path / "out", "--no-check") == 0
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "out" / name).read_text())
        tokens = {name: value for name, value in values.items() if name.endswith("token_id")}
        assert tokens == {"eos_token_id": 7, "bos_token_id": 3}


# ---- what others let through


def edited(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refused(capsys: pytest.CaptureFixture[str], root: Path, *arguments: object) -> str:
    """The message of a conversion that is refused and leaves nothing."""
    before = sorted(path for path in root.rglob("*") if "__pycache__" not in path.parts)
    capsys.readouterr()
    assert run(*arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert sorted(path for path in root.rglob("*") if "__pycache__" not in path.parts) == before
    return output.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "model.layers.2.self_attn.q_proj.weight in model.safetensors is not known"),
        ({"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight is missing"),
        ({"num_attention_heads": 4}, "q_proj.weight in model.safetensors is [48, 48], and [32, 48] is expected"),
        ({"num_key_value_heads": 3}, "k_proj.weight in model.safetensors is [16, 48], and [24, 48] is expected"),
        ({"head_dim": 16}, "q_proj.weight in model.safetensors is [48, 48], and [96, 48] is expected"),
        ({"intermediate_size": 81}, "[81, 48] is expected"),
        ({"vocab_size": 131}, "[131, 48] is expected"),
        ({"tie_word_embeddings": True}, "lm_head.weight in model.safetensors has other numbers than tok_embeddings"),
        ({"rope_theta": 9.0}, "rope_parameters.rope_theta is 500.0 and rope_theta is 9.0: they contradict"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, and a number"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    ],
)
def test_a_configuration_that_disagrees_with_the_weights_is_refused(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    source = saved()
    edited(source, **changes)
    assert message in refused(capsys, tmp_path, "hf-to-dcp", source, tmp_path / "out")


@pytest.mark.parametrize("command", ["dcp-to-hf", "dcp-to-llama"])
def test_a_configuration_is_named_only_where_the_source_has_none_or_the_same(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    source, step = saved("llama-scaled"), tmp_path / "step-0"
    assert run("hf-to-dcp", source, step, "--no-check") == 0
    assert run(command, step, tmp_path / "same", "--config", source, "--no-check") == 0
    edited(source, rms_norm_eps=0.5, tie_word_embeddings=True)
    message = refused(capsys, tmp_path, command, step, tmp_path / "out", "--config", source)
    assert "norm_eps: 1e-05 and 0.5; tie_embeddings: False and True. Leave out --config." in message


def test_no_config_and_leftover_shards_are_refused(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved()
    save_file({"x": torch.ones(1)}, source / "model-00009-of-00009.safetensors")
    message = refused(capsys, tmp_path, "hf-to-dcp", source, tmp_path / "out")
    assert "model-00009-of-00009.safetensors is left over" in message
    (source / "model-00009-of-00009.safetensors").unlink()
    (source / "config.json").unlink()
    assert "has no config.json" in refused(capsys, tmp_path, "hf-to-dcp", source, tmp_path / "out")


def test_a_payload_that_was_changed_is_found(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("hf-to-dcp", saved(), tmp_path / "step-0", "--no-check") == 0
    data = tmp_path / "step-0" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    message = refused(capsys, tmp_path, "dcp-to-hf", tmp_path / "step-0", tmp_path / "out")
    assert "__0_0.distcp has other bytes than were written" in message
    assert run("verify", tmp_path / "step-0") == 1


def test_a_changed_payload_of_a_download_is_found_by_the_hubs_hashes(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved()
    file = source / "model.safetensors"
    note = source / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n1.0\n")
    assert run("hf-to-dcp", source, tmp_path / "step-0", "--no-check") == 0
    assert "the source verified by its hashes" in capsys.readouterr().out
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    message = refused(capsys, tmp_path, "hf-to-dcp", source, tmp_path / "out", "--no-check")
    assert "model.safetensors has other bytes than were written" in message
    assert run("hf-to-dcp", source, tmp_path / "out", "--no-check", "--no-verify-hashes") == 0


def test_numbers_stay_in_their_dtype_unless_another_is_asked_for(saved: Saved, tmp_path: Path) -> None:
    source = saved(dtype=torch.bfloat16)
    assert run("hf-to-dcp", source, tmp_path / "step-0", "--dtype", "float32", "--no-check") == 0
    assert run("dcp-to-hf", tmp_path / "step-0", tmp_path / "out", "--no-check") == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert run("dcp-to-hf", tmp_path / "step-0", tmp_path / "half", "--dtype", "bfloat16", "--no-check") == 0
    assert same(weights(tmp_path / "half"), weights(source))


def test_a_forgotten_name_of_the_project_is_the_first_thing_said(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("hf-to-dcp", saved(), tmp_path / "step-0", "--keys", "torchtitan", "--no-check") == 0
    message = refused(capsys, tmp_path, "dcp-to-hf", tmp_path / "step-0", tmp_path / "out", "--no-check")
    assert "nothing was written. 30 of the 30 names of this model are not there: " in message
    assert "--keys and --config" in message
    assert message.rstrip().endswith("and 23 more.")


def test_a_file_in_the_place_of_a_folder_is_refused(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved() / "model.safetensors"
    for command in ("hf-to-dcp", "llama-to-dcp", "dcp-to-hf"):
        message = refused(capsys, tmp_path, command, file, tmp_path / "out", "--no-check")
        assert f"is a file, and a folder is wanted: name the one that it is in, {file.parent}" in message


def test_a_plan_can_be_looked_at(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved("llama-scaled")
    assert run("hf-to-dcp", source, tmp_path / "step-0", "--no-check") == 0
    capsys.readouterr()
    assert run("dcp-to-llama", tmp_path / "step-0", tmp_path / "out", "--shards", 2, "--dry-run") == 0
    table = capsys.readouterr().out
    assert "layers.1.attention.wq.weight" in table
    assert "rotary (result), split 0 (result)" in table
    assert "consolidated.01.pth" in table
    assert not (tmp_path / "out").exists()
    edited(source, num_hidden_layers=2)
    assert run("hf-to-dcp", source, tmp_path / "out", "--dry-run") == 1
    assert "problem: model.layers.2." in capsys.readouterr().err


def test_a_shard_has_whole_heads(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("hf-to-dcp", saved("llama-scaled"), tmp_path / "step-0", "--no-check") == 0
    message = refused(capsys, tmp_path, "dcp-to-llama", tmp_path / "step-0", tmp_path / "out", "--shards", 8)
    assert "8 shards don't divide the 4 heads of keys" in message


def test_killed_and_run_again(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved("qwen3-moe")
    assert run("hf-to-dcp", source, tmp_path / "step-0", "--no-check") == 0
    command = ["dcp-to-hf", str(tmp_path / "step-0"), str(tmp_path / "out"), "--shard-size", "10KB", "--no-check"]
    process = subprocess.Popen([sys.executable, "-m", "titan_convert", *command], stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / "titan-convert.partial"
    while not (len(list(journal.glob("model-*"))) >= 3 or process.poll() is not None):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    capsys.readouterr()
    if not (tmp_path / "out").exists():  # else it was too fast for us
        assert main(command) == 0
        assert "from the run before" in capsys.readouterr().out
    assert same(weights(tmp_path / "out"), weights(source))
    assert not (tmp_path / "out.partial").exists()
