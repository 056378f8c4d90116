"""Groups that train on their own and are brought together every so many steps: local SGD and DiLoCo.

Local SGD (arXiv 1805.09767) replaces weights by their average. DiLoCo (arXiv 2311.08105, algorithm 1) remembers the
weights of the last meeting, the anchor, and moves it by an outer optimizer, whose gradient is the average of how far
the groups have gone; it may do so for one fragment of the model after another (arXiv 2501.18512, without overlap).

Groups meet after each `interval` steps, and when one starts, which so gets to where the others are. One that has just
healed has not trained, so it takes the others' average without adding to it, and begins with moments of zero. A meeting
that a dying group spoils is held again, with nothing lost.

torchft has both too. Here they are written on its quorum alone, since its anchors and outer optimizer are no part of
sharded checkpoints, a group that has healed counts like the one it healed from, and a failed meeting costs the steps
before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titan_core.optim import ModelState
from titan_core.optimizers.moments import wide_dtype
from titan_core.replicas.config import AveragingConfig
from titan_core.replicas.groups import ReplicaGroups, StepDiscardedError
from titan_core.replicas.state import Stateful
from titan_core.shards import local


class Averaging:
    """What brings groups together, and the state that it needs; a part of checkpoints and of what groups heal from.

    Give its `position` to `ReplicaGroups`, and the model, this and whatever counts steps as the state to heal.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AveragingConfig,
        sizes: Mapping[str, int],
        *,
        step: Callable[[], int],
        moments: Stateful,
    ) -> None:
        """Makes room for the anchor and the outer momentum, if there are any.

        Args:
            model: what this rank holds of it.
            config: with a method.
            sizes: name of each parameter of the whole model, in its order, and its elements; fixes the fragments.
            step: how many steps are taken.
            moments: the state of the optimizer, which is set to zero where a group heals.
        """
        self._config, self._step, self._moments = config, step, moments
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._fragments = cut_into_fragments(sizes, config.fragments)
        others = ModelState(model).state_dict().keys() - dict(model.named_parameters()).keys()
        buffers = dict(model.named_buffers())
        self._buffers = [buffers[name] for name in sorted(others) if buffers[name].is_floating_point()]
        self._met_at = 0  # the step after which the groups have met last
        self._anchor: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        if config.method == "diloco":
            self._anchor = {name: p.detach().clone() for name, p in self._parameters.items()}
        if self._anchor and config.outer_momentum > 0:
            self._momentum = {
                name: torch.zeros_like(p, dtype=wide_dtype(p), requires_grad=False) for name, p in self._anchor.items()
            }

    def position(self) -> int:
        """How far this group is: a step's end counts more once the groups have met there."""
        return 2 * self._step() + (self._step() == self._met_at and self._met_at > 0)

    def state_dict(self) -> dict[str, Any]:
        """`<FQN>.anchor` and `<FQN>.momentum` -> tensor, and `met_at`: the step of the last meeting."""
        kept = {"anchor": self._anchor, "momentum": self._momentum}
        tensors = {f"{name}.{kind}": tensor for kind, held in kept.items() for name, tensor in held.items()}
        return {**tensors, "met_at": self._met_at}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies `state` into this one's tensors."""
        for key, own in self.state_dict().items():
            if isinstance(own, Tensor) and own is not state[key]:
                own.copy_(state[key])
        self._met_at = state["met_at"]

    def begin(self, groups: ReplicaGroups) -> None:
        """Joins the other groups, once weights and state are as this group begins with them.

        Raises:
            ReplicaError: as `ReplicaGroups.begin`.
        """
        if self._step() == 0:
            self._to_anchor()
        self._meet(groups)

    def end_step(self, groups: ReplicaGroups) -> bool:
        """Meets the other groups if it is time after the step that has been taken; whether it was.

        Raises:
            ReplicaError: as `ReplicaGroups.begin`.
        """
        if self._step() % self._config.interval:
            return False
        self._meet(groups)
        return True

    def _meet(self, groups: ReplicaGroups) -> None:
        weight = 1
        while True:
            groups.begin()
            if groups.healed:
                weight = 0
                self._start_over()
            step = self._step()
            if step == 0 or step == self._met_at or step % self._config.interval:
                return  # groups that start, with nothing to average
            if self._average(groups, weight):
                self._met_at = step
                return

    @torch.no_grad()
    def _average(self, groups: ReplicaGroups, weight: int) -> bool:
        """Averages over groups by their `weight`; whether it has succeeded, else nothing has changed."""
        names = [name for name in self._parameters if self._fragments[name] == self._fragment()]
        sums = list(self._contributions(names, weight))
        try:
            (count,) = groups.agree([weight])
        except StepDiscardedError:
            return False
        groups.reduce(sums)
        if not groups.commit():
            return False
        averages = [total.div_(count) for total in sums]
        for buffer, average in zip(self._buffers, averages[len(names) :], strict=True):
            local(buffer).copy_(average)
        for name, average in zip(names, averages, strict=False):
            self._move(name, average)
        return True

    def _contributions(self, names: Sequence[str], weight: int) -> Iterator[Tensor]:
        """What this rank adds for each parameter, and then for each buffer."""
        for name in names:
            own = local(self._parameters[name]).to(wide_dtype(self._parameters[name]), copy=True)
            yield (local(self._anchor[name]) - own if self._anchor else own).mul_(weight)
        for buffer in self._buffers:
            yield local(buffer) * weight

    def _move(self, name: str, average: Tensor) -> None:
        """Brings one parameter to where all groups will have it."""
        parameter = local(self._parameters[name])
        if not self._anchor:
            parameter.copy_(average)
            return
        anchor, update = local(self._anchor[name]), average
        if self._momentum:
            momentum = local(self._momentum[name]).mul_(self._config.outer_momentum).add_(average)
            update = average.add_(momentum, alpha=self._config.outer_momentum) if self._config.nesterov else momentum
        anchor.sub_(update.mul(self._config.outer_lr).to(anchor.dtype))
        parameter.copy_(anchor)

    def _fragment(self) -> int:
        return (self._step() // self._config.interval - 1) % self._config.fragments

    def _start_over(self) -> None:
        """After healing: ranks may have healed from different groups, whose weights and moments are not the same."""
        if self._anchor:
            self._to_weights()
        for value in self._moments.state_dict().values():
            if isinstance(value, Tensor):
                local(value).detach().zero_()

    @torch.no_grad()
    def _to_anchor(self) -> None:
        for name, anchor in self._anchor.items():
            local(anchor).copy_(local(self._parameters[name]))

    @torch.no_grad()
    def _to_weights(self) -> None:
        for name, anchor in self._anchor.items():
            local(self._parameters[name]).copy_(local(anchor))


def cut_into_fragments(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Name of each parameter -> which of `count` fragments it belongs to: neighbours, of about equal size together."""
    total, before = sum(sizes.values()), 0
    found = {}
    for name, size in sizes.items():
        found[name] = min(count - 1, int(count * (before + size / 2) / total))
        before += size
    return found
