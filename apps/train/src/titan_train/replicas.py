"""Replica groups in a run: which rows this group reads, what it tells the others, and which group saves.

A run without groups is always of one mind (`Alone`). `Together` shares every step with the groups that are there;
`Apart` trains on its own share and meets the others now and then. Each group has a folder of its own in the run
directory, `groups/N`. With `Together` the first group of the quorum saves for all; with `Apart` each for itself.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.location import place_of
from titan_core.replicas.averaging import Averaging
from titan_core.replicas.groups import ReplicaGroups
from titan_core.shards import local
from titan_train.build import LaidOut
from titan_train.config import TrainConfig
from titan_train.environment import Environment
from titan_train.parts import fingerprint, part_of
from titan_train.run_directory import RunDirectory, RunDirectoryError, checkpoint_directory, own_folder


class Deal(NamedTuple):
    """Which part of each global batch a group reads."""

    part: int
    """Its number, from 0."""
    parts: int
    """How many there are."""


class Alone:
    """A run of one group. Called on every rank alike."""

    deal = Deal(0, 1)
    """Whose rows the step that has begun reads."""
    moved = False
    """Whether something else than the step's update has changed weights, since it was last asked."""
    exports = True
    """Whether this group exports what it saves."""

    def begin(self) -> None:
        """A step begins; afterwards the state may be another group's, and the deal another."""

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """Sums over the groups that share the step.

        Raises:
            StepDiscardedError: if the step must be begun again.
        """
        return list(numbers)

    def commit(self, loss: Tensor, own_valid: int) -> tuple[Tensor, int] | None:
        """Sums gradients and what routers have counted over the groups that share the step.

        Returns the sums of this rank's `loss` and labels over them; None if the step must be begun again.
        """
        return loss, own_valid

    def end_step(self) -> None:
        """The step is taken and counted."""

    def readings(self) -> dict[str, float]:
        """What to log of the step."""
        return {}

    def of_all(self, count: int) -> int:
        """About how many there are in a global batch, if this group's part of what it has agreed on has `count`."""
        return count

    def saves(self, *, must: bool) -> bool:
        """Whether this group writes the checkpoint that is due; if it `must`, it waits for the right to.

        Raises:
            RunDirectoryError: if it has waited in vain.
        """
        return True


class Together(Alone):
    """Groups that share every step: its rows are dealt to those in the quorum."""

    def __init__(
        self, groups: ReplicaGroups, laid_out: LaidOut, env: Environment, saving: "Saving", *, timeout: float
    ) -> None:
        self._groups, self._laid_out, self._env = groups, laid_out, env
        self._saving, self._timeout = saving, timeout
        self._begun = False

    def begin(self) -> None:
        """Waits for the quorum, unless it has been waited for already."""
        if not self._begun:
            self._groups.begin()
            self.deal = Deal(self._groups.rank, self._groups.number)
            self.moved |= self._groups.healed
            self._begun = True
            if self.deal.part == 0:
                self._saving.claim()  # if another still has it, there is time until a checkpoint is due
            else:
                self._saving.release()

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """Sums over the groups of the quorum."""
        self._begun = False
        return self._groups.agree(numbers)

    def commit(self, loss: Tensor, own_valid: int) -> tuple[Tensor, int] | None:
        """Sums over the groups of the quorum, which then vote."""
        numbers = torch.stack([loss, loss.new_tensor(own_valid)])
        self._groups.reduce([numbers, *self._gradients(), *self._laid_out.layout.routers.counts])
        if self._groups.commit():
            return numbers[0], int(numbers[1].item())
        return None

    def _gradients(self) -> list[Tensor]:
        found = []
        for parameter in self._laid_out.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:  # no row has used it, and in another group one may have
                    parameter.grad = torch.zeros_like(parameter)
                found.append(local(parameter.grad))
        return found

    def readings(self) -> dict[str, float]:
        """How many groups there were, how long they were waited for, and what was done twice."""
        return {
            "replica.groups": self._groups.number,
            "replica.quorum_seconds": self._groups.quorum_seconds,
            "replica.discarded": self._groups.discarded,
        }

    def saves(self, *, must: bool) -> bool:
        """The first group of the quorum, once it holds the lock of the run directory."""
        if self.deal.part != 0:
            return False
        deadline = time.monotonic() + self._timeout * must
        while (problem := self._saving.claim()) is not None:
            if self._env.agree([time.monotonic() < deadline])[0] < self._env.degrees.world_size:
                if must:
                    raise RunDirectoryError(problem)
                self._env.say(f"A checkpoint is left out: {problem}")
                return False
            time.sleep(0.1)
        return True


