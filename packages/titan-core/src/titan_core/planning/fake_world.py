"""A world of ranks and tensors that cost nothing: what a layout does can be tried in one process, without a GPU.

A fake rank runs the code of a real one. Collectives return at once and change nothing; fake tensors have shapes, dtypes
and storages, but neither memory nor values. What depends on values cannot run: reading a number from a tensor raises,
and tokens are dealt evenly to the ranks of experts.

Lay a model out in a fake world, but before tensors are fake: meshes compute with real ones. Only then give it memory
(`titan_core.init.materialize`) and train it.

A process can lay out a model in one world only: torch remembers what it derived from a mesh, whose groups end with
their world, and would use them again for an equal mesh. Fork a process for each.
"""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from titan_core.compat import fake_store, fake_tensor_mode, trusted_pipeline_shapes, work_of_one_rank


@contextlib.contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Makes this process rank `rank` of `world_size`; the default process group must not exist."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=fake_store())
    try:
        with work_of_one_rank(rank):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Within it, new tensors on the CPU are fake, and pipelines run without a word from their neighbours."""
    with trusted_pipeline_shapes(), fake_tensor_mode():
        yield
