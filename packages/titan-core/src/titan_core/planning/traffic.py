"""What one rank sends and receives: every collective that code runs, counted, with its bytes.

Bytes are those that a rank sends to others, and receives from them, if collectives go around a ring of their n ranks,
which for large tensors is what libraries do and moves the fewest: for all-gather and reduce-scatter n - 1 parts of the
size that one rank contributes or keeps; for all-reduce twice n - 1 parts of an n-th of the tensor, rounded up to whole
elements; for all-to-all, send and receive what they say. Groups of one rank send nothing and are not counted.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from titan_core.compat import TorchDispatchMode, process_group
from titan_core.mesh import Meshes


class UnknownCollectiveError(RuntimeError):
    """A collective ran whose bytes are unknown, so that the sums would be wrong."""


@dataclass(frozen=True, kw_only=True, order=True)
class Flow:
    """All collectives of one kind, along one axis, for one reason."""

    axis: str
    """The axis of a mesh whose ranks take part, or `world` for all ranks. Axes may have the same ranks; where that
    leaves open which is meant, both are named."""
    kind: str
    """`all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all`, `send` or `receive`."""
    cause: str
    """The technique that asks for it."""
    dtype: str
    """What is sent, by torch's name of the dtype; uint8 are bytes of another: codes of float8, and what FSDP packs with
    them."""
    count: int
    """How often it runs."""
    sent_bytes: int
    """Bytes that one rank sends in all of them."""
    received_bytes: int
    """Bytes that one rank receives in all of them."""


class TrafficRecorder(TorchDispatchMode):
    """While active, counts the collectives of this thread, with real ranks and tensors or with fake ones."""

    def __init__(self, meshes: Meshes | None) -> None:
        super().__init__()
        self._axes = {} if meshes is None else _axes(meshes)
        self._sums: dict[tuple[str, str, str, str], list[int]] = {}

    def flows(self) -> list[Flow]:
        """What was recorded so far."""
        return [
            Flow(axis=axis, kind=kind, cause=cause, dtype=dtype, count=count, sent_bytes=sent, received_bytes=received)
            for (axis, kind, cause, dtype), (count, sent, received) in sorted(self._sums.items())
        ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `torch.utils._python_dispatch.TorchDispatchMode`."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # lets it run its collectives first
        if func.namespace in ("c10d", "_c10d_functional"):
            self._record(func, args)
        return func(*args, **(kwargs or {}))

    def _record(self, func: Any, args: tuple[Any, ...]) -> None:
        name = f"{func.namespace}.{func.overloadpacket.__name__}"
        if name in _SILENT:
            return
        if name not in _COLLECTIVES:
            raise UnknownCollectiveError(
                f"The bytes of the collective {name} are unknown here; add it to the table in "
                "titan_core.planning.traffic, or do without it."
            )
        kind, group_argument, measure = _COLLECTIVES[name]
        group = process_group(args[group_argument])
        if group.size() == 1:
            return
        asking = _asking()
        axis = _axis(self._axes.get(group.group_name, []), asking, kind) or _name(group)
        cause = _ASKING.get(asking) or _ALONG.get((axis, kind)) or _AXES.get(axis) or "other"
        sums = self._sums.setdefault((axis, kind, cause, _dtype(args)), [0, 0, 0])
        for i, number in enumerate((1, *measure(args, group))):
            sums[i] += number


def _axes(meshes: Meshes) -> dict[str, list[str]]:
    """Name of a group -> the axes whose ranks it joins."""
    found: dict[str, list[str]] = {}
    for mesh in (meshes.dense, meshes.experts, meshes.data):
        if mesh is None:
            continue
        for axis in mesh.mesh_dim_names or ():
            names = found.setdefault(mesh.get_group(axis).group_name, [])
            if axis not in names:
                names.append(axis)
    return found


def _axis(names: Sequence[str], asking: str, kind: str) -> str:
    """The axis that is meant, of those with a group's ranks: by who asks, or by what each of them does."""
    meant = _MEANT.get(asking) or _USING.get(kind, ("tp", "cp"))
    fitting = [name for name in meant if name in names] or names
    return fitting[0] if asking else "/".join(fitting)


def _name(group: ProcessGroup) -> str:
    return "world" if group.size() == torch.distributed.get_world_size() else f"{group.size()} ranks"


def _dtype(args: tuple[Any, ...]) -> str:
    """What a collective sends; all tensors of one have one dtype."""
    first = args[0]
    while not isinstance(first, Tensor):
        first = first[0]
    return str(first.dtype).removeprefix("torch.")


Measured = tuple[int, int]


def _bytes(tensors: Tensor | Sequence[Tensor]) -> int:
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _parts(argument: int) -> Callable[[tuple[Any, ...], ProcessGroup], Measured]:
    """For a collective whose ranks each contribute, or keep, a part like `args[argument]`."""

    def measure(args: tuple[Any, ...], group: ProcessGroup) -> Measured:
        return ((group.size() - 1) * _bytes(args[argument]),) * 2

    return measure


