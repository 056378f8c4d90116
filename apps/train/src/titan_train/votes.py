"""What ranks must decide alike before a step: each says what it knows, the sums are the same everywhere. No torch."""

import signal
from typing import NamedTuple


class Votes(NamedTuple):
    """What one rank knows or, added up, all of them."""

    by_hand: int = 0
    """Was asked to end by Ctrl-C."""
    preempted: int = 0
    """Was asked to end by a cluster that wants its machine back."""
    save: int = 0
    """Its clock says that it is time for a checkpoint."""
    save_failed: int = 0
    """Its part of the last checkpoint could not be written."""

    bad_step: int = 0
    """Has seen that a step must not count."""

    @property
    def ended_by(self) -> signal.Signals | None:
        """The signal by which all ranks end; None if they go on."""
        return signal.SIGTERM if self.preempted else signal.SIGINT if self.by_hand else None
