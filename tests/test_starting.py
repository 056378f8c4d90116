"""A new run that starts from weights: of a run, a checkpoint or a Hugging Face folder, whatever its layout."""

import json
import shutil

import fsspec
import pytest
import torch
import transformers

from ranks import run_ranks
from titan_ckpt.errors import CheckpointError
from titan_core.init import materialize
from titan_data.bpe import train_bpe
from titan_models.families.qwen3 import Qwen3Config
from titan_models.shape import MoEConfig
from titan_train.build import lay_out
from titan_train.config import ExportConfig
from titan_train.config_file import to_json
from titan_train.environment import environment
from titan_train.origin import OriginError, find_origin
from titan_train.weights import load_weights
from training_runs import change, curve, layout, metrics, titan_train, train

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
LAYOUTS = {
    "one process": (1, {}),
    "fsdp 2": (2, layout()),
    "fsdp 2 x tp 2": (4, layout(tp=2)),
    "pp 2 x tp 2": (4, layout(pp=2, tp=2)),
    "ep 2": (2, layout(ep=2)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama and its tokenizer as Hugging Face keeps them, in bfloat16 and several files."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_theta=10_000.0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(path, max_shard_size="20KB")
    for name, content in train_bpe(["some words to learn from"] * 50, 280).items():
        (path / name).write_bytes(content)
    return path


def weights_of(config, origin):
    """The whole parameters of a laid-out model after it was filled."""
    with environment(config) as env:
        layout_of_run = lay_out(config, env).layout
        materialize(layout_of_run.model, env.device)
        load_weights(layout_of_run.model, origin)
        named = layout_of_run.model.named_parameters()
        return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in named}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_rank_reads_what_it_owns(tiny, folder, tmp_path, name):
    world_size, changes = LAYOUTS[name]
    if name == "ep 2":
        torch.manual_seed(0)
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        reference = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SHAPE, **moe))
        folder = tmp_path / "qwen3"
        reference.save_pretrained(folder)
    elif "pp" in name:  # where what is tied would lie on two ranks
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
        folder = tmp_path / "untied"
        reference.save_pretrained(folder)
    else:
        reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    origin = find_origin(str(folder))
    config = change(tiny, model=origin.model, **changes)
    parts = [weights_of(config, origin)] if world_size == 1 else run_ranks(world_size, weights_of, config, origin)
    ours = {key: tensor for part in parts for key, tensor in part.items()}
    theirs = reference.state_dict()
    assert torch.equal(ours["tok_embeddings.weight"], theirs["model.embed_tokens.weight"].float())
    assert torch.equal(ours["layers.3.attention.wk.weight"], theirs["model.layers.3.self_attn.k_proj.weight"].float())
    if origin.model.moe:
        for kept, halves in (("w1", slice(0, 32)), ("w3", slice(32, 64))):
            stacked = theirs["model.layers.2.mlp.experts.gate_up_proj"][:, halves]
            assert torch.equal(ours[f"layers.2.moe.experts.{kept}"], stacked)
    else:
        assert torch.equal(
            ours["layers.0.feed_forward.w2.weight"], theirs["model.layers.0.mlp.down_proj.weight"].float()
        )
    assert len(ours) == len(dict(config.model.build().named_parameters()))


EXPORT = ExportConfig(format="huggingface", every=2, dtype="bfloat16", shard_bytes=20_000)
QWEN3_MOE = Qwen3Config(
    vocab_size=300,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden_dim=64,
    moe=MoEConfig(experts=4, hidden_dim=32, balance_loss=1e-3),
)

FLAGS = ["--training.seq-len=32", "--training.global-batch-size=4", "--training.steps=2", "--device=cpu"]


