"""Low-precision recipes and LoRA through whole runs: the same on every layout that leaves their scales alone."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from titan_models.families.qwen3 import Qwen3Config
from titan_models.shape import MoEConfig
from titan_quant.config import LoRAConfig, QuantConfig
from titan_train.config import TrainConfig
from titan_train.config_file import to_json
from titan_train.explain import explain
from training_runs import FLOAT64, TINY, change, curve, layout, metrics, titan_train, train

RECIPES = ("float8_tensorwise", "float8_rowwise", "float8_rowwise_with_gw_hp", "mxfp8", "nvfp4")
STEPS = {"training.steps": 3, "schedule.total_steps": 3}
# One micro-batch of the same rows on every layout: what a scale may span is then the same.
# Widths that two ranks cut into multiples of 32.
WIDTHS = {"model.dim": 64, "model.heads": 4, "model.kv_heads": 4, "model.head_dim": 16}
BASE = change(TINY, precision=FLOAT64, **{"training.global_batch_size": 4, **WIDTHS, **STEPS})
MIXTURE = change(
    BASE,
    model=Qwen3Config(
        vocab_size=300,
        dim=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        hidden_dim=64,
        moe=MoEConfig(experts=4, top_k=2, hidden_dim=32),
    ),
)


def quantized(recipe: str, base: TrainConfig = BASE, **options: Any) -> TrainConfig:
    return change(base, quant=QuantConfig(recipe=recipe, emulate=True, skip_small=False, **options))


LAYOUTS = {
    "fsdp 2": (2, {"dp_shard": 2}, {"training.micro_batch_size": 2}),
    "tp 2": (2, {"tp": 2}, {}),
    "tp 2 without sequence parallel": (2, {"tp": 2, "sequence_parallel": False}, {}),
    "pp 2": (2, {"pp": 2}, {"training.micro_batch_size": 2}),
    "fsdp 2 x tp 2": (4, {"dp_shard": 2, "tp": 2}, {"training.micro_batch_size": 2}),
}


# The others' parts are in these: by default each recipe on one of the two, among the slow tests on all layouts.
TELLING = ("fsdp 2 x tp 2", "pp 2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The curve of one process, by configuration; computed once."""
    known: dict[str, list[float]] = {}

    def get(config: TrainConfig) -> list[float]:
        key = to_json(config)
        if key not in known:
            known[key] = curve(train(config, tmp_path_factory.mktemp("alone") / "run"))
        return known[key]

    return get


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        pytest.param(recipe, name, marks=[] if name == telling else pytest.mark.slow)
        for recipe, telling in zip(RECIPES, itertools.cycle(TELLING), strict=False)
        for name in LAYOUTS
    ],
)
def test_a_layout_changes_nothing(alone: Any, recipe: str, name: str, tmp_path: Path) -> None:
    """With micro-batches of the same rows, which are what some scales span."""
    world_size, degrees, changes = LAYOUTS[name]
    config = change(quantized(recipe), **changes)
    ours = curve(train(config, tmp_path / "run", world_size, **layout(**degrees)))
    assert ours == pytest.approx(alone(config), rel=1e-9)
    assert ours != pytest.approx(alone(change(BASE, **changes)), rel=1e-6), "the recipe did nothing"


# Half a unit in the last place of the narrowest format that a recipe rounds to: see titan-quant's README.
UNITS = {"float8_tensorwise": 2**-3, "float8_rowwise": 2**-4, "float8_rowwise_with_gw_hp": 2**-4, "mxfp8": 2**-4}


