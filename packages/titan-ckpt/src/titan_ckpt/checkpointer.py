"""Saves the state of a run, finds its newest whole checkpoint and restores it, on one rank or on many.

A checkpoint is written under a scratch name and renamed when all of it is on the disk, so it is whole or it does
not exist; what can damage it afterwards is found by the sizes and hashes in its manifest. All ranks, which share
the file system, call every method; rank 0 decides, and all of them return alike or raise alike.
"""

import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from titan_ckpt.checkpoint import Checkpoint, open_checkpoint
from titan_ckpt.contents import collect, write_contents
from titan_ckpt.directory import begin, candidates, retire, step_folder, sweep
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.manifest import Json
from titan_ckpt.restore import restore
from titan_ckpt.state import Stateful
from titan_ckpt.storage import publish
from titan_ckpt.world import RanksFailedError, World

_log = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one run: folders `step-N` in one directory.

    Args:
        directory: where the checkpoints are; made by the first save.
        keep_latest: how many to keep; 0 keeps all.
        verify_hashes: read every file and compare its SHA-256 before a checkpoint counts as whole; otherwise only
            sizes are compared.
        report: called on rank 0 with a sentence for the user when something is not as it should be; by default
            a warning of the logger `titan_ckpt.checkpointer`.

    Raises:
        ValueError: if `keep_latest` is negative.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_latest: int = 2,
        verify_hashes: bool = True,
        report: Callable[[str], None] = _log.warning,
    ) -> None:
        if keep_latest < 0:
            raise ValueError(f"keep_latest is {keep_latest}; give how many checkpoints to keep, or 0 for all")
        self._directory = directory
        self._keep_latest = keep_latest
        self._verify_hashes = verify_hashes
        self._report = report
        self._damaged: set[str] = set()  # names of folders that turned out not to be whole

    def save(
        self,
        step: int,
        state: Mapping[str, Stateful],
        *,
        per_rank: Mapping[str, Stateful] | None = None,
        meta: Mapping[str, Json] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Publishes a checkpoint of `step`, replacing one that is there, and retires old ones.

        Args:
            step: optimizer steps taken.
            state: the objects to save, by name. DTensors are saved shard by shard; a plain tensor or a value is
                the same on all ranks that have its key, and is saved once (of a value that is checked).
            per_rank: objects of which every rank saves its own, random number generators for instance; restored
                only on as many ranks.
            meta: JSON values to find again in the checkpoint, a fingerprint for instance; rank 0's count.
            files: contents of small files by name, a tokenizer's for instance; rank 0's count.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: on every rank, if any could not save; nothing remains of this save then, older
                checkpoints are untouched, and the run can go on.
        """
        world = World()
        final = step_folder(self._directory, step)
        temporary = None
        try:
            temporary = world.first(lambda: begin(final, self._report))
            contents = collect(world, state, per_rank or {})
            write_contents(world, temporary, contents, step=step, meta=meta or {}, files=files or {})
            world.first(lambda: self._publish(temporary, final, step))
        except BaseException as error:
            if temporary is not None and world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, RanksFailedError):
                raise CheckpointError(
                    f"Step {step} could not be saved in {self._directory}: {error}. Nothing of it remains, older "
                    "checkpoints are untouched, and the run can go on. If it is the disk, make room there or "
                    "choose another directory."
                ) from error
            raise
        return final

    def newest_whole(self) -> Checkpoint | None:
        """The newest checkpoint of which every file is what was written; None if there is none.

        Damaged ones before it are reported, file by file, and skipped.

        Raises:
            CheckpointError: on every rank, if the directory cannot be read.
        """
        world = World()
        try:
            found = world.first(lambda: candidates(self._directory))
        except RanksFailedError as error:
            raise CheckpointError(f"The checkpoints in {self._directory} cannot be listed: {error}.") from error
        for folder in found:
            try:
                return open_checkpoint(folder, verify_hashes=self._verify_hashes)
            except DamagedCheckpointError as damaged:
                self._damaged.add(folder.name)
                if world.rank == 0:
                    self._report(f"{damaged} It is skipped.")
        return None

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
        world = World()
        own, left = dict(per_rank or {}), set(skip)
        written_by = checkpoint.manifest.world_size
        if own and written_by != world.size:
            if world.rank == 0:
                self._report(
                    f"The checkpoint {checkpoint.path} was saved by {written_by} rank(s) and is restored on "
                    f"{world.size}: what each rank has of its own ({', '.join(own)}) stays as it is."
                )
            left |= own.keys()
            own = {}
        try:
            restore(world, checkpoint, state, own, left)
        except RanksFailedError as error:
            raise CheckpointError(
                f"The checkpoint {checkpoint.path} could not be restored: {error}. The objects may be restored in "
                "part: don't go on with them."
            ) from error

    def _publish(self, temporary: Path, final: Path, step: int) -> None:
        publish(temporary, final)
        self._damaged.discard(final.name)
        sweep(self._directory, self._report)
        retire(
            self._directory,
            keep_latest=self._keep_latest,
            published=step,
            damaged=self._damaged,
            report=self._report,
        )
