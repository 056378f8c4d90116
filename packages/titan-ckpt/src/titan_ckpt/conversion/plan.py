"""A conversion from the plan to the published result, in steps that a command or a training run can take by itself.

    plan.problems                  all that is wrong, before anything is written
    kept = plan.begin()            what an interrupted run of the same plan has left whole
    for file in plan.files:        in any order, by any process: ranks may share the files
        written[file.name] = plan.write(file)
    plan.finish(written)           small files, proof, manifest; the result appears

On a disk the files are written into `<destination>.partial`, which is renamed at the end. In an object store they are
written where they belong, and the last one, without which the result counts for nothing, after all others.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from titan_ckpt.conversion.journal import Journal, Written
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.formats.collection import listed
from titan_ckpt.formats.streams import create
from titan_ckpt.local_place import LocalPlace
from titan_ckpt.manifest import Json
from titan_ckpt.place import Place
from titan_ckpt.storage import FileRecord, HashingFile, discard, publish

Progress: TypeAlias = Callable[[str, int, int], object]
"""Takes what is being done, the bytes done and the bytes in all; called from any thread."""

Proof: TypeAlias = Callable[[Place], Mapping[str, Json]]
"""Examines the written folder, before it is published, and returns what is to be remembered of that."""


_FILES_AT_A_TIME = 2  # each is hashed on a core of its own; more only compete


def no_progress(what: str, done: int, total: int) -> None:
    """The default: nobody is told."""


class UnfitSourceError(CheckpointError):
    """A source that doesn't fit; `problems` has one sentence for each key or file, of which the message has a few."""

    def __init__(self, source: object, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        told = listed(self.problems, separator="; ")
        super().__init__(f"{source} cannot be converted, and nothing was written. {told}.")


def check_parent(destination: Place) -> None:
    """Raises `CheckpointError` if the folder in which something is to appear is not there."""
    if (folder := destination.parent.path) is not None and not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist; make it first"
        raise CheckpointError(f"{destination} could not be written: the folder {folder} {what}.")


def exists(destination: Place) -> CheckpointError:
    """What is raised where something is that may be replaced, and nobody has asked for that."""
    return CheckpointError(f"{destination} exists. Give another name, or replace it with --overwrite.")


@dataclass(frozen=True)
class PlannedFile:
    """A file of the result."""

    name: str
    nbytes: int
    """About; for the progress."""

    content: Callable[[HashingFile], Json]
    """Writes it, and returns what the layout has to know of it at the end."""


class Layout(Protocol):
    """What a format wants beside its large files."""

    def small_files(self, written: Mapping[str, Written]) -> Mapping[str, bytes]:
        """What is written after the large ones, in that order."""
        ...

    def seal(self, records: Mapping[str, FileRecord], proof: Mapping[str, Json]) -> tuple[str, bytes]:
        """Name and content of the last file, which says what the others are."""
        ...

    def kept(self, place: Place) -> str | None:
        """Why `overwrite` may not delete what is there; None if it may."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion will do."""

    source: Place
    destination: Place
    files: Sequence[PlannedFile]
    layout: Layout
    fingerprint: Mapping[str, Json]
    """What the result follows from: another fingerprint, another result."""

    problems: Sequence[str] = ()
    """All that speaks against it; it cannot begin while there are any."""

    table: Sequence[tuple[str, str, str]] = field(default=(), repr=False)
    """Name in the source, name in the result, and what happens on the way."""

    tensors: int = 0
    """How many the result has."""

    nbytes: int = 0
    """Their bytes."""

    @property
    def work(self) -> Place:
        """Where the files are written."""
        if self.destination.path is None:
            return self.destination
        return self.destination.parent / f"{self.destination.name}.partial"

    @property
    def _journal(self) -> Journal:
        return Journal(self.work, self.fingerprint)

    def begin(self, *, overwrite: bool = False, restart: bool = False) -> dict[str, Written]:
        """Prepares the place, and finds what an interrupted run has left.

        Args:
            overwrite: replace the destination if it exists; and the remains of another conversion.
            restart: delete the remains of any conversion.

        Returns:
            The files that are finished.

        Raises:
            UnfitSourceError: if there are problems.
            CheckpointError: if the destination is taken, or holds the remains of another conversion.
        """
        if self.problems:
            raise UnfitSourceError(self.source, self.problems)
        check_parent(self.destination)
        journal = self._journal
        begun = journal.exists()
        if begun and (restart or (overwrite and not journal.is_ours())):
            self.work.delete()
            begun = False
        if begun and not journal.is_ours():
            raise CheckpointError(
                f"{self.work} has the remains of another conversion: of another source, or with other options. Finish "
                "that one first, or delete them with --restart."
            )
        if self.destination.path is not None or not begun:
            self._check_destination(overwrite)
        if not begun:
            if self.destination.path is None:
                self.destination.delete()
            elif self.work.exists():
                raise CheckpointError(f"{self.work} is in the way: no conversion has left it. Move it elsewhere.")
            with self._reported():
                journal.begin()
        return {file.name: found for file in self.files if (found := journal.finished(file.name))}

    def write(self, file: PlannedFile, on_write: Callable[[int], object] = lambda size: None) -> Written:
        """Writes one of the files; `on_write` is called with the bytes of each piece."""
        with self._reported():
            with create(self.work, file.name) as out:
                out.on_write = on_write
                notes = file.content(out)
            written = Written(out.record, notes)
            self._journal.note(file.name, written)
        return written

    def finish(self, written: Mapping[str, Written], prove: Proof | None = None) -> None:
        """Writes the small files, has everything proved, and publishes it.

        Args:
            written: all of `files`, as `begin` and `write` have returned them, on whatever rank.
            prove: raises CheckpointError if the result is not to be published.
        """
        records = {name: each.record for name, each in written.items()}
        with self._reported():
            for name, content in self.layout.small_files(written).items():
                records[name] = _written(self.work, name, content)
        proof = prove(self.work) if prove is not None else {}
        with self._reported():
            _written(self.work, *self.layout.seal(records, proof))
            if (
                isinstance(self.work, LocalPlace)
                and isinstance(self.destination, LocalPlace)
                and (replaced := publish(self.work.path, self.destination.path)) is not None
            ):
                discard(replaced)
            # Last: without its journal, a run that is killed before the renaming could not be continued.
            Journal(self.destination, self.fingerprint).remove()

    def abandon(self) -> None:
        """Deletes what has been written: the source turned out to be damaged."""
        self.work.delete()

    def _check_destination(self, overwrite: bool) -> None:
        if not self.destination.exists():
            return
        if (reason := self.layout.kept(self.destination)) is not None:
            raise CheckpointError(f"{self.destination} exists and {reason}. Give another name, or move it elsewhere.")
        if not overwrite:
            raise exists(self.destination)

    def _reported(self) -> "_Reported":
        return _Reported(self)


class _Reported:
    """Turns an error of the system into one that says what is left, and what to do."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __enter__(self) -> None:
        pass

    def __exit__(self, exc_type: object, exc_val: BaseException | None, exc_tb: object) -> None:
        if isinstance(exc_val, OSError):
            raise CheckpointError(
                f"{self._plan.destination} could not be written: {exc_val}. {self._plan.work} keeps what is whole: run "
                "again when there is room and permission, and it goes on from there; or delete it."
            ) from exc_val


def run(
    plan: Plan,
    *,
    overwrite: bool = False,
    restart: bool = False,
    prove: Proof | None = None,
    progress: Progress = no_progress,
) -> int:
    """Takes all the steps of a plan.

    Args:
        plan: what to do.
        overwrite: see `Plan.begin`.
        restart: see `Plan.begin`.
        prove: see `Plan.finish`.
        progress: called with what is being done, the bytes done and the bytes in all.

    Returns:
        The bytes that were found whole and not written again.

    Raises:
        DamagedCheckpointError: if the source turns out to be damaged; nothing of the result remains.
        CheckpointError: if anything else goes wrong; what is whole remains for the next run.
    """
    written = plan.begin(overwrite=overwrite, restart=restart)
    kept = sum(each.record.size for each in written.values())
    total = sum(file.nbytes for file in plan.files)
    try:
        with Counter(progress, "writing", total) as count:
            count(sum(file.nbytes for file in plan.files if file.name in written))
            written |= _write_all(plan, [file for file in plan.files if file.name not in written], count)
        plan.finish(written, prove)
    except DamagedCheckpointError:
        plan.abandon()
        raise
    return kept


def _write_all(plan: Plan, files: Sequence[PlannedFile], count: Callable[[int], object]) -> dict[str, Written]:
    """Writes several files at a time: the hash of one alone would keep a disk waiting."""
    stop = threading.Event()

    def on_write(size: int) -> None:
        if stop.is_set():
            raise _StoppedError
        count(size)

    with ThreadPoolExecutor(min(_FILES_AT_A_TIME, os.cpu_count() or 1)) as threads:
        futures = {file.name: threads.submit(plan.write, file, on_write) for file in files}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:  # an interruption too has to wait for the other threads
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


class _StoppedError(Exception):
    """Another file could not be written; seen by nobody."""


class Counter:
    """Adds up bytes, from any thread, and tells how far one part of a conversion is.

    A file has more bytes than its tensors, so that the end of the block and not the sum says when it is done.
    """

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total = progress, what, total
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, size: int) -> None:
        """Counts bytes that are done."""
        with self._lock:
            self._done += size
            if 0 < self._done < self._total:
                self._progress(self._what, self._done, self._total)

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, exc_type: object, exc_val: object, exc_tb: object) -> None:
        if exc_val is None:
            self._progress(self._what, self._total, self._total)


def _written(place: Place, name: str, content: bytes) -> FileRecord:
    with create(place, name) as file:
        file.write(content)
    return file.record
