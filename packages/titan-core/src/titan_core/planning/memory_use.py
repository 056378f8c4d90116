"""How many bytes of tensors live on a rank while a step runs, by what they are for.

Counted are the storages of live tensors, whether real or fake: no allocator's rounding or fragmentation, nothing that
kernels and communication libraries allocate for themselves. What a storage is for is often known only later, when it
turns up as a gradient or as the optimizer's state; so births and deaths are logged, and added up at the end.

Where FSDP offloads to the host's memory, two memories are filled. Storages are counted for the device unless they are
said to be the host's, so that a step can be tried where there is only a host.
"""

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from titan_core.compat import TorchDispatchMode, after_each_backward, around_shape_derivation
from titan_core.shards import local


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of live tensors on one rank, in one memory."""

    parameters: int = 0
    """This rank's shards of parameters, and buffers."""
    gradients: int = 0
    """Gradients: shards, and whole ones that wait for their reduction."""
    optimizer: int = 0
    """The optimizer's state."""
    activations: int = 0
    """What a forward keeps for its backward, and what either is working on."""
    communication: int = 0
    """Parameters gathered or cast for a while, and what gradients and hidden states are sent and received in."""
    other: int = 0
    """The batch, and what clipping and the optimizer are working on."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass
class _Record:
    size: int
    category: str
    host: bool


class MemoryRecorder(TorchDispatchMode):
    """While active, logs the storages that this thread's operators allocate; `peak` adds them up."""

    def __init__(self) -> None:
        super().__init__()
        self.category = "other"
        """What new storages are for, unless they turn out to be something else."""
        self.host = False
        """Whether new storages are in the host's memory, unless they turn out to be on the device."""
        self._log: list[tuple[_Record, int]] = []
        self._alive: dict[int, tuple[_Record, weakref.ref[Any]]] = {}
        self._looks_away = False
        self._patches = contextlib.ExitStack()

    def hold(self, category: str, tensors: Iterable[Tensor | None], *, host: bool = False) -> None:
        """Says what `tensors` are for, from their births on, and whether they are in the host's memory."""
        for tensor in tensors:
            if tensor is not None:
                record = self._known(local(tensor).untyped_storage(), category)
                record.category, record.host = category, host

    def peak(self, *, host: bool = False) -> MemoryUse:
        """What was alive on the device, or in the memory of the `host`, when most was alive there."""
        now = dict.fromkeys((field.name for field in fields(MemoryUse)), 0)
        total = most = 0
        at_peak = dict(now)
        for record, change in self._log:
            if record.host != host:
                continue
            now[record.category] += change
            total += change
            if total > most:
                most, at_peak = total, dict(now)
        return MemoryUse(**at_peak)

    def __enter__(self) -> "MemoryRecorder":
        resize, recorder = torch.UntypedStorage.resize_, self

        def resize_and_tell(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            recorder._resized(storage)
            return result

        # FSDP frees and allocates what it gathers so, unseen by any dispatcher.
        self._patches.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_and_tell))
        self._patches.enter_context(after_each_backward(partial(self.hold, "gradients")))
        self._patches.enter_context(around_shape_derivation(self._looking_away))
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._patches.close()

    @contextlib.contextmanager
    def _looking_away(self) -> Iterator[None]:
        """What is made within it has no memory, though everything that has some may be fake too."""
        before, self._looks_away = self._looks_away, True
        try:
            yield
        finally:
            self._looks_away = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `torch.utils._python_dispatch.TorchDispatchMode`."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by themselves
        result = func(*args, **(kwargs or {}))
        for leaf in () if self._looks_away else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._known(leaf.untyped_storage(), None)
        return result

    def _known(self, storage: torch.UntypedStorage, category: str | None) -> _Record:
        key = id(storage)
        if key in self._alive:
            return self._alive[key][0]
        found = category or ("communication" if _communicates() else self.category)
        record = _Record(storage.nbytes(), found, self.host)
        self._alive[key] = record, weakref.ref(storage, partial(self._died, key))
        self._log.append((record, record.size))
        return record

    def _resized(self, storage: torch.UntypedStorage) -> None:
        record = self._known(storage, None)
        self._change(record, storage.nbytes())

    def _died(self, key: int, _: Any) -> None:
        record, _ = self._alive.pop(key)
        self._change(record, 0)

    def _change(self, record: _Record, size: int) -> None:
        if size != record.size:
            self._log.append((record, size - record.size))
            record.size = size


_COMMUNICATING = ("torch.distributed.fsdp", "torch.distributed.pipelining", "titan_core.single")
_COMPUTING = ("torch.nn", "torch.autograd", "torch.utils.checkpoint", "torch.optim")


def _communicates() -> bool:
    """Whether it is FSDP, a pipeline or the cast of parameters that allocates now, and not a module that they call."""
    frame = sys._getframe(3)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(_COMMUNICATING):
            return True
        if not name.startswith("torch.") or name.startswith(_COMPUTING):
            return False
        frame = frame.f_back
    return False
