"""Tensor and sequence parallelism: every weight matrix is cut over the ranks of the tp axis.

Between regions the hidden states are cut along the sequence (or whole on every rank without `sequence_parallel`). A
region gathers them on entry, its column-cut layers compute some of the inner dimensions (whole heads of attention), and
its row-cut layer returns each rank's share of the sum, which is reduced and cut along the sequence again. The embedding
and the head are cut along the vocabulary; the loss never gathers logits.

The model's code is unchanged: see `titan_core.surgery`. Source: arXiv 1909.08053 (tensor), 2205.05198 (sequence).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from titan_core.collectives import gather, scatter_sum, sum_backward, sum_forward
from titan_core.compat import overlap_tensor_parallel
from titan_core.config import ParallelConfig
from titan_core.loss import vocabulary_parallel_logits, vocabulary_parallel_loss
from titan_core.mesh import Meshes
from titan_core.roles import ROLES
from titan_core.shards import owned
from titan_core.surgery import local_parameter, specialise
from titan_core.tensor_styles import AS_USUAL, TensorStyles

_SEQUENCE = 1  # the dimension of S in [B, S, D]


def apply_tensor_parallel(
    model: nn.Module,
    roles: Mapping[str, str],
    meshes: Meshes,
    config: ParallelConfig,
    styles: TensorStyles = AS_USUAL,
) -> None:
    """Cuts the weight matrices of `model`, which may still be on the meta device, over the tp ranks.

    Raises:
        AsyncTensorParallelError: if `async_tp` is asked of GPUs that cannot read each other's memory.
    """
    if meshes.degrees.tp == 1:
        return
    if config.async_tp:
        enable_async_tensor_parallel(meshes.degrees.tp)
    TensorParallel(meshes.dense["tp"], sequence_parallel=config.sequence_parallel, styles=styles).apply(model, roles)


class AsyncTensorParallelError(RuntimeError):
    """The GPUs cannot read each other's memory."""