def test_the_command_needs_no_preset_and_no_tokenizer_of_its_own(corpus, folder, tmp_path):
    flags = [*FLAGS, "--data.source", corpus, "--metrics.log-every=1"]
    result = titan_train("--checkpoint.init-from", folder, *flags, "--output", tmp_path / "first")
    assert result.returncode == 0, result.stderr
    assert f"Started from the weights in {folder}" in result.stdout
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert (config["model"]["dim"], config["model"]["tie_embeddings"]) == (32, True)
    assert config["data"]["tokenizer"] == str(folder / "tokenizer.json")
    # The same command goes on with the run; a new run starts from its weights, by way of any of its places.
    again = titan_train("--checkpoint.init-from", folder, *flags, "--training.steps=3", "--output", tmp_path / "first")
    assert "Resumed from" in again.stdout, again.stderr
    losses = set()
    for number, place in enumerate(("first", "first/checkpoints", "first/checkpoints/step-3")):
        output = tmp_path / f"second-{number}"
        result = titan_train("--checkpoint.init-from", tmp_path / place, *flags, "--output", output)
        assert result.returncode == 0, result.stderr
        losses.add(curve(metrics(output))[0])
    assert len(losses) == 1
    assert losses.pop() < curve(metrics(tmp_path / "first"))[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.heads=8"], "model.heads: 4 -> 8"),
        (["--config=llama3_debug"], "model.dim: 32 -> 256"),
        (["--model.rope-theta=500000"], "model.rope_theta: 10000.0 -> 500000.0"),
    ],
)
def test_another_model_than_the_weights_are_of_is_refused(folder, flags, message):
    result = titan_train("--checkpoint.init-from", folder, *FLAGS, *flags)
    assert result.returncode == 2
    assert "are of another model" in result.stderr
    assert message in result.stderr


