"""A precision policy in torch's own terms, for a plain module, for autocast and for FSDP2.

This is the one place where the names of dtypes become dtypes.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from titan_quant.config import MixedPrecision

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


class Dtypes(NamedTuple):
    """A resolved policy: the dtypes that weights are kept in, computed in, and that gradients are summed in."""

    master: torch.dtype
    param: torch.dtype
    reduce: torch.dtype


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called `torch.<name>`.

    Raises:
        ValueError: if torch has none of that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {name!r}; a name is meant such as 'float32' or 'bfloat16'.")
    return dtype


def resolve_dtypes(policy: MixedPrecision) -> Dtypes:
    """The policy's dtypes, defaults filled in.

    Raises:
        ValueError: if the policy has problems; all are listed.
    """
    return Dtypes(*map(torch_dtype, policy.resolved()))


def autocast(policy: MixedPrecision, device_type: str) -> torch.autocast:
    """A context in which modules with weights in `master` compute in `param`, as `torch.autocast` understands it.

    It casts at each operation that gains by it and leaves reductions such as norms and losses in float32, whereas
    FSDP casts a module's weights once. Gradients arrive in `master`; `reduce` has no say.

    Raises:
        ValueError: if autocast would ignore the policy: it casts from float32 to bfloat16, or nothing.
    """
    dtypes = resolve_dtypes(policy)
    mixed = dtypes.param != dtypes.master
    if mixed and (dtypes.master, dtypes.param) != (torch.float32, torch.bfloat16):
        raise ValueError(
            f"autocast cannot compute in {dtypes.param} with weights in {dtypes.master}, only in bfloat16 with weights "
            "in float32: choose these, or a param_dtype that equals master_dtype."
        )
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=mixed)


def fsdp_policy(policy: MixedPrecision) -> "MixedPrecisionPolicy":
    """What FSDP2's `fully_shard` takes as its `mp_policy`; the module's weights must be in `master`.

    Raises:
        ValueError: if the policy has problems; all are listed.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy  # takes 0.8 s

    dtypes = resolve_dtypes(policy)
    return MixedPrecisionPolicy(param_dtype=dtypes.param, reduce_dtype=dtypes.reduce)