class TensorParallel:
    """Lays out modules of a model, whose parameters may still be meta tensors, over the 1-D mesh `tp`."""

    def __init__(self, tp: DeviceMesh, *, sequence_parallel: bool, styles: TensorStyles = AS_USUAL) -> None:
        self._mesh = tp
        self._styles = styles
        self._group: ProcessGroup = tp.get_group()
        self._key = (self._group, sequence_parallel)
        self._made: dict[nn.Parameter, nn.Parameter] = {}
        group = self._group
        if sequence_parallel:
            self._enter: Callable[[Tensor], Tensor] = partial(gather, dim=_SEQUENCE, group=group)
            self._leave: Callable[[Tensor], Tensor] = partial(scatter_sum, dim=_SEQUENCE, group=group)
        else:
            self._enter = partial(sum_backward, group=group)
            self._leave = partial(sum_forward, group=group)
        # A weight that every rank has whole sees different tokens (or heads) on each, so its gradients add up.
        self._shared: Callable[[Tensor], Tensor] = partial(sum_backward, group=group)
        self._sequence_parallel = sequence_parallel

    def apply(self, model: nn.Module, roles: Mapping[str, str]) -> None:
        """Lays out each module of `model` by its role; `roles` as `resolve_roles` returns them."""
        styles = {
            "vocabulary": self._vocabulary,
            "region": self._region,
            "column": self._column,
            "row": self._row,
            "sequence": self._sequence,
            "heads": self._heads,
            "loss": self._loss,
        }
        for fqn, role in roles.items():
            style = ROLES[role].tensor
            if style is not None:
                styles[style](model.get_submodule(fqn), fqn)

    def _cut(self, module: nn.Module, **placements: Placement) -> None:
        """Spreads the module's parameters over the mesh, replicated where no placement is given."""
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in self._made:
                placement = placements.get(name, Replicate())
                cut = distribute_tensor(parameter.data, self._mesh, [placement], src_data_rank=None)
                self._made[parameter] = nn.Parameter(cut, parameter.requires_grad)
            module.register_parameter(name, self._made[parameter])

    def _specialise(self, module: nn.Module, style: str, members: Callable[[type[nn.Module]], dict[str, Any]]) -> None:
        specialise(module, (style, *self._key), members)

    def _region(self, module: nn.Module, fqn: str) -> None:
        enter, gather = self._enter, self._styles.gather
        if gather is not None and self._sequence_parallel and fqn in self._styles.entered:
            enter = partial(gather, dim=_SEQUENCE, group=self._group)

        def members(base: type[nn.Module]) -> dict[str, Any]:
            def forward(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                return base.forward(self, enter(hidden), *args, **kwargs)

            return {"forward": forward}

        self._specialise(module, "region" if enter is self._enter else "region, otherwise", members)

    def _column(self, module: nn.Module, fqn: str) -> None:
        added = self._added(module, "colwise")
        self._cut(module, weight=Shard(0), bias=Shard(0), **self._placements(added))
        own = {"weight": local_parameter("weight"), "bias": local_parameter("bias")}
        self._specialise(module, f"column {sorted(added)}", lambda base: own | self._added_members(added))

    def _added(self, module: nn.Module, role: str) -> Mapping[str, int | None]:
        """Parameters that a rewrite gave the layer, and the dimension along which each is cut."""
        known = self._styles.added.get(role, {})
        return {name: dim for name, dim in known.items() if module._parameters.get(name) is not None}

    def _placements(self, added: Mapping[str, int | None]) -> dict[str, Placement]:
        return {name: Shard(dim) for name, dim in added.items() if dim is not None}

    def _added_members(self, added: Mapping[str, int | None]) -> dict[str, Any]:
        # One that every rank has whole meets another part of the inner dimension on each, so its gradients add up.
        return {name: local_parameter(name, self._shared if dim is None else None) for name, dim in added.items()}

    def _row(self, module: nn.Module, fqn: str) -> None:
        added = self._added(module, "rowwise")
        self._cut(module, weight=Shard(1), **self._placements(added))
        leave, scatter = self._leave, self._styles.scatter_sum
        if scatter is not None and self._sequence_parallel and fqn in self._styles.left:
            leave = partial(scatter, dim=_SEQUENCE, group=self._group)
        # With the sequence whole on every rank each adds the bias to the same tokens, and has its whole gradient.
        whole_bias = local_parameter("bias", self._shared if self._sequence_parallel else None)

        def members(base: type[nn.Module]) -> dict[str, Any]:
            def forward(self: Any, x: Tensor) -> Tensor:
                out = leave(base.forward(self, x))
                bias = self.whole_bias
                return out if bias is None else out + bias

            # The layer itself must not add the bias: it would be summed once a rank.
            hidden_bias = local_parameter("bias", lambda bias: None)
            weight = local_parameter("weight")
            own = {"forward": forward, "weight": weight, "bias": hidden_bias, "whole_bias": whole_bias}
            return own | self._added_members(added)

        otherwise = "" if leave is self._leave else ", otherwise"
        self._specialise(module, f"row {sorted(added)}{otherwise}", members)

    def _sequence(self, module: nn.Module, fqn: str) -> None:
        self._whole(module, "sequence", self._shared if self._sequence_parallel else None)

    def _heads(self, module: nn.Module, fqn: str) -> None:
        self._whole(module, "heads", self._shared)

    def _whole(self, module: nn.Module, style: str, through: Callable[[Tensor], Tensor] | None) -> None:
        self._cut(module)
        names = tuple(module._parameters)
        self._specialise(module, style, lambda base: {name: local_parameter(name, through) for name in names})

    def _vocabulary(self, module: Any, fqn: str) -> None:
        self._cut(module, weight=Shard(0))
        leave = self._leave

        def members(base: type[nn.Module]) -> dict[str, Any]:
            def forward(self: Any, tokens: Tensor) -> Tensor:
                weight = self.weight
                index = tokens - self.first_row
                inside = (index >= 0) & (index < weight.shape[0])
                return leave(F.embedding(index.where(inside, 0), weight) * inside[..., None])

            return {"forward": forward, "weight": local_parameter("weight")}

        module.first_row = owned(module.weight)[0].start
        self._specialise(module, "vocabulary", members)

    def _loss(self, module: Any, fqn: str) -> None:
        self._cut(module, weight=Shard(0))
        enter, group = self._enter, self._group

        def members(base: type[nn.Module]) -> dict[str, Any]:
            def forward(self: Any, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
                hidden = enter(hidden)
                if labels is None:
                    return vocabulary_parallel_logits(hidden, self.weight, self.vocab_size, group)
                return vocabulary_parallel_loss(hidden, self.weight, labels, self.first_row, self.chunk_tokens, group)

            return {"forward": forward, "weight": local_parameter("weight")}

        module.first_row = owned(module.weight)[0].start
        module.vocab_size = module.weight.shape[0]
        self._specialise(module, "loss", members)


def enable_async_tensor_parallel(ranks: int) -> None:
    """Lets compiled blocks overlap the communication of `ranks` tensor-parallel ranks with their matrix products.

    Raises:
        AsyncTensorParallelError: if they cannot read each other's memory.
    """
    visible, own = torch.cuda.device_count(), torch.cuda.current_device() if torch.cuda.is_available() else 0
    first = own - own % ranks  # tp is the innermost axis of the mesh, and local ranks have the GPUs in their order
    group = range(first, first + ranks)
    if visible < group.stop or not all(torch.cuda.can_device_access_peer(own, i) for i in group if i != own):
        raise AsyncTensorParallelError(
            f"parallel.async_tp needs {ranks} GPUs in one machine that read each other's memory (NVLink); this process "
            f"sees {visible}, and not all of them do. Leave out --parallel.async-tp, or lower parallel.tp."
        )
    overlap_tensor_parallel()
