"""What FSDP holds beside a rank's shards while a step runs: gathered parameters, gradients, buffers. Imports no torch.

Mirrors torch.distributed.fsdp.fully_shard of torch 2.13, as `titan_core.fsdp` uses it: what is gathered arrives in one
buffer and is copied to the parameters, and the buffer of a reduction lives until the next unit reduces.
"""

from dataclasses import dataclass

from titan_core.planning.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters of a unit that are gathered and reduced together, on one rank; in numbers of elements."""

    ranks: int
    """Ranks that have different shards; 1: they are not sharded."""
    whole: int
    """Once gathered."""
    shard: int
    """In this rank's shard, padding included."""
    trained_whole: int
    """Of `whole`, those with gradients."""
    trained_shard: int
    """Of `shard`, those with gradients."""
    largest: int
    """Of the largest parameter, once gathered."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How parameters and gradients are held while a rank computes; sizes of elements are in bytes."""

    master: int
    """Of parameters, and of the gradients that the optimizer gets."""
    param: int
    """Of parameters in forward and backward."""
    reduce: int
    """Of gradients while they are added up and reduced."""
    fsdp: bool = True
    """Whether FSDP holds them; else they are on one device."""
    reshards: bool = True
    """Whether gathered parameters are freed between forward and backward."""
    reduces_last: bool = False
    """Whether gradients are reduced over shards after the last micro-batch only."""
    replicas: int = 1
    """Copies of each shard, over which gradients are reduced too."""
    replicas_last: bool = True
    """Whether that happens after the last micro-batch only."""
    pipeline: bool = False
    """Whether parameters stay gathered, and gradients whole, until a stage's last micro-batch is done."""


class Sharding:
    """Keeps the books of FSDP on one rank. Units are known by the groups of their parameters."""

    def __init__(self, policy: Policy, ledger: Ledger) -> None:
        self._policy, self._ledger = policy, ledger
        self._gathered: set[int] = set()
        self._arrived: dict[int, int] = {}
        self._last_arrival = 0
        self._reduce_input = 0
        self._whole: set[int] = set()
        self._reduced: set[int] = set()
        self._partial: set[int] = set()

    def adds_gradients(self, groups: tuple[Group, ...]) -> bool:
        """Whether autograd adds new gradients to whole ones."""
        return self._policy.param == self._policy.reduce and self.has_whole(groups)

    def has_whole(self, groups: tuple[Group, ...]) -> bool:
        """Whether whole gradients of earlier micro-batches wait for their reduction."""
        return any(id(group) in self._whole for group in groups)

    def fetch(self, groups: tuple[Group, ...]) -> None:
        """Starts to gather them."""
        for group in groups:
            if id(group) in self._gathered or id(group) in self._arrived or group.ranks == 1:
                continue
            part = group.shard * self._policy.param
            self._ledger.add("communication", part)
            self._ledger.add("communication", part * group.ranks)
            self._ledger.add("communication", -part)
            self._arrived[id(group)] = part * group.ranks

    def gather(self, groups: tuple[Group, ...], *, backward: bool = False) -> None:
        """Waits until they are gathered; in a forward the last buffer is kept until the next one is read."""
        for group in groups:
            if id(group) in self._gathered:
                continue
            self.fetch((group,))
            self._gathered.add(id(group))
            self._ledger.add("communication", group.whole * self._policy.param)
            if group.ranks == 1:
                if self._policy.param != self._policy.master:
                    self._ledger.passing("communication", group.largest * self._policy.param)
                continue
            arrived = self._arrived.pop(id(group))
            self._ledger.add("communication", -(arrived if backward else self._last_arrival))
            self._last_arrival = self._last_arrival if backward else arrived

    def end_forward(self) -> None:
        """The last buffer goes."""
        self._ledger.add("communication", -self._last_arrival)
        self._last_arrival = 0

    def free(self, groups: tuple[Group, ...]) -> None:
        """Keeps this rank's shards only."""
        for group in groups:
            if id(group) in self._gathered:
                self._gathered.remove(id(group))
                self._ledger.add("communication", -group.whole * self._policy.param)

    def keep_whole(self, groups: tuple[Group, ...]) -> None:
        """After a backward that does not reduce: gradients are added up in the dtype of the reduction."""
        param, reduce = self._policy.param, self._policy.reduce
        for group in groups:
            if param != reduce and id(group) in self._whole:
                self._ledger.add("gradients", -group.trained_whole * param)
            elif param != reduce:
                self._ledger.passing("gradients", group.largest * reduce)
                self._ledger.add("gradients", group.trained_whole * (reduce - param))
            self._whole.add(id(group))

    def reduce(self, groups: tuple[Group, ...], *, last: bool) -> None:
        """Reduces the gradients; `last`: those of the step's last micro-batch are among them."""
        policy, ledger = self._policy, self._ledger
        for group in groups:
            if not group.trained_whole:
                continue
            size = policy.param
            if id(group) in self._whole and policy.param != policy.reduce:
                size = policy.reduce
            self._whole.discard(id(group))
            self.end_reduce()
            self._reduce_input = group.trained_shard * group.ranks * policy.reduce
            ledger.add("communication", self._reduce_input)
            ledger.add("gradients", -group.trained_whole * size)
            result = group.trained_shard * policy.reduce
            ledger.add("gradients", result)
            if group.ranks == 1:
                ledger.passing("communication", result)
            if policy.replicas > 1 and policy.replicas_last:
                if id(group) in self._partial:  # the partial sum or, in the end, the new one goes
                    ledger.add("gradients", -result)
                self._partial.add(id(group))
                if not last:
                    continue
            if policy.reduce != policy.master:
                ledger.add("gradients", group.trained_shard * policy.master)
                ledger.add("gradients", -result)
            if id(group) in self._reduced:
                ledger.add("gradients", -group.trained_shard * policy.master)
            self._reduced.add(id(group))

    def end_reduce(self) -> None:
        """The last reduction's buffer goes."""
        self._ledger.add("communication", -self._reduce_input)
        self._reduce_input = 0
