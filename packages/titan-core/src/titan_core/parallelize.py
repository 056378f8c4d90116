"""The order in which techniques are applied to a model: one screen."""

import contextlib
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_core.config import ParallelConfig
from titan_core.single import SingleDevice


class Layout(Protocol):
    """A model laid out on its ranks, ready to run micro-batches."""

    def begin_step(self) -> None:
        """Call it before a step's first micro-batch."""

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Forward and backward of one micro-batch happen within it."""

    def gradient_bytes(self) -> int:
        """Bytes of whole gradients kept on this rank while micro-batches accumulate."""


def parallelize(
    model: nn.Module,
    roles: Mapping[str, str],
    mesh: DeviceMesh | None,
    config: ParallelConfig,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> Layout:
    """Lays out `model`, whose parameters may still be meta tensors; `roles` as `resolve_roles` returns them.

    Without a mesh the model stays on one device. Parameters keep their dtype: it is what the optimizer works on;
    `param_dtype` is what forward and backward compute with, `reduce_dtype` what gradients are reduced in.
    """
    if mesh is None:
        return SingleDevice(model, param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    from titan_core.fsdp import DataParallel

    return DataParallel(
        model,
        roles,
        mesh,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        grad_sync=config.grad_sync,
        reshard_after_forward=config.reshard_after_forward,
    )
