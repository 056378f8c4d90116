"""What is alive on a rank while a training step runs, found by adding up sizes: no tensors, no torch.

The step is played as `titan_core.single`, `titan_core.fsdp` and `titan_core.pipelining` run it. A model's parts come as
*scripts*, sequences of events of a kind and an amount:

    ("bytes", n)      n bytes of activations are allocated, or given back if n < 0
    ("gradient", n)   the gradient of n elements of a parameter is computed
    ("handed", n)     and handed over to whoever accumulates or reduces it
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from titan_core.planning.ledger import Category, Change, Ledger, Segment, condensed
from titan_core.planning.sharding_memory import Group, Policy, Sharding
from titan_core.planning.timeline import Computation

Script = Sequence[tuple[str, int]]


class Part(Protocol):
    """A part of a model, played with sizes."""

    @property
    def forward(self) -> Script:
        """From its input to its result."""
        ...

    @property
    def backward(self) -> Script:
        """From the result's gradient to the input's."""
        ...


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is computed between one gathering of parameters and the next."""

    part: Part
    """What is computed."""
    groups: tuple[Group, ...] = ()
    """Its parameters; the same objects in all units that share them, nothing without FSDP."""
    stays: bool = False
    """Whether the parameters stay gathered after the forward, whatever the policy says."""
    adds: bool = False
    """Whether its gradients are of parameters that another unit of the stage has, and are added to theirs."""
    prefetches: bool = False
    """Whether the next unit's parameters are gathered while it computes."""


@dataclass(frozen=True, kw_only=True)
class StageUnits:
    """A model, or one stage of a pipeline, on one rank."""

    units: tuple[Unit, ...]
    """In the order of the forward."""
    alongside: int = 0
    """Bytes that a micro-batch needs from the beginning of its forward to the end of its backward."""
    received: int = 0
    """Bytes that come from the stage before for each micro-batch, 0 if there is none."""
    handed_on: int = 0
    """Bytes that go to the next stage for each micro-batch, 0 if there is none."""


def step_memory(
    stages: Mapping[int, StageUnits], policy: Policy, held: Mapping[Category, int], actions: Sequence[Computation]
) -> dict[Category, int]:
    """Bytes by category when most is alive.

    Args:
        stages: this rank's, by number.
        policy: how parameters and gradients are held.
        held: bytes that are alive all the time.
        actions: stage, `F` or `B`, and micro-batch, in the order of the step.
    """
    player = _Player(stages, policy, held)
    for stage, unit in stages.items():
        count = sum(action[:2] == (stage, "B") for action in actions)
        # A pipeline makes the buffers of all micro-batches when it first runs.
        player.ledger.add("communication", (unit.received + unit.handed_on) * count)
    last = {stage: i for i, (stage, kind, _) in enumerate(actions) if kind == "B"}
    for i, (stage, kind, _) in enumerate(actions):
        if kind == "F":
            player.forward(stage)
        else:
            player.backward(stage, last=last[stage] == i)
    return player.ledger.peak


class _Player:
    def __init__(self, stages: Mapping[int, StageUnits], policy: Policy, held: Mapping[Category, int]) -> None:
        self.ledger = Ledger(held)
        self._stages, self._policy = stages, policy
        self._sharding = Sharding(policy, self.ledger)
        self._segments: dict[tuple[int, bool, bool], Segment] = {}
        self._trained: set[int] = set()

    def forward(self, number: int) -> None:
        stage = self._stages[number]
        self.ledger.add("activations", stage.alongside)
        for i, unit in enumerate(stage.units):
            self._sharding.gather(unit.groups)
            if unit.prefetches and i + 1 < len(stage.units):
                self._sharding.fetch(stage.units[i + 1].groups)
            self.ledger.apply(self._segment(unit.part.forward, adds=False))
            if self._policy.reshards and not unit.stays:
                self._sharding.free(unit.groups)
        self._sharding.end_forward()

    def backward(self, number: int, *, last: bool) -> None:
        stage = self._stages[number]
        for i in reversed(range(len(stage.units))):
            unit, before = stage.units[i], stage.units[:i]
            self._sharding.gather(unit.groups, backward=True)
            if before:
                self._sharding.fetch(before[-1].groups)
            adds = self._sharding.adds_gradients(unit.groups) if self._policy.fsdp else number in self._trained
            self.ledger.apply(self._segment(unit.part.backward, adds=adds or unit.adds))
            if all(other.groups is not unit.groups for other in before):
                self._end_unit(unit, last=last)
        self._trained.add(number)
        if self._policy.pipeline and last:
            for unit in stage.units:
                self._sharding.free(unit.groups)
                self._sharding.reduce(unit.groups, last=True)
        if last:
            self._sharding.end_reduce()
        self.ledger.add("activations", -stage.alongside - stage.handed_on)
        self.ledger.add("communication", -stage.received)

    def _end_unit(self, unit: Unit, *, last: bool) -> None:
        if self._policy.pipeline or (self._policy.reduces_last and not last):
            if not self._policy.pipeline:
                self._sharding.free(unit.groups)
            self._sharding.keep_whole(unit.groups)
            return
        if self._sharding.has_whole(unit.groups):
            self._sharding.keep_whole(unit.groups)
        self._sharding.free(unit.groups)
        self._sharding.reduce(unit.groups, last=last)

    def _segment(self, script: Script, *, adds: bool) -> Segment:
        key = id(script), adds, self._policy.fsdp
        if key not in self._segments:
            changes = self._sharded(script, adds=adds) if self._policy.fsdp else self._single(script, adds=adds)
            self._segments[key] = condensed(changes)
        return self._segments[key]

    def _sharded(self, script: Script, *, adds: bool) -> Iterator[Change]:
        for kind, amount in script:
            if kind == "bytes":
                yield "activations", amount
            elif kind == "gradient":
                yield "gradients", amount * self._policy.param
            elif adds:
                yield "gradients", -amount * self._policy.param

    def _single(self, script: Script, *, adds: bool) -> Iterator[Change]:
        master, param, reduce = self._policy.master, self._policy.param, self._policy.reduce
        for kind, amount in script:
            if kind == "bytes":
                yield "activations", amount
            elif master == param:
                if kind == "gradient":
                    yield ("activations" if adds else "gradients"), amount * param
                elif adds:
                    yield "activations", -amount * param
            elif kind == "gradient":
                yield "activations", amount * param
            else:
                yield "gradients", amount * reduce
                yield "activations", -amount * param
                if reduce != master and not adds:
                    yield "gradients", amount * master
                if reduce != master or adds:
                    yield "gradients", -amount * reduce
