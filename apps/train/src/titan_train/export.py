"""Writes a checkpoint's weights for others to use while a run goes on: a Hugging Face folder, or LoRA adapters.

They are read from the checkpoint that was just saved, so they are the same whatever the layout, and need next to no
memory. The ranks share the files of a folder.
"""

from collections.abc import Mapping
from pathlib import Path

from titan_ckpt.conversion.keymap import rows
from titan_ckpt.conversion.layouts import SEAL_NAME
from titan_ckpt.conversion.plan import Plan
from titan_ckpt.conversion.translate import from_dcp, to_hugging_face
from titan_ckpt.errors import CheckpointError
from titan_ckpt.place import Place
from titan_ckpt.world import RanksFailedError, World
from titan_models.hugging_face_files import settings_files
from titan_quant.peft import export_peft
from titan_quant.policy import torch_dtype
from titan_train.adapters import adapter_tensors, merged
from titan_train.config import TrainConfig
from titan_train.weights import facts_of, hugging_face_keys

_FOLDERS = {"huggingface": "hugging_face", "peft": "peft"}
_LAST_FILE = {"huggingface": SEAL_NAME, "peft": "adapter_config.json"}


def export(config: TrainConfig, checkpoint: Place, *, tokenizer: Mapping[str, bytes], eos_id: int) -> Path:
    """Writes `hugging_face/<name of the checkpoint>`, or `peft/…`, in the run directory; all ranks call it.

    Args:
        config: of the run.
        checkpoint: a whole one of the run.
        tokenizer: the content of its files, by name.
        eos_id: the token that ends each document.

    Raises:
        CheckpointError: on every rank, if any could not write its part.
    """
    world, folder = World(), _folder(config, checkpoint)
    try:
        if config.export.format == "peft":
            world.first(lambda: _write_adapters(config, checkpoint, folder))
        else:
            _carry_out(_plan(config, checkpoint, folder, tokenizer, eos_id), world, folder)
    except RanksFailedError as error:
        raise CheckpointError(f"Exporting {checkpoint} to {folder} failed: {error}") from error
    return folder


def is_exported(config: TrainConfig, checkpoint: Place) -> bool:
    """Whether `export` has been done for a checkpoint, to its end."""
    return (_folder(config, checkpoint) / _LAST_FILE[config.export.format]).is_file()


def _folder(config: TrainConfig, checkpoint: Place) -> Path:
    return Path(config.output or "", _FOLDERS[config.export.format], checkpoint.name)


def _plan(config: TrainConfig, checkpoint: Place, folder: Path, tokenizer: Mapping[str, bytes], eos_id: int) -> Plan:
    dtype = config.export.dtype or config.precision.master_dtype
    return to_hugging_face(
        from_dcp(checkpoint, None, facts_of(config.model), rewrite=lambda tensors: merged(tensors, config.lora)),
        folder,
        keys=hugging_face_keys(config.model),
        dtype=torch_dtype(dtype),
        files={**tokenizer, **settings_files(config.model, dtype, tokenizer, {"eos_token_id": eos_id})},
        shard_bytes=config.export.shard_bytes,
    )


def _carry_out(plan: Plan, world: World, folder: Path) -> None:
    def begin() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        plan.begin(overwrite=True, restart=True)

    world.first(begin)
    own = world.together(lambda: {file.name: plan.write(file) for file in plan.files[world.rank :: world.size]})
    written = {name: each for part in world.gather(own) for name, each in part.items()}
    world.first(lambda: plan.finish(written))


def _write_adapters(config: TrainConfig, checkpoint: Place, folder: Path) -> None:
    names = {row.native: row.foreign[0] for row in rows(hugging_face_keys(config.model), facts_of(config.model))}
    dtype = torch_dtype(config.export.dtype or config.precision.master_dtype)
    state = {name: tensor.to(dtype) for name, tensor in adapter_tensors(checkpoint).items()}
    base = config.checkpoint.init_from or ""
    export_peft(folder, state, config.lora, base_model=base, rename=names.__getitem__)
