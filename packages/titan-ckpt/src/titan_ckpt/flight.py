"""A save that goes on while the run does, and how it ended."""

import threading
from collections.abc import Callable

from titan_ckpt.errors import CheckpointError


class Flight:
    """A save in a thread of its own.

    Args:
        save: what to do; its result is of no interest.
    """

    def __init__(self, save: Callable[[], object]) -> None:
        self._save = save
        self._error: BaseException | None = None
        # Not a daemon: a process that ends finishes the save it has begun.
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._save()
        except BaseException as error:  # whatever it is, `wait` raises it
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._error is not None

    def join(self) -> None:
        """Returns when it has ended, one way or the other."""
        self._thread.join()

    def land(self) -> None:
        """Returns when it has ended.

        Raises:
            CheckpointError: if it has failed.
        """
        self.join()
        if isinstance(self._error, CheckpointError):
            raise self._error
        if self._error is not None:
            raise CheckpointError(
                f"The checkpoint in the background could not be saved: {type(self._error).__name__}: {self._error}"
            ) from self._error
