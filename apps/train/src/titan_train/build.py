"""What a run and its rehearsal have in common: laying out the model, and what follows the gradients of a step."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from titan_core.clip import clip_gradients
from titan_core.layout import Layout
from titan_core.optim import set_lr
from titan_core.parallelize import parallelize
from titan_core.param_groups import check_groups
from titan_core.roles import resolve_roles
from titan_core.schedule import lr_factor
from titan_models.facts import flops_per_token
from titan_quant.policy import resolve_dtypes
from titan_train.config import TrainConfig
from titan_train.environment import Environment
from titan_train.rows import share_rows


def lay_out(config: TrainConfig, env: Environment) -> tuple[Layout, dict[str, str]]:
    """Builds the model on the meta device and lays it out on the ranks; returns it with the roles of its modules.

    Raises:
        ValueError: if the model's own names do not fit the configuration: blocks, operators, parameter groups,
        backends.
    """
    dtypes = resolve_dtypes(config.precision)
    with torch.device("meta"):
        model = config.model.build().to(dtypes.master)
    roles = resolve_roles(model, config.model.roles())
    check_groups(model, roles, config.optimizer.groups)
    layout = parallelize(
        model,
        roles,
        env.meshes,
        config.parallel,
        micro_batch_size=share_rows(config.training, config.parallel, env.degrees).micro_batch_size,
        param_dtype=dtypes.param,
        reduce_dtype=dtypes.reduce,
        remat=config.remat,
        compiling=config.compile,
        costs=flops_per_token(config.model, config.training.seq_len),
        costly=config.model.costly_operators(),
    )
    return layout, roles


def model_inputs(config: TrainConfig, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What the model reads of a batch, on its device."""
    return {name: batch[name].to(device, non_blocking=True) for name in input_names(config)}


def input_names(config: TrainConfig) -> list[str]:
    """What the model reads of a batch, besides the weights of its rows: int64 tensors [rows, S]."""
    return ["tokens", "positions", "labels"] + ["document_ids"] * config.data.confine_attention


def update(
    layout: Layout, optimizer: Optimizer, config: TrainConfig, number: int, stages: ProcessGroup | None
) -> tuple[Tensor, float]:
    """Clips the gradients of step `number`, counted from 1, and moves the parameters by them.

    Returns the gradients' norm before clipping, and the learning rate. `stages`: the ranks with the other stages of
    this rank's pipeline.
    """
    norm = clip_gradients(layout.model.parameters(), config.optimizer.max_grad_norm, stages)
    lr = config.optimizer.lr * lr_factor(config.schedule, number)
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad()
    layout.routers.finish_step()
    return norm, lr
