"""How the rows of a global batch are shared out: over data-parallel ranks, and on each over micro-batches."""

from dataclasses import dataclass

from titan_core.config import ParallelConfig
from titan_core.degrees import Degrees
from titan_core.pipelining.stages import stage_count
from titan_train.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One rank's share of a global batch."""

    rows: int
    """Rows each rank computes, padding included."""
    micro_batch_size: int
    """Rows of a micro-batch; the last one may have fewer, except in a pipeline."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches a step."""
        return -(-self.rows // self.micro_batch_size)


def share_rows(training: TrainingConfig, parallel: ParallelConfig, degrees: Degrees, *, groups: int = 1) -> Rows:
    """Rounds up where something does not divide; the last ranks compute rows without weight then.

    `groups`: replica groups that share a global batch.
    """
    stages = stage_count(parallel) if degrees.pp > 1 else 1
    rows = -(-training.global_batch_size // (degrees.dp * groups))
    size = min(training.micro_batch_size or max(1, rows // stages), rows)
    if degrees.pp > 1:  # every micro-batch of a pipeline has the same shape
        rows = -(-rows // size) * size
    return Rows(rows=rows, micro_batch_size=size)
