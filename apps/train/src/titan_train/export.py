"""Writes a checkpoint's weights as a Hugging Face folder while a run goes on: the ranks share its files.

It is read from the checkpoint that was just saved, so it is the same whatever the layout and needs next to no memory.
"""

from collections.abc import Mapping
from pathlib import Path

from titan_ckpt.conversion.layouts import SEAL_NAME
from titan_ckpt.conversion.plan import Plan
from titan_ckpt.conversion.translate import from_dcp, to_hugging_face
from titan_ckpt.errors import CheckpointError
from titan_ckpt.place import Place
from titan_ckpt.world import RanksFailedError, World
from titan_models.hugging_face_files import settings_files
from titan_quant.policy import torch_dtype
from titan_train.config import TrainConfig
from titan_train.weights import facts_of, hugging_face_keys


def export(config: TrainConfig, checkpoint: Place, *, tokenizer: Mapping[str, bytes], eos_id: int) -> Path:
    """Writes `hugging_face/<name of the checkpoint>` in the run directory, which transformers loads; all ranks call it.

    Args:
        config: of the run.
        checkpoint: a whole one of the run.
        tokenizer: the content of its files, by name.
        eos_id: the token that ends each document.

    Raises:
        CheckpointError: on every rank, if any could not write its part.
    """
    world = World()
    folder = _folder(config, checkpoint)
    dtype = config.export.dtype or config.precision.master_dtype
    plan = to_hugging_face(
        from_dcp(checkpoint, None, facts_of(config.model)),
        folder,
        keys=hugging_face_keys(config.model),
        dtype=torch_dtype(dtype),
        files={**tokenizer, **settings_files(config.model, dtype, tokenizer, {"eos_token_id": eos_id})},
        shard_bytes=config.export.shard_bytes,
    )
    try:
        _carry_out(plan, world, folder)
    except RanksFailedError as error:
        raise CheckpointError(f"Exporting {checkpoint} to {folder} failed: {error}") from error
    return folder


def is_exported(config: TrainConfig, checkpoint: Place) -> bool:
    """Whether `export` has been done for a checkpoint, to its end."""
    return (_folder(config, checkpoint) / SEAL_NAME).is_file()


def _folder(config: TrainConfig, checkpoint: Place) -> Path:
    return Path(config.output or "", "hugging_face", checkpoint.name)


def _carry_out(plan: Plan, world: World, folder: Path) -> None:
    def begin() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        plan.begin(overwrite=True, restart=True)

    world.first(begin)
    own = world.together(lambda: {file.name: plan.write(file) for file in plan.files[world.rank :: world.size]})
    written = {name: each for part in world.gather(own) for name, each in part.items()}
    world.first(lambda: plan.finish(written))