def _reduce_scatter(args: tuple[Any, ...], group: ProcessGroup) -> Measured:
    return ((group.size() - 1) * (_bytes(args[0]) // group.size()),) * 2


def _all_reduce(args: tuple[Any, ...], group: ProcessGroup) -> Measured:
    tensors = [args[0]] if isinstance(args[0], Tensor) else args[0]
    part = sum(-(-tensor.numel() // group.size()) * tensor.itemsize for tensor in tensors)
    return (2 * (group.size() - 1) * part,) * 2


def _functional_all_to_all(args: tuple[Any, ...], group: ProcessGroup) -> Measured:
    x, received, sent, _ = args
    row = x.itemsize * x[0:1].numel()
    here = group.rank()
    return (sum(sent) - sent[here]) * row, (sum(received) - received[here]) * row


def _all_to_all(args: tuple[Any, ...], group: ProcessGroup) -> Measured:
    received, sent, _, received_rows, sent_rows, *_ = args
    here, row = group.rank(), sent.itemsize * sent[0:1].numel()

    def to_others(tensor: Tensor, rows: Sequence[int]) -> int:
        rows = rows or [tensor.shape[0] // group.size()] * group.size()  # equal ones need not be said
        return (sum(rows) - rows[here]) * row

    return to_others(sent, sent_rows), to_others(received, received_rows)


def _listed_all_to_all(args: tuple[Any, ...], group: ProcessGroup) -> Measured:
    received, sent = ([*tensors[: group.rank()], *tensors[group.rank() + 1 :]] for tensors in args[:2])
    return _bytes(sent), _bytes(received)


def _send(args: tuple[Any, ...], group: ProcessGroup) -> Measured:
    return _bytes(args[0]), 0


def _receive(args: tuple[Any, ...], group: ProcessGroup) -> Measured:
    return 0, _bytes(args[0])


_SILENT = {"_c10d_functional.wait_tensor", "c10d.barrier"}

# Operator -> kind, the argument that is its group, and how its bytes are found.
_COLLECTIVES: Mapping[str, tuple[str, int, Callable[[tuple[Any, ...], ProcessGroup], Measured]]] = {
    "c10d._allgather_base_": ("all-gather", 2, _parts(1)),
    "c10d.allgather_": ("all-gather", 2, _parts(1)),
    "c10d._reduce_scatter_base_": ("reduce-scatter", 2, _parts(0)),
    "c10d.reduce_scatter_": ("reduce-scatter", 2, _parts(0)),
    "c10d.allreduce_": ("all-reduce", 1, _all_reduce),
    "c10d.alltoall_base_": ("all-to-all", 2, _all_to_all),
    "c10d.alltoall_": ("all-to-all", 2, _listed_all_to_all),
    "c10d.send": ("send", 1, _send),
    "c10d.recv_": ("receive", 1, _receive),
    "_c10d_functional.all_gather_into_tensor": ("all-gather", 2, _parts(0)),
    "_c10d_functional.reduce_scatter_tensor": ("reduce-scatter", 3, _reduce_scatter),
    "_c10d_functional.all_reduce": ("all-reduce", 2, _all_reduce),
    "_c10d_functional.all_to_all_single": ("all-to-all", 3, _functional_all_to_all),
}

# Modules whose collectives are not explained by the axis they run along.
_ASKING = {
    "titan_core.clip": "gradient norm",
    "titan_core.loss": "loss over the cut vocabulary",
    "titan_core.routers": "load of experts",
    "titan_core.optimizers.whole_matrices": "Muon's whole matrices",
}
_FSDP = "torch.distributed.fsdp"
_HOLDING = ("fsdp", "expert_fsdp", "dp_replicate", "tp", "ep", "pp")
# The axes that these, and FSDP, mean: those that hold parts of parameters, or tokens.
_MEANT = {
    _FSDP: _HOLDING,
    "titan_core.clip": _HOLDING,
    "titan_core.optimizers.whole_matrices": _HOLDING,
    "titan_core.routers": ("dp_replicate", "dp_shard", "cp", "tp"),
}
# The others: what passes between modules, forward and backward.
_USING = {"all-to-all": ("cp", "ep"), "send": ("pp", "cp"), "receive": ("pp", "cp")}
_ALONG = {
    ("fsdp", "all-gather"): "parameters gathered by FSDP",
    ("fsdp", "reduce-scatter"): "gradients reduced by FSDP",
    ("expert_fsdp", "all-gather"): "parameters of experts gathered by FSDP",
    ("expert_fsdp", "reduce-scatter"): "gradients of experts reduced by FSDP",
    ("dp_replicate", "all-reduce"): "gradients summed over replicas",
    ("tp", "all-gather"): "tensor parallelism: a region's input, or the gradient of its output",
    ("tp", "reduce-scatter"): "tensor parallelism: a region's output, or the gradient of its input",
    ("tp", "all-reduce"): "tensor parallelism: what every rank has whole",
    ("pp", "send"): "hidden states to the next stage, gradients to the one before",
    ("pp", "receive"): "hidden states from the stage before, gradients from the next",
}
_AXES = {
    "cp": "context-parallel attention",
    "ep": "tokens to their experts and back",
    "cp/ep": "context-parallel attention; tokens to their experts and back",
    "world": "what ranks agree on",
}


def _asking() -> str:
    """The module that asks for a collective, if it is one of the tables above; empty if not."""
    frame = sys._getframe(3)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name in _ASKING:
            return name
        if name.startswith(_FSDP):
            return _FSDP
        frame = frame.f_back
    return ""
