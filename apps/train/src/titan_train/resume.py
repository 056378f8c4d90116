"""Where a run goes on from: the newest whole checkpoint of the same experiment."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from titan_ckpt.checkpoint import Checkpoint
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.open_directory import candidates
from titan_core.config import StateDtype
from titan_train.config import TrainConfig
from titan_train.environment import Environment
from titan_train.parts import differences


class ResumeError(RuntimeError):
    """The run cannot go on from what its directory holds; the message says why and what would work."""


class Progress:
    """How far a run is; part of every checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self.tokens = 0

    def advance(self, tokens: int) -> None:
        """Counts one step of a global batch with so many tokens."""
        self.step += 1
        self.tokens += tokens

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores the counters."""
        vars(self).update(state)


def already_excluded(checkpoint: Checkpoint) -> set[str]:
    """The parts that the run had left out, before it wrote this checkpoint; it has them anew since."""
    return set(cast(Sequence[str], checkpoint.meta.get("excluded", ())))


def saved_state_dtype(checkpoint: Checkpoint) -> StateDtype:
    """The format in which the run that wrote a checkpoint kept its optimizer's moments."""
    what = cast(Mapping[str, Any], checkpoint.meta["what"])
    return what["optimizer"]["state_dtype"]


def find_checkpoint(
    config: TrainConfig, env: Environment, checkpointer: Checkpointer, what: Mapping[str, Any]
) -> Checkpoint | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        ResumeError: if one is required and there is none, if one is there and none is wanted, if all are damaged, or
            if it belongs to another experiment.
    """
    checkpoint = checkpointer.newest_whole()
    mode = config.checkpoint.resume
    if checkpoint is None:
        folder = checkpointer.directory
        damaged = env.on_main(lambda: [place.name for place in candidates(folder)])
        if damaged:
            raise ResumeError(
                f"None of the checkpoints in {folder} is whole ({', '.join(damaged)}), and starting from the beginning "
                "would replace them. Restore what they lack, move them away to start anew, or choose a new directory "
                "with --output."
            )
        if mode == "required":
            raise ResumeError(
                f"There is no whole checkpoint in {config.output} to resume from; give the directory of an earlier run "
                "with --output, or use --checkpoint.resume auto to start from the beginning."
            )
        if config.checkpoint.exclude:
            raise ResumeError(
                f"There is no checkpoint in {folder}, so --checkpoint.exclude has nothing to leave parts out of; leave "
                "it out, or name the directory of the run to go on with by --output."
            )
        return None
    if mode == "never":
        raise ResumeError(
            f"{config.output} holds a checkpoint of step {checkpoint.step}, and --checkpoint.resume never forbids "
            "to go on from it; choose a new directory with --output, or --checkpoint.resume auto."
        )
    if "what" not in checkpoint.meta:
        raise ResumeError(
            f"{checkpoint.place} was not written by titan-train, so it has weights but no run to go on with. Choose a "
            "new directory with --output, and start from its weights with --checkpoint.init-from."
        )
    changes = differences(cast(Mapping[str, Any], checkpoint.meta["what"]), what)
    if changes and not config.checkpoint.allow_changes:
        listed = "".join(f"\n  {change}" for change in changes)
        raise ResumeError(
            f"{config.output} belongs to another experiment. From its checkpoint of step {checkpoint.step} to what you "
            f"ask for now, this changes:{listed}\nUndo the changes, choose a new directory with --output, or go on "
            "regardless with --checkpoint.allow-changes."
        )
    return checkpoint
