"""What the ranks agree on: every rank learns of every failure, and what rank 0 finds is what all go by.

Works alike in one process without a process group and in any torch.distributed world, over its default group or over
another one of the same ranks.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch.distributed as dist

from titan_ckpt.errors import CheckpointError

T = TypeVar("T")


class RanksFailedError(RuntimeError):
    """One or more ranks failed; raised on all of them alike."""

    def __init__(self, failures: dict[int, str], world_size: int) -> None:
        ranks: dict[str, list[int]] = {}
        for rank, message in failures.items():
            ranks.setdefault(message, []).append(rank)
        if world_size == 1:
            super().__init__("; ".join(ranks))
        else:
            super().__init__("; ".join(f"rank {_listed(who)}: {message}" for message, who in ranks.items()))


class World:
    """The ranks that call together; every method is called by all of them, in the same order.

    Args:
        group: a group of all ranks to talk over, so that another thread may use the default one meanwhile.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self._group = group
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, self._group)
        return cast(list[T], values)

    def gather_distinct(self, value: T) -> list[T]:
        """The different values (JSON) that ranks have, each sent once, ordered by the first rank that has it."""
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
        digests = self.gather(digest)
        firsts = {digest: rank for rank, digest in reversed(list(enumerate(digests)))}
        values = self.gather(value if firsts[digest] == self.rank else None)
        return [cast(T, values[rank]) for rank in sorted(firsts.values())]

    def gather_first(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on rank 0; nothing on the others."""
        if self.size == 1:
            return [value]
        values: list[T | None] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._group, group_dst=0)
        return cast(list[T], values or [])

    def deal(self, action: Callable[[], Sequence[T]]) -> T:
        """Calls `action` on rank 0 and gives each rank its own of the results, of which there is one a rank.

        Raises:
            RanksFailedError: on every rank, if `action` raised.
        """
        results, error = _attempt(action) if self.rank == 0 else (None, None)
        own: list[tuple[T | None, str | None]] = [(results[0] if results else None, _described(error))]
        if self.size > 1:
            parts = [(part, _described(error)) for part in results or [None] * self.size] if self.rank == 0 else None
            dist.scatter_object_list(own, parts, group=self._group, group_src=0)
        ((result, failure),) = own
        if failure is not None:
            raise RanksFailedError({0: failure}, self.size) from error
        return cast(T, result)

    def together(self, action: Callable[[], T]) -> T:
        """Calls `action` on every rank and returns this rank's result.

        Raises:
            RanksFailedError: on every rank, if `action` raised on any.
        """
        result, error = _attempt(action)
        failures = self.gather(_described(error))
        failed = {rank: message for rank, message in enumerate(failures) if message is not None}
        if failed:
            raise RanksFailedError(failed, self.size) from error
        return cast(T, result)

    def first(self, action: Callable[[], T]) -> T:
        """Calls `action` on rank 0 and returns its result on every rank.

        Raises:
            RanksFailedError: on every rank, if `action` raised.
        """
        result, error = _attempt(action) if self.rank == 0 else (None, None)
        answer = [(result, _described(error))]
        if self.size > 1:
            dist.broadcast_object_list(answer, group=self._group, group_src=0)
        result, failure = answer[0]
        if failure is not None:
            raise RanksFailedError({0: failure}, self.size) from error
        return cast(T, result)


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _described(error: Exception | None) -> str | None:
    """What a user needs of an error that came from another process."""
    if error is None:
        return None
    if isinstance(error, (OSError, CheckpointError, ValueError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _listed(ranks: list[int]) -> str:
    """`0, 1, 2` or, of many, `0, 1, 2 and 61 more`."""
    shown = ", ".join(map(str, ranks[:3]))
    return shown if len(ranks) <= 3 else f"{shown} and {len(ranks) - 3} more"
