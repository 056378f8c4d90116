"""Replica groups: several runs of one experiment, each with ranks of its own, that share the work of every step.

A Lighthouse of torchft knows which groups live. Before a step each group asks it for a quorum: who takes part, and who
has fallen behind and first fetches the state of a group that has not. During the step each rank exchanges numbers and
gradients with the same rank of the other groups. After it all vote, and if anything went wrong anywhere, nobody takes
the step: it is done again, by those who are there then.

Glossary:

    group      a replica group: the ranks that one launcher has started. All groups have the same layout
    quorum     the groups that take part in a step, numbered from 0
    to heal    to take over another group's state, after a start or after missing a step
    position   how far a group is; those with the greatest are healed from, so equal positions must mean equal states
"""

import datetime
import hashlib
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from titan_core.replicas.config import INSTALL, ReplicaConfig
from titan_core.replicas.state import Stateful, load_local_state, local_state

if TYPE_CHECKING:
    from torchft.manager import Manager

    from titan_core.replicas.manager import Gloo, Nccl

_POLL_SECONDS = 0.1  # between two questions whether enough groups are there
_MOST_FAILURES = 20  # in a row, before it is not other groups that die, but something else that is wrong


class ReplicaError(RuntimeError):
    """This group cannot take part; the message says why and what to do."""


class StepDiscardedError(Exception):
    """The step cannot be taken, since a group has gone; begin it again. Raised on all ranks of a group alike."""


