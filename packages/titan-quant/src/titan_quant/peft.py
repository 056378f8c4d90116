"""LoRA adapters in the files of Hugging Face's PEFT, which `PeftModel.from_pretrained` loads."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from titan_quant.config import LoRAConfig


class ExportError(ValueError):
    """There is nothing to export."""


def export_peft(
    folder: Path,
    state: Mapping[str, Tensor],
    config: LoRAConfig,
    *,
    base_model: str,
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into `folder`, which is made if it is missing.

    Args:
        folder: where to.
        state: a state dict with `<layer>.lora_a` [rank, K] and `<layer>.lora_b` [N, rank], whole tensors; others are
            left out.
        config: what the adapters were made with.
        base_model: name or path of the model that they belong to, as `transformers` knows it.
        rename: the name of a layer's weight -> its name in that model, such as
            `model.layers.0.self_attn.q_proj.weight`. Weights must correspond one to one, with rows and columns in the
            same order.

    Raises:
        ExportError: if `state` has no adapters.
    """
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    for name, a in state.items():
        if not name.endswith(".lora_a"):
            continue
        layer = name.removesuffix(".lora_a")
        module = rename(f"{layer}.weight").removesuffix(".weight")
        modules.append(module)
        for letter, tensor in (("A", a), ("B", state[f"{layer}.lora_b"])):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous()
    if not modules:
        raise ExportError(f"There is no adapter to write to {folder}: the state has no names that end in '.lora_a'.")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