@pytest.mark.parametrize("name", ["cp 2", "micro-batches of 1"])
@pytest.mark.parametrize("recipe", UNITS)
def test_where_other_tokens_share_a_scale_losses_stay_close(alone: Any, recipe: str, name: str, tmp_path: Path) -> None:
    """The exception: the first loss is as near as the format's rounding of one product, or the same."""
    config = quantized(recipe)
    world_size, changes = (2, layout(cp=2)) if name == "cp 2" else (1, {"training.micro_batch_size": 1})
    ours, expected = curve(train(change(config, **changes), tmp_path / "run", world_size)), alone(config)
    assert ours[0] == pytest.approx(expected[0], rel=UNITS[recipe])
    if recipe != "float8_tensorwise":  # the scales of others' outputs span no tokens
        assert ours[0] == pytest.approx(expected[0], rel=1e-9)
    if recipe == "float8_rowwise_with_gw_hp":  # nor those of its gradients
        assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("float8_tensorwise", {"remat.mode": "full"}),
        ("mxfp8", {"remat.mode": "selective"}),
        *(
            pytest.param(recipe, {"compile.enabled": True, "compile.backend": "aot_eager"}, marks=pytest.mark.slow)
            for recipe in ("float8_tensorwise", "mxfp8")
        ),
    ],
)
def test_recomputing_and_compiling_change_nothing(
    alone: Any, recipe: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = quantized(recipe)
    ours = curve(train(change(config, **changes), tmp_path / "run", 2, **layout(tp=2)))
    assert ours == pytest.approx(alone(config), rel=1e-9)


@pytest.mark.parametrize("recipe", ["float8_rowwise", "mxfp8"])
def test_experts_compute_in_low_precision_too(alone: Any, recipe: str, tmp_path: Path) -> None:
    config = quantized(recipe, MIXTURE, experts=True)
    plain = quantized(recipe, MIXTURE)
    assert alone(config) != pytest.approx(alone(plain), rel=1e-6)
    # Scales of the gradients of experts' weights span the tokens that a rank computes, which ep shares out otherwise.
    ours = curve(train(config, tmp_path / "ep", 2, **layout(dp_shard=2, ep=2), **{"training.micro_batch_size": 2}))
    assert ours[0] == pytest.approx(alone(config)[0], rel=1e-9)
    assert ours == pytest.approx(alone(config), rel=1e-3)


def test_a_gather_in_float8_changes_no_bit(tmp_path: Path) -> None:
    config = change(quantized("float8_tensorwise"), precision=TINY.precision, **layout(dp_shard=2))
    with_it = change(config, **{"quant.float8_gather": True})
    expected = curve(train(config, tmp_path / "without", 2))
    assert curve(train(with_it, tmp_path / "with", 2)) == expected
    sent = {gathers: _gathered(each) for gathers, each in ((False, config), (True, with_it))}
    assert sent[False].keys() == {"float32"}
    assert sent[True]["uint8"] < sent[False]["float32"] / 2


def _gathered(config: TrainConfig) -> dict[str, int]:
    flows = [flow for flow in explain(config, 2).traffic if flow.cause == "parameters gathered by FSDP"]
    return {flow.dtype: flow.sent_bytes for flow in flows}


def test_activations_travel_as_float8_between_cut_layers() -> None:
    config = change(quantized("float8_tensorwise"), precision=TINY.precision, **layout(tp=2))
    counts = {}
    for kind, each in {"float8": config, "plain": change(config, quant=QuantConfig())}.items():
        flows = [flow for flow in explain(each, 2).traffic if (flow.axis, flow.kind) == ("tp", "all-gather")]
        counts[kind] = {flow.dtype: flow.count for flow in flows}
    # Into each region forward and, from behind it, backward: of two blocks, attention and feed-forward.
    assert counts["float8"]["uint8"] == 2 * 2 * 2
    assert "uint8" not in counts["plain"]
    assert counts["plain"]["float32"] - counts["float8"]["float32"] == 2 * 2 * 2


def test_a_dry_run_names_what_travels_in_float8(tmp_path: Path) -> None:
    config = change(quantized("float8_tensorwise"), precision=TINY.precision)
    (tmp_path / "config.json").write_text(to_json(config))
    flags = ("--dry-run", "--world-size", 4, "--parallel.dp-shard", 4, "--quant.float8-gather")
    result = titan_train("--config", tmp_path / "config.json", *flags)
    (line,) = [line for line in result.stdout.splitlines() if "uint8" in line]
    assert "all-gather" in line


def test_weights_are_kept_in_high_precision(tmp_path: Path) -> None:
    """A run goes on from its checkpoint bitwise, and without its recipe if that is allowed."""
    config = change(quantized("float8_rowwise"), precision=TINY.precision)
    straight = curve(train(config, tmp_path / "straight"))
    train(config, tmp_path / "cut", **{"training.steps": 2})
    other = change(config, quant=QuantConfig(), output=str(tmp_path / "cut"))
    (tmp_path / "config.json").write_text(to_json(other))
    refused = titan_train("--config", tmp_path / "config.json")
    assert "quant.recipe: float8_rowwise -> none" in refused.stderr
    assert curve(train(config, tmp_path / "cut")) == straight
    allowed = {"checkpoint.allow_changes": True, "training.steps": 4}
    assert len(curve(train(other, tmp_path / "cut", **allowed))) == 4


# ---- LoRA


ADAPTERS = LoRAConfig(rank=4, alpha=8.0)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        pytest.param(recipe, name, marks=[] if name == telling else pytest.mark.slow)
        for recipe, telling in (("none", "pp 2"), ("float8_rowwise", "fsdp 2 x tp 2"))
        for name in LAYOUTS
    ],
)
def test_adapters_on_any_layout(alone: Any, recipe: str, name: str, tmp_path: Path) -> None:
    world_size, degrees, changes = LAYOUTS[name]
    base = BASE if recipe == "none" else quantized(recipe)
    config = change(base, lora=ADAPTERS, **changes)
    ours = curve(train(config, tmp_path / "run", world_size, **layout(**degrees)))
    assert ours == pytest.approx(alone(config), rel=1e-9)
    resumed = curve(train(change(config, **{"training.steps": 4}), tmp_path / "run"))
    assert resumed[3] == pytest.approx(alone(change(config, **{"training.steps": 4}))[3], rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for it
def test_adapters_alone_are_trained_and_others_can_use_them(tmp_path: Path) -> None:
    """From a Hugging Face folder to adapters for PEFT, and to a whole model that computes the same."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads, rope_theta=500_000.0))
    base.save_pretrained(tmp_path / "base")
    model = dataclasses.replace(TINY.model, vocab_size=300)
    changes = {"checkpoint.init_from": str(tmp_path / "base"), "optimizer.lr": 0.05, **STEPS}
    config = change(TINY, model=model, lora=ADAPTERS, **changes)
    for number, format in enumerate(("peft", "huggingface"), 3):  # a step more, since the run is finished then
        train(
            change(config, **{"export.format": format, "training.steps": number}), tmp_path / "run", 2, **layout(tp=2)
        )
    adapters = load_file(tmp_path / "run/peft/step-3/adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * 2
    assert json.loads((tmp_path / "run/peft/step-3/adapter_config.json").read_text())["r"] == 4
    weights = load_file(next((tmp_path / "run/hugging_face/step-4").glob("*.safetensors")))
    for name, own in base.state_dict().items():
        assert torch.equal(weights[name], own) == (not name.endswith("proj.weight")), name
    train(change(config, **{"export.format": "huggingface"}), tmp_path / "again", 2, **layout(tp=2))
    tokens = torch.randint(0, 300, (2, 12))
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again/hugging_face/step-3")(tokens)
        adapted = PeftModel.from_pretrained(base, tmp_path / "run/peft/step-3")(tokens)
    torch.testing.assert_close(adapted.logits, merged.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quant.recipe", "float8_rowwise"], "has nothing to do in this model"),
        (["--quant.recipe", "fp8"], "quant.recipe is 'fp8'"),
        (["--quant.emulate"], "quant.emulate has no effect without a quant.recipe"),
        (["--quant.recipe", "float8_tensorwise", "--quant.float8-gather"], "parallel.dp_shard is 1"),
        (["--lora.include", "x"], "lora.include has no effect without a lora.rank"),
        (["--lora.rank", "4", "--lora.include", "nothing*"], "no linear layer of the model has a name that fits"),
        (
            ["--quant.recipe", "float8_rowwise", "--quant.emulate", "--quant.roles", "colwize"],
            "quant.roles: nothing in the model has the role 'colwize'",
        ),
        (["--export.format", "peft"], "export.format peft writes LoRA adapters, and lora.rank is 0"),
    ],
)
def test_what_would_have_no_effect_is_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(change(TINY, output=str(tmp_path / "run"))))
    emulated = ["--quant.emulate"] if flags == ["--quant.recipe", "float8_rowwise"] else []
    result = titan_train("--config", tmp_path / "config.json", *flags, *emulated)
    assert result.returncode in (1, 2)
    assert message in " ".join(result.stderr.split()), result.stderr


def final_loss(output: Path, *quant: str) -> float:
    """Of the debug model after 200 steps on Python's standard library, in bfloat16 where nothing else is asked for."""
    result = titan_train(
        *("--config", "llama3_debug", "--device", "cpu", "--checkpoint.no-enabled", "--metrics.no-console"),
        *("--training.global-batch-size", 4, "--precision.param-dtype", "bfloat16", "--metrics.log-every", 1),
        *quant,
        *("--output", output),
    )
    assert result.returncode == 0, result.stderr
    return sum(curve(metrics(output))[-10:]) / 10


@pytest.fixture(scope="module")
def bfloat16_loss(tmp_path_factory: pytest.TempPathFactory) -> float:
    return final_loss(tmp_path_factory.mktemp("bfloat16") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_200_steps_of_real_text(bfloat16_loss: float, recipe: str, tmp_path: Path) -> None:
    """Within 1 % of bfloat16; what is experimental is only told."""
    ratio = final_loss(tmp_path / "run", "--quant.recipe", recipe, "--quant.emulate", "--quant.no-skip-small")
    ratio /= bfloat16_loss
    print(f"{recipe}: {ratio:.4f} of bfloat16's loss, {bfloat16_loss:.4f}")
    if recipe != "nvfp4":
        assert ratio == pytest.approx(1.0, rel=0.01)