class ReplicaGroups:
    """One rank's view of the groups that train together; to be closed, or entered.

    A step is `begin`, any number of `agree` and `reduce`, and `commit`; all ranks of a group call them alike.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        state: Mapping[str, Stateful],
        *,
        position: Callable[[], int],
        fingerprint: str,
        ranks: ProcessGroup | None,
        device: torch.device,
        report: Callable[[str], None] = print,
    ) -> None:
        """Joins the other groups at the first `begin`.

        Args:
            config: of this group.
            state: what a group that heals takes over. Taking it must not communicate.
            position: how far this group is; where two groups have the same, so must their `state`, and at 0 it does.
            fingerprint: names what is computed and the layout; groups where it differs are refused.
            ranks: the ranks of this group, with gloo for tensors on the CPU; None if there is one only.
            device: where the tensors to reduce are.
            report: called with a sentence for the user, on every rank that has something to say.

        Raises:
            ReplicaError: if torchft is not installed, or the Lighthouse is not known or does not answer.
        """
        self._config, self._state, self._position = config, state, position
        self._ranks, self._device, self._report = ranks, device, report
        self._fingerprint = int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:3])
        self.number = 0
        """Groups in the quorum."""
        self.rank = 0
        """This group's number among them."""
        self.healed = False
        """Whether the last `begin` has replaced this group's state by another's."""
        self.discarded = 0
        """Steps of this process that were not taken."""
        self.quorum_seconds = 0.0
        """How long the last `begin` took."""
        self._joining, self._started = True, time.monotonic()
        self._settled = False  # the quorum is sound, and large enough
        self._failures = 0  # in a row
        self._stale = False  # this group has healed in part only
        self._process_group, self._manager = self._open()

    def _open(self) -> tuple["Gloo | Nccl", "Manager"]:
        os.environ.setdefault("RUST_LOG", "warn")  # else torchft prints several lines a step
        try:
            from titan_core.replicas import manager
        except ModuleNotFoundError as error:
            raise ReplicaError(f"Replica groups need torchft, and {error.name} is not installed: {INSTALL}.") from error
        address = manager.lighthouse_address(self._config)
        if not address:
            raise ReplicaError(
                "Replica groups need a Lighthouse: start one with `torchft_lighthouse --min_replicas 1`, and name it "
                "by --replica.lighthouse http://host:29510 or the variable TORCHFT_LIGHTHOUSE."
            )
        host = self._config.host or socket.gethostname()
        timeout = datetime.timedelta(seconds=self._config.timeout_seconds)
        process_group = manager.process_group_for(self._device, timeout)
        self._store = manager.open_store(host, self._ranks)
        try:
            manager = manager.open_manager(
                self._config,
                process_group,
                self._store,
                host=host,
                ranks=self._ranks,
                state_dict=lambda: local_state(self._state),
                load_state_dict=self._heal,
            )
        except (RuntimeError, TimeoutError) as error:
            raise ReplicaError(
                f"The Lighthouse at {address} does not answer within {self._config.timeout_seconds:g} s ({error}). Is "
                "it running, and reachable from here? Start one with `torchft_lighthouse --min_replicas 1`."
            ) from error
        return process_group, manager

    # ---- A step

    def begin(self) -> None:
        """Waits for a quorum of enough groups that compute the same; heals if this one is behind.

        When it returns, all groups in the quorum have the greatest position among them.

        Raises:
            ReplicaError: if there is no quorum in time, if this group does not fit to the others, or if it has healed
                in part and nobody is left to heal from.
        """
        started = time.perf_counter()
        while not self._meet():
            pass
        self.quorum_seconds = time.perf_counter() - started

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """The sums of `numbers` over the groups in the quorum, each rank's with the same rank's of the others.

        Raises:
            StepDiscardedError: on all ranks of this group, if a group has gone.
        """
        sums = self._exchange(numbers)
        if any(self._sum_over_ranks([self._failed()])):
            self._discard()
            raise StepDiscardedError
        return sums

    def reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sums each tensor in place over the groups in the quorum; plain tensors, of the same shapes in all groups.

        If it fails they hold anything, and `commit` says so.
        """
        if self.number == 1:
            return
        for bucket in buckets(tensors, self._config.bucket_bytes):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                self._sum_over_groups(bucket[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._sum_over_groups(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def commit(self) -> bool:
        """Whether the step may be taken: everything has succeeded on all ranks of all groups in the quorum.

        A group that dies in the middle of the vote may leave others of two minds. Those that have not taken the step
        heal from those that have.
        """
        if self.number > 1:
            votes = self._exchange([not self._failed()])
            if votes != [self.number]:
                self._manager.report_error(RuntimeError("another group could not take the step"))
        return self._decide()

    # ---- Its parts

    def _meet(self) -> bool:
        """Asks for a quorum; whether the step can begin with it."""
        self.healed = False
        self._manager.load_state_dict({"step": 0 if self._stale else self._position(), "batches_committed": 0})
        try:
            self._manager.start_quorum()
        except (RuntimeError, TimeoutError) as error:
            raise ReplicaError(
                f"Group {self._config.group} got no quorum: {error}. Either the Lighthouse is gone, or the other "
                f"groups did not come within --replica.quorum-seconds {self._config.quorum_seconds:g}."
            ) from error
        self.number, self.rank = self._manager.num_participants(), self._manager.participating_rank() or 0
        if self._settled and not self._process_group.renewed:
            return True  # the same groups as before
        self._process_group.renewed = False
        self._settled = self._is_sound() and self._is_enough()
        return self._settled

    def _is_sound(self) -> bool:
        """Whether all ranks of this group are connected and, if it had to heal, have healed."""
        failed, healed = self._sum_over_ranks([self._failed(), self.healed])
        if failed:
            self._stale = self._stale or healed > 0
            self._discard()
            return False
        if self._stale and not healed:
            raise ReplicaError(
                f"Group {self._config.group} was taking over another group's state when that group died, and no other "
                "is left that has it. Start the groups again: they go on from the newest checkpoint."
            )
        self._stale = False
        return True

    def _is_enough(self) -> bool:
        """Whether the quorum is as large as it must be, after checking that all its groups compute the same."""
        own, late = self._fingerprint, time.monotonic() - self._started > self._config.join_seconds
        patience_over = self._sum_over_ranks([late])[0] > 0
        try:
            groups, first, second, joining, impatient = self.agree(
                [1, own, own**2, self._joining, self._joining and patience_over]
            )
        except StepDiscardedError:
            return False
        if (first, second) != (groups * own, groups * own**2):
            return self._refuse_others()
        complete = groups == self._config.groups or joining < groups or impatient > 0
        if groups < self._config.min_groups or not complete:
            time.sleep(_POLL_SECONDS)
            return False
        self._joining = False
        return True

    def _refuse_others(self) -> bool:
        """Groups differ: the one that comes last must go, so that others can go on."""
        if self._joining:
            raise ReplicaError(
                f"Group {self._config.group} is of another experiment or another layout than the groups it would join. "
                "Start all with the same command, but for --replica.group; or give each job a Lighthouse of its own."
            )
        self._manager.report_error(RuntimeError("a group of another experiment is in the quorum"))
        self._discard()
        return False

    def _heal(self, received: Any) -> None:
        load_local_state(self._state, received)
        self.healed = True

    def _exchange(self, numbers: Sequence[int]) -> list[int]:
        """Sums over groups; anything, if it fails."""
        if self.number == 1:
            return [int(number) for number in numbers]
        sums = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        self._sum_over_groups(sums)
        return sums.tolist()

    def _sum_over_groups(self, tensor: Tensor) -> None:
        """In place; what goes wrong is remembered by the manager, and the others are told by closed connections."""
        self._manager.allreduce(tensor, reduce_op=ReduceOp.SUM).wait()
        if self._failed():
            self._abort()

    def _sum_over_ranks(self, numbers: Sequence[int]) -> list[int]:
        if self._ranks is None:
            return [int(number) for number in numbers]
        sums = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(sums, group=self._ranks)
        return sums.tolist()

    def _failed(self) -> bool:
        return self._manager.errored() is not None

    def _discard(self) -> None:
        """Ends what was begun, on all ranks of this group, and has the quorum connected anew."""
        if not self._failed():
            self._manager.report_error(RuntimeError("another rank of this group failed"))
        self._decide()

    def _decide(self) -> bool:
        """Whether no rank of this group has failed.

        Raises:
            ReplicaError: if one has, again and again.
        """
        error = self._manager.errored()
        if self._manager.should_commit():
            self._failures = 0
            return True
        self._settled = False
        self._abort()
        self._failures += 1
        self.discarded += not self._joining
        reason = str(error.original_exception).splitlines()[0] if error else "another rank of this group failed"
        if self._failures > _MOST_FAILURES:
            raise ReplicaError(
                f"Group {self._config.group} has tried in vain {_MOST_FAILURES} times to take a step together with the "
                f"others. The last reason: {reason}. Can the groups reach each other under the names of "
                "--replica.host?"
            )
        if not self._joining:
            self._report(f"A step was discarded, and is done again: {reason}")
        return False

    def _abort(self) -> None:
        """Closes the connections to other groups, so that none of them waits for this one in vain."""
        if error := self._manager.errored():
            # A log may keep the frames, which would keep the connections.
            traceback.clear_frames(error.original_exception.__traceback__)
        self._process_group.abort()

    # ---- The end

    def close(self) -> None:
        """Leaves the other groups, which notice it when they next ask for a quorum."""
        self._manager.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        if exc_type is None:
            self._sum_over_ranks([0])  # rank 0 answers for all, so it goes last
        self.close()


def buckets(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, of at most `size` bytes together; a tensor that is larger comes alone."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and (held + tensor.nbytes > size or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.nbytes
    if bucket:
        yield bucket
