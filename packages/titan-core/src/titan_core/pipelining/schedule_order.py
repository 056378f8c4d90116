"""What a pipeline's schedule lets each rank compute, and in which order: torch's own schedules, asked without ranks."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from titan_core.compat import schedule_actions
from titan_core.config import ParallelConfig
from titan_core.pipelining.pipeline import build_schedule
from titan_core.pipelining.stages import stage_ranks
from titan_core.planning.fake_world import fake_world
from titan_core.planning.timeline import Computation


def compute_order(config: ParallelConfig, micro_batches: int) -> dict[int, list[Computation]]:
    """Pipeline rank -> what it computes in a step, in order: what the schedule of `config` itself says.

    The default process group must not exist.

    Raises:
        PipelineError: if the schedule's file cannot run.
    """
    ranks = stage_ranks(config)
    with fake_world(0, config.pp):
        nothing = torch.empty((), device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                nn.Identity(), stage, len(ranks), torch.device("cpu"), nothing, nothing, group=dist.group.WORLD
            )
            for stage, rank in enumerate(ranks)
            if rank == 0
        ]
        return schedule_actions(
            build_schedule(config, stages, n_microbatches=micro_batches, loss_fn=lambda *_: nothing)
        )