class Apart(Alone):
    """Groups that train on a share of their own, and are averaged every so many steps."""

    def __init__(self, groups: ReplicaGroups, averaging: Averaging, deal: Deal) -> None:
        self._groups, self._averaging, self.deal = groups, averaging, deal
        self.exports = deal.part == 0
        self._begun, self._meeting_seconds = False, 0.0

    def begin(self) -> None:
        """Joins the other groups, once."""
        if not self._begun:
            self._averaging.begin(self._groups)
            self.moved = self._begun = True

    def of_all(self, count: int) -> int:
        """As if the others had as many."""
        return count * self.deal.parts

    def end_step(self) -> None:
        """Meets the other groups, if it is time."""
        started = time.perf_counter()
        met = self._averaging.end_step(self._groups)
        self.moved |= met
        self._meeting_seconds = time.perf_counter() - started if met else 0.0

    def readings(self) -> dict[str, float]:
        """How many groups there were at the last meeting, what this step's took, and what was held twice."""
        return {
            "replica.groups": self._groups.number,
            "replica.quorum_seconds": self._meeting_seconds,
            "replica.discarded": self._groups.discarded,
        }


class Saving:
    """The right to write to what all groups share, which one group has at a time: the locks of these directories."""

    def __init__(
        self, config: TrainConfig, env: Environment, directories: Sequence[RunDirectory], checkpointer: Checkpointer
    ) -> None:
        self._config, self._env, self._directories, self._checkpointer = config, env, directories, checkpointer
        self._claimed = False

    def claim(self) -> str | None:
        """Takes the right; why another has it, if one has."""
        if self._claimed:
            return None
        problem = self._env.on_main(self._try_to_claim)
        self._claimed = problem is None
        return problem

    def _try_to_claim(self) -> str | None:
        try:
            for directory in self._directories:
                directory.claim()
        except RunDirectoryError as error:
            self._release()
            return str(error)
        self._directories[0].write_config(self._config)
        return None

    def release(self) -> None:
        """Gives the right back, if this group has it, once it has saved.

        Raises:
            CheckpointError: if that has failed.
        """
        if self._claimed:
            self._checkpointer.wait()
            self._env.main_only(self._release)
            self._claimed = False

    def _release(self) -> None:
        for directory in self._directories:
            directory.release()


def own_folders(config: TrainConfig) -> list[Path]:
    """The run directories that are this process's alone: with groups its own and, for averaging's first, the run's."""
    own, run = own_folder(config), Path(config.output or "")
    runs = not config.replica.enabled or (config.replica.averaging.method != "none" and config.replica.group == 0)
    return list(dict.fromkeys([own, *[run] * runs]))


def claim(config: TrainConfig, env: Environment, cleanup: contextlib.ExitStack) -> list[RunDirectory]:
    """Claims what is this process's alone, until `cleanup`; returns what one group after the other may claim.

    Raises:
        RunDirectoryError: if another process has claimed it.
    """
    run = Path(config.output or "")
    folder = place_of(checkpoint_directory(config)).path if config.checkpoint.directory else None
    elsewhere = [] if folder is None or folder.resolve() == run.resolve() else [RunDirectory(folder)]
    own, shared = [RunDirectory(folder) for folder in own_folders(config)], []
    if config.replica.enabled and config.replica.averaging.method == "none":
        shared = [RunDirectory(run), *elsewhere]
    else:
        own += elsewhere
    for directory in own:
        env.on_main(directory.claim)
        cleanup.callback(directory.release)
    for directory in shared:
        cleanup.callback(directory.release)
    return shared


def write_configs(config: TrainConfig) -> None:
    """Writes the configuration to the directories that are this process's alone."""
    for folder in own_folders(config):
        RunDirectory(folder).write_config(config)


def open_groups(
    config: TrainConfig,
    env: Environment,
    what: Mapping[str, Any],
    state: Mapping[str, Any],
    averaging: Averaging | None,
) -> ReplicaGroups:
    """Connects to the Lighthouse. `state` may change until the first step; groups heal from what it holds then.

    Raises:
        ReplicaError: if that cannot be.
    """
    layout = {"parallel": part_of(config, "how")["parallel"], "ranks": env.degrees.world_size}
    same = {"what": fingerprint(what), "layout": layout, "from": config.checkpoint.init_from}
    progress = state["progress"]
    return ReplicaGroups(
        config.replica,
        state,
        position=averaging.position if averaging else lambda: progress.step,
        fingerprint=json.dumps(same, sort_keys=True, default=dataclasses.asdict),
        ranks=dist.group.WORLD if env.meshes is not None else None,
        device=env.device,
        report=env.say,
    )
