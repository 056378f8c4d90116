"""Forward alone through the stages of a pipeline: torch's schedules cannot do without a backward if they run in a V.

Micro-batches pass in groups of as many as there are ranks. A rank takes a whole group through one of its stages, then
through its next, so that all ranks are busy however many stages each has. It asks for all inputs of a group before it
computes: two ranks then send to each other in one and the same order, without which NCCL would wait forever.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

MicroBatch = tuple[Tensor, Mapping[str, Tensor]]
"""Tokens [B, S] int64, and the model's further arguments."""


def forward(
    parts: Mapping[int, nn.Module],
    ranks: Sequence[int],
    micro_batches: Sequence[MicroBatch],
    hidden: Tensor,
    group: ProcessGroup,
) -> list[Tensor]:
    """What the last stage makes of each micro-batch, on the rank that holds it; nothing on the others.

    Args:
        parts: this rank's stages, by number.
        ranks: the rank in `group` of every stage.
        micro_batches: the same on all ranks of the pipeline.
        hidden: as large as what stages hand on [B, S, D], of its dtype and on its device; its values are not read.
        group: the ranks of the pipeline.
    """
    last, size = len(ranks) - 1, group.size()
    outputs: list[Tensor] = []
    here: dict[int, list[Tensor]] = {}  # what a stage of this rank hands to the next one, which is here too
    sending: list[tuple[dist.Work | None, Tensor]] = []  # tensors live until they are sent
    for first in range(0, len(micro_batches), size):
        chunk = micro_batches[first : first + size]
        for stage, part in sorted(parts.items()):
            waiting: list[dist.Work | None] = [None] * len(chunk)
            if stage == 0:
                inputs = [tokens for tokens, _ in chunk]
            elif ranks[stage - 1] == group.rank():
                inputs = here.pop(stage)
            else:
                inputs = [torch.empty_like(hidden) for _ in chunk]
                waiting = [dist.irecv(buffer, group=group, group_src=ranks[stage - 1]) for buffer in inputs]
            for i, (_, others) in enumerate(chunk):
                if (arrival := waiting[i]) is not None:
                    arrival.wait()
                output = part(inputs[i], **others)
                if stage == last:
                    outputs.append(output)
                elif ranks[stage + 1] == group.rank():
                    here.setdefault(stage + 1, []).append(output)
                else:
                    sending.append((dist.isend(output, group=group, group_dst=ranks[stage + 1]), output))
    for work, _ in sending:
        if work is not None:
            work.wait()
    return outputs