def test_what_holds_no_weights_is_refused(tiny, folder, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("nothing")
    file = next(folder.glob("*.safetensors"))
    for place in (tmp_path / "text", tmp_path / "nowhere", file, "strange://bucket/run"):
        result = titan_train("--checkpoint.init-from", place, *FLAGS)
        assert result.returncode == 2, place
        assert result.stderr.startswith("titan-train: "), result.stderr
    without = tmp_path / "without"
    without.mkdir()
    for file in folder.iterdir():
        if "tokenizer" not in file.name:
            (without / file.name).write_bytes(file.read_bytes())
    assert "name theirs with --data.tokenizer" in titan_train("--checkpoint.init-from", without, *FLAGS).stderr
    (without / "config.json").write_text("{}")
    with pytest.raises(OriginError, match="model_type"):
        find_origin(str(without))


def test_a_damaged_or_incomplete_source_is_refused_before_anything_changes(tiny, folder, tmp_path):
    train(change(tiny, **{"training.steps": 1}), tmp_path / "run")
    (data,) = (tmp_path / "run" / "checkpoints" / "step-1").glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    origin = find_origin(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="SHA-256"):
        weights_of(change(tiny, model=origin.model), origin)
    fewer = find_origin(str(folder))
    fewer = fewer.__class__(**{**vars(fewer), "model": change(fewer.model, layers=5)})
    with pytest.raises(CheckpointError, match=r"layers\.4\.self_attn\.q_proj\.weight is missing"):
        weights_of(change(tiny, model=fewer.model), fewer)


def test_parts_can_be_left_out_once_when_a_run_resumes(tiny, tmp_path):
    run = tmp_path / "run"
    config = change(tiny, **{"training.steps": 4})
    whole = train(tiny, tmp_path / "whole")
    train(config, run)
    path = tmp_path / "config.json"
    path.write_text(to_json(change(tiny, output=str(run))))
    first = titan_train("--config", path, "--checkpoint.exclude", "optimizer", "--training.steps=8")
    assert "without optimizer" in first.stdout, first.stderr
    second = titan_train("--config", path, "--checkpoint.exclude", "optimizer", "--training.steps=12")
    assert second.returncode == 0, second.stderr
    assert "without" not in second.stdout  # or each restart would begin with a fresh optimizer
    assert curve(metrics(run))[:5] == curve(whole)[:5]  # the loss of a step is known before the optimizer's
    assert curve(metrics(run))[5] != curve(whole)[5]
    refused = titan_train("--config", path, "--checkpoint.exclude", "model")
    assert "checkpoint.exclude names model; choose among optimizer, data, guard, rng" in refused.stderr
    nothing = titan_train("--config", path, "--checkpoint.exclude", "optimizer", "--output", tmp_path / "new")
    assert "has nothing to leave parts out of" in nothing.stderr


@pytest.mark.parametrize("experts", [None, MoEConfig(experts=4, hidden_dim=32, bias_update_rate=1e-3)])
def test_a_checkpoint_says_which_model_it_holds(tiny, tmp_path, experts):
    model = Qwen3Config(vocab_size=300, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden_dim=64, moe=experts)
    train(change(tiny, model=model, **{"training.steps": 1}), tmp_path / "run")
    origin = find_origin(str(tmp_path / "run"))
    assert origin.model == model
    assert origin.tokenizer.endswith("step-1/files/tokenizer.json")
    assert set(weights_of(change(tiny, model=model), origin)) == set(dict(model.build().named_parameters()))


EXPORTED = {
    "llama": (2, {**layout(tp=2), "model.tie_embeddings": True}),
    "qwen3, experts": (2, {**layout(ep=2), "model": QWEN3_MOE}),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_run_exports_what_transformers_loads(tiny, tmp_path, name):
    world_size, changes = EXPORTED[name]
    run = tmp_path / "run"
    config = change(tiny, **changes, **{"training.steps": 4, "export": EXPORT})
    train(config, run, world_size)
    assert sorted(path.name for path in (run / "hugging_face").iterdir()) == ["step-2", "step-4"]
    folder = run / "hugging_face" / "step-4"
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    changed = bytearray((data := next(folder.glob("model-*.safetensors"))).read_bytes())
    changed[-1] ^= 1
    (copy := tmp_path / "copy").mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(bytes(changed) if file == data else file.read_bytes())
    damaged = find_origin(str(copy))
    with pytest.raises(CheckpointError, match=data.name):
        weights_of(change(tiny, model=damaged.model), damaged)
    # What was exported starts a run of the same model, with the weights rounded.
    origin = find_origin(str(folder))
    again = weights_of(change(tiny, model=origin.model), origin)
    saved = weights_of(change(tiny, model=origin.model), find_origin(str(run)))
    for key, weight in saved.items():
        assert torch.equal(again[key], weight.bfloat16().float()), key
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("some words")).endswith("some words")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_an_export_that_failed_or_is_asked_for_late_is_made_up_for(tiny, tmp_path):
    run = tmp_path / "run"
    path = tmp_path / "config.json"
    path.write_text(to_json(change(tiny, output=str(run), **{"training.steps": 2, "export": EXPORT})))
    (in_the_way := run / "hugging_face" / "step-2").mkdir(parents=True)
    (in_the_way / "notes.txt").write_text("precious")
    failed = titan_train("--config", path)
    assert failed.returncode == 1
    assert (in_the_way / "notes.txt").exists()
    in_the_way.rename(tmp_path / "elsewhere")
    again = titan_train("--config", path)
    assert "Exported" in again.stdout, again.stderr
    assert "This run is finished" in again.stdout
    assert (in_the_way / "model.safetensors.index.json").exists()
    assert "Exported" not in titan_train("--config", path).stdout


def test_a_run_stands_alone_once_it_has_begun(corpus, folder, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(folder, source)
    start = ["--checkpoint.init-from", source, *FLAGS, "--data.source", corpus, "--output", run]
    assert titan_train(*start).returncode == 0
    other = titan_train("--checkpoint.init-from", folder, *start[2:], "--training.steps=3")
    assert other.returncode == 2
    assert f"has begun from {source}, so --checkpoint.init-from {folder} would have no effect" in other.stderr
    shutil.rmtree(source)
    for same in (start, ["--config", run / "config.json"]):
        steps = len(metrics(run)) + 2
        result = titan_train(*same, f"--training.steps={steps}")
        assert "Resumed from" in result.stdout, result.stderr


def test_weights_behind_a_url_bring_their_tokenizer(s3_server, corpus, folder, tmp_path):
    bucket = fsspec.filesystem("s3")
    bucket.put(str(folder), "titan/llama", recursive=True)
    start = ["--checkpoint.init-from", "s3://titan/llama", *FLAGS, "--data.source", corpus]
    result = titan_train(*start, "--output", tmp_path / "run")
    assert "Started from the weights in s3://titan/llama" in result.stdout, result.stderr
    local = titan_train("--checkpoint.init-from", folder, *start[2:], "--output", tmp_path / "local")
    assert local.returncode == 0, local.stderr
    assert curve(metrics(tmp_path / "run")) == curve(metrics(tmp_path / "local"))


def test_what_cannot_be_exported_is_refused(tmp_path):
    flags = [*FLAGS, "--export.format", "huggingface", "--output", tmp_path / "run"]
    assert "made from checkpoints" in titan_train(*flags, "--checkpoint.no-enabled").stderr
    moe = ["--module=qwen3", "--config=qwen3_debug_moe", "--model.moe.groups=2", "--model.moe.top-groups=1"]
    assert "cannot express this model" in titan_train(*flags, *moe).stderr
