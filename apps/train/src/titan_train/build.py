"""What a run and its rehearsal have in common: laying out the model, and what follows the gradients of a step."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from titan_core.clip import clip_gradients
from titan_core.degrees import Degrees
from titan_core.init import init_parameters, materialize
from titan_core.layout import Layout
from titan_core.optim import set_lr, step_unless
from titan_core.optimizers.param_groups import check_groups
from titan_core.parallelize import parallelize
from titan_core.roles import resolve_roles
from titan_core.schedule import lr_factor
from titan_models.facts import flops_per_token
from titan_quant.float8_gather import Float8Gather
from titan_quant.policy import resolve_dtypes
from titan_quant.tensor_parallel import share_scales
from titan_train.config import TrainConfig
from titan_train.environment import Environment
from titan_train.rewrites import Rewrites, rewrite
from titan_train.rows import Rows, share_rows


class LaidOut:
    """A model on its ranks, and what a step of the optimizer does with it."""

    def __init__(
        self,
        layout: Layout,
        roles: Mapping[str, str],
        rewrites: Rewrites,
        config: TrainConfig,
        sizes: Mapping[str, int],
    ) -> None:
        self.layout, self.roles, self.rewrites, self._config = layout, roles, rewrites, config
        self.sizes = sizes
        """Name of each parameter of the whole model -> its elements."""
        self._float8_gather: Float8Gather | None = None

    @property
    def model(self) -> nn.Module:
        """What this rank holds of it."""
        return self.layout.model

    def give_memory(self, device: torch.device, *, parameters: torch.device | None = None) -> None:
        """Allocates parameters and buffers, which hold anything then; `parameters` may be elsewhere than the rest."""
        materialize(self.model, device, parameters=parameters)
        if self._config.quant.float8_gather:
            self._float8_gather = Float8Gather(self.model)

    def init(self) -> None:
        """Draws the initial weights, the same on every layout."""
        rules = {**self.rewrites.adapters.init, **self._config.model.init_rules()}
        init_parameters(self.model, rules, self._config.training.seed)

    def update(
        self,
        optimizer: Optimizer,
        number: int,
        stages: ProcessGroup | None,
        judge: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, float]:
        """Clips the gradients of step `number`, counted from 1, and moves the parameters by them.

        Args:
            optimizer: of the model.
            number: by which the learning rate and stochastic rounding go.
            stages: the ranks with the other stages of this rank's pipeline.
            judge: makes of the gradients' norm what `step_unless` heeds; None moves parameters in any case.

        Returns:
            The gradients' norm before clipping, and the learning rate.
        """
        norm = clip_gradients(self.model.parameters(), self._config.optimizer.max_grad_norm, stages)
        lr = self._config.optimizer.lr * lr_factor(self._config.schedule, number)
        set_lr(optimizer, lr)
        skip = None if judge is None else judge(norm)
        step_unless(optimizer, skip, number)
        optimizer.zero_grad()
        self.layout.routers.finish_step(skip)
        self.follow_weights()
        return norm, lr

    def follow_weights(self) -> None:
        """Brings what is computed from weights ahead up to date, after they have changed."""
        if self._float8_gather is not None:
            self._float8_gather.precompute_scales()


def lay_out(config: TrainConfig, env: Environment) -> LaidOut:
    """Builds the model on the meta device, rewrites it as the configuration says, and lays it out on the ranks.

    Raises:
        ValueError: if the model's own names do not fit the configuration: blocks, operators, parameter groups, layers
        to quantize, backends.
    """
    dtypes = resolve_dtypes(config.precision)
    with torch.device("meta"):
        model = config.model.build().to(dtypes.master)
    roles = resolve_roles(model, config.model.roles())
    rewrites = rewrite(model, config, roles)
    check_groups(model, roles, config.optimizer.groups)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layout = parallelize(
        model,
        roles,
        env.meshes,
        config.parallel,
        micro_batch_size=full_share(config, env.degrees).micro_batch_size,
        param_dtype=dtypes.param,
        reduce_dtype=dtypes.reduce,
        remat=config.remat,
        compiling=config.compile,
        costs=flops_per_token(config.model, config.training.seq_len),
        costly=config.model.costly_operators(),
        styles=rewrites.styles(roles),
    )
    if env.meshes is not None and env.degrees.tp > 1:
        share_scales(layout.model, roles, env.meshes.group("tp"))
    return LaidOut(layout, roles, rewrites, config, sizes)


def full_share(config: TrainConfig, degrees: Degrees) -> Rows:
    """What each rank computes of a global batch when all replica groups are there."""
    return share_rows(config.training, config.parallel, degrees, groups=config.replica.groups)


def model_inputs(config: TrainConfig, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What the model reads of a batch, on its device."""
    return {name: batch[name].to(device, non_blocking=True) for name in input_names(config)}


def input_names(config: TrainConfig) -> list[str]:
    """What the model reads of a batch, besides the weights of its rows: int64 tensors [rows, S]."""
    return ["tokens", "positions", "labels"] + ["document_ids"] * config.data.confine_attention
