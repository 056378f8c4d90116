"""What can go wrong with a checkpoint, in the words that a user reads."""

from collections.abc import Sequence


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, read or converted; the message names what is wrong and the remedy."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was written; `problems` has one sentence for each file concerned."""

    def __init__(self, folder: object, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"The checkpoint {folder} is damaged: {'; '.join(self.problems)}.")
