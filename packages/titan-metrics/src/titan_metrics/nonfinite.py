"""Where the first NaN or infinity of a step comes from: the module, what of it, and the rank.

While it watches, every module reports whether its inputs, its outputs and the gradients of its outputs are finite, as
flags on the device in the order of their computation; `check` reads them all at once. Nothing is hooked, and nothing
costs anything, before `NonFiniteWatch` is entered. What is compiled is not seen, only what goes into the next module
that is not.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_metrics.norms import local


class Culprit(NamedTuple):
    """The first thing in a step that was not finite on a rank."""

    rank: int
    place: int
    """How many things were computed before it."""
    module: str
    """FQN of the module; empty for the outermost."""
    what: str
    """`input`, `output` or `gradient of the output`. An input is to be blamed on what feeds it: code of an outer
    module, since every module's output would have been seen before."""

    def __str__(self) -> str:
        return f"rank {self.rank}: the {self.what} of {self.module or 'the model'}"


class NonFiniteError(RuntimeError):
    """Something that a step computed is NaN or infinite; `culprits` has the first of each rank that saw one."""

    def __init__(self, culprits: list[Culprit]) -> None:
        self.culprits = culprits
        others = f"; also on {'; '.join(map(str, culprits[1:]))}" if len(culprits) > 1 else ""
        super().__init__(
            f"The first NaN or infinity of this step is on {culprits[0]}{others}. Look at that module's weights and "
            "inputs; what follows from it is not listed."
        )


class NonFiniteWatch:
    """Watches a model while it is entered.

        with NonFiniteWatch(model) as watch:
            loss = model(x)
            loss.backward()
            watch.check()

    `group`: the ranks to ask in `check`; None is all of them.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        self._model, self._group = model, group
        self._seen: list[tuple[str, str]] = []
        self._flags: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                module.register_forward_hook(self._after(name), with_kwargs=True),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def check(self) -> None:
        """Reads what was seen since the last call, on all ranks, and forgets it.

        Raises:
            NonFiniteError: on every rank alike, if a rank saw a NaN or an infinity.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        finite = torch.stack(self._flags).tolist() if self._flags else []
        own = next((Culprit(rank, i, *self._seen[i]) for i, fine in enumerate(finite) if not fine), None)
        self._forget()
        found: list[Culprit | None] = [own]
        if dist.is_initialized():
            found = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(found, own, group=self._group)
        if culprits := [culprit for culprit in found if culprit is not None]:
            raise NonFiniteError(sorted(culprits, key=lambda culprit: culprit.place))

    def _forget(self) -> None:
        self._seen, self._flags = [], []

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, named: Any) -> None:
            if torch.compiler.is_compiling():
                return
            for tensor in _floats((inputs, named)):
                self._note(name, "input", tensor)

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, named: Any, outputs: Any) -> None:
            if torch.compiler.is_compiling():
                return
            for tensor in _floats(outputs):
                self._note(name, "output", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._note(name, "gradient of the output", gradient))

        return hook

    def _note(self, name: str, what: str, tensor: Tensor) -> None:
        self._seen.append((name, what))
        self._flags.append(local(tensor).isfinite().all())


def _floats(value: Any) -> Iterator[Tensor]:
    """The tensors of real numbers in nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not value.is_meta:
            yield value
    elif isinstance(value, dict):
        yield from _floats(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floats(item)
