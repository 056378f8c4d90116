"""Saves the state of a run, finds its newest whole checkpoint and restores it, on one rank or on many.

A checkpoint is whole or it does not exist, on a disk and in an object store; what can damage it afterwards is found
by the sizes and hashes in its manifest. All ranks, which reach the same directory, call every method; rank 0 decides,
and all of them return alike or raise alike. A save may go on in the background, one at a time, while the run goes on.
"""

import contextlib
import datetime
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import cast

import torch.distributed as dist

from titan_ckpt.checkpoint import Checkpoint, open_checkpoint
from titan_ckpt.contents import Contents, agree, take, write_contents
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.flight import Flight
from titan_ckpt.location import Location, place_of
from titan_ckpt.manifest import Json
from titan_ckpt.open_directory import open_directory
from titan_ckpt.place import Place
from titan_ckpt.restore import restore
from titan_ckpt.staging import HostBuffers
from titan_ckpt.state import Stateful
from titan_ckpt.world import RanksFailedError, World

_log = logging.getLogger(__name__)

# A rank may write or verify for hours while the others have nothing to do but to wait for it; one that has died is
# noticed in any case, since its connections close.
_PATIENCE = datetime.timedelta(days=1)


class Checkpointer:
    """The checkpoints of one run: folders `step-N` in one directory.

    Args:
        directory: where the checkpoints are, a path or a URL that fsspec knows; made by the first save.
        keep_latest: how many to keep beside permanent ones; 0 keeps all.
        verify_hashes: read every file and compare its SHA-256 before a checkpoint counts as whole; otherwise only
            sizes are compared.
        asynchronous: get ready for `start_save`: all ranks make a process group over gloo, through which everything
            here goes from then on.
        report: called on rank 0 with a sentence for the user when something is not as it should be; by default
            a warning of the logger `titan_ckpt.checkpointer`.

    Raises:
        ValueError: if `keep_latest` is negative, or 1: if that one turned out to be damaged, there would be none.
    """

    def __init__(
        self,
        directory: Location,
        *,
        keep_latest: int = 2,
        verify_hashes: bool = True,
        asynchronous: bool = False,
        report: Callable[[str], None] = _log.warning,
    ) -> None:
        if keep_latest < 0 or keep_latest == 1:
            raise ValueError(
                f"keep_latest is {keep_latest}; give at least 2, since one alone may turn out damaged, or 0 for all"
            )
        self.directory = place_of(directory)
        """Where the checkpoints are."""
        self._folders = open_directory(self.directory, report)
        self._keep_latest = keep_latest
        self._verify_hashes = verify_hashes
        self._report = report
        self._damaged: set[str] = set()  # names of folders that turned out not to be whole
        self._asynchronous = asynchronous
        self._group: dist.ProcessGroup | None = None
        if asynchronous and dist.is_available() and dist.is_initialized():
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
        self._buffers = HostBuffers()
        self._flight: Flight | None = None
        self.last_blocking_seconds = 0.0
        """How long the last `save` or `start_save` kept its caller."""

    def save(
        self,
        step: int,
        state: Mapping[str, Stateful],
        *,
        per_rank: Mapping[str, Stateful] | None = None,
        meta: Mapping[str, Json] | None = None,
        files: Mapping[str, bytes] | None = None,
        permanent: bool = False,
    ) -> Place:
        """Publishes a checkpoint of `step`, replacing one that is there, and retires old ones.

        Args:
            step: optimizer steps taken.
            state: the objects to save, by name. DTensors are saved shard by shard; a plain tensor or a value is
                the same on all ranks that have its key, and is saved once (of a value that is checked).
            per_rank: objects of which every rank saves its own, random number generators for instance; restored
                only on as many ranks.
            meta: JSON values to find again in the checkpoint, a fingerprint for instance; rank 0's count.
            files: contents of small files by name, a tokenizer's for instance; rank 0's count.
            permanent: never retire this one, whatever a later run's `keep_latest`.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: on every rank, if any could not save; nothing remains of this save then, older
                checkpoints are untouched, and the run can go on. Also if a save in the background has failed.
        """
        started = time.perf_counter()
        self.wait()
        world = World(self._group)
        taken = self._take(world, step, state, per_rank, meta, files, permanent)
        try:
            return self._write(world, step, taken)
        finally:
            self.last_blocking_seconds = time.perf_counter() - started

    def start_save(
        self,
        step: int,
        state: Mapping[str, Stateful],
        *,
        per_rank: Mapping[str, Stateful] | None = None,
        meta: Mapping[str, Json] | None = None,
        files: Mapping[str, bytes] | None = None,
        permanent: bool = False,
    ) -> None:
        """Like `save`, but returns when everything is copied to host memory, and saves from there meanwhile.

        What goes wrong then is known by `failed` and raised by `wait`. Waits for the save before it to end.

        Raises:
            CheckpointError: on every rank, if the save before it has failed; this one has not started then.
            ValueError: if the checkpointer was not made for it.
        """
        if not self._asynchronous:
            raise ValueError("this Checkpointer saves synchronously only; make it with asynchronous=True")
        started = time.perf_counter()
        self.wait()
        world = World(self._group)
        taken = self._take(world, step, state, per_rank, meta, files, permanent)
        if isinstance(taken, Contents):
            try:
                taken = replace(taken, share=self._buffers.copy(taken.share))
            except (RuntimeError, MemoryError) as error:  # there is not as much host memory
                taken = error
        self._flight = Flight(lambda: self._write(world, step, taken))
        self.last_blocking_seconds = time.perf_counter() - started

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in the background has failed; without communication.

        Ranks learn of it at slightly different times: add it up over them, and call `wait` on all if any is set.
        """
        return self._flight is not None and self._flight.failed

    def wait(self) -> None:
        """Returns when no save is under way in the background.

        Raises:
            CheckpointError: on every rank, if it has failed; once.
        """
        flight = self._flight
        if flight is not None:
            flight.join()  # not forgotten if this is interrupted
            self._flight = None
            flight.land()

    def close(self) -> None:
        """Waits for the save in the background and gives up its process group; `start_save` is over then.

        Raises:
            CheckpointError: on every rank, if that save has failed.
        """
        try:
            self.wait()
        finally:
            self._asynchronous = False
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None
            self._buffers = HostBuffers()

    def newest_whole(self) -> Checkpoint | None:
        """The newest checkpoint of which every file is what was written; None if there is none.

        Damaged ones before it are reported, file by file, and skipped. One that another process retires meanwhile
        is not damaged, and the directory is looked at anew.

        Raises:
            CheckpointError: on every rank, if the directory cannot be read.
        """
        if self._flight is not None:
            self._flight.join()
        world = World(self._group)
        seen: set[Place] = set()  # damaged or retired
        while True:
            found = [folder for folder in self._candidates(world) if folder not in seen]
            if not found:
                return None
            for folder in found:
                seen.add(folder)
                try:
                    return open_checkpoint(folder, verify_hashes=self._verify_hashes, world=world)
                except DamagedCheckpointError as damaged:
                    if folder not in self._candidates(world):
                        break
                    self._damaged.add(folder.name)
                    if world.rank == 0:
                        self._report(f"{damaged} It is skipped.")

    def load(
        self,
        checkpoint: Checkpoint,
        state: Mapping[str, Stateful],
        *,
        per_rank: Mapping[str, Stateful] | None = None,
        skip: Collection[str] = (),
    ) -> None:
        """Restores objects in place, onto whatever layout their tensors have now.

        Args:
            checkpoint: what `newest_whole` or `open_checkpoint` returned.
            state: the objects to restore, by the names under which they were saved.
            per_rank: objects of which every rank has its own; left as they are, with a report, if the checkpoint
                was written by another number of ranks.
            skip: names of saved objects to leave out.

        Raises:
            CheckpointError: on every rank. If keys, shapes or dtypes differ it lists them all and nothing has
                changed; if reading failed, the objects are restored in part and must not be used.
        """
        world = World(self._group)
        own, left = dict(per_rank or {}), set(skip)
        written_by = checkpoint.manifest.world_size
        if own and written_by != world.size:
            if world.rank == 0:
                self._report(
                    f"The checkpoint {checkpoint.place} was saved by {written_by} rank(s) and is restored on "
                    f"{world.size}: what each rank has of its own ({', '.join(own)}) stays as it is."
                )
            left |= own.keys()
            own = {}
        try:
            restore(world, checkpoint, state, own, left)
        except RanksFailedError as error:
            raise CheckpointError(
                f"The checkpoint {checkpoint.place} could not be restored: {error}. The objects may be restored in "
                "part: don't go on with them."
            ) from error

    def _candidates(self, world: World) -> list[Place]:
        try:
            return world.first(self._folders.candidates)
        except RanksFailedError as error:
            raise CheckpointError(f"The checkpoints in {self.directory} cannot be listed: {error}.") from error

    def _take(
        self,
        world: World,
        step: int,
        state: Mapping[str, Stateful],
        per_rank: Mapping[str, Stateful] | None,
        meta: Mapping[str, Json] | None,
        files: Mapping[str, bytes] | None,
        permanent: bool,
    ) -> Contents | Exception:
        """What this rank has to save, or why it cannot: the others learn of it when they write together."""
        try:
            return take(
                world.rank, step, state, per_rank or {}, meta=meta or {}, files=files or {}, permanent=permanent
            )
        except Exception as error:
            return error

    def _write(self, world: World, step: int, taken: Contents | Exception) -> Place:
        """Writes and publishes what the ranks have taken; called by all, in the thread of the save."""
        written = None
        try:
            contents = agree(world, world.together(lambda: _raised(taken)))
            written = world.first(lambda: self._folders.begin(step))
            write_contents(world, written, contents)
            return world.first(lambda: self._publish(written, step))
        except BaseException as error:
            if written is not None and world.rank == 0:
                with contextlib.suppress(OSError, CheckpointError):  # what is left goes with the next save
                    self._folders.abandon(written)
            if isinstance(error, RanksFailedError):
                raise CheckpointError(
                    f"Step {step} could not be saved in {self.directory}: {error}. Nothing of it remains, and older "
                    "checkpoints are untouched. If it is the disk, make room there or choose another directory."
                ) from error
            raise

    def _publish(self, written: Place, step: int) -> Place:
        final = self._folders.publish(written, step)
        self._damaged.discard(final.name)
        self._folders.retire(keep_latest=self._keep_latest, published=step, damaged=self._damaged)
        return final


def _raised(taken: Contents | Exception) -> Contents:
    if isinstance(taken, Exception):
        raise taken
    return taken
