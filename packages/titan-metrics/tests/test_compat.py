import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from titan_metrics.compat import collective_records, foreach_norms, group_ranks


def test_norms_are_computed_wider_than_their_tensors():
    large = torch.full((4096,), 256.0, dtype=torch.float16)  # its squares overflow float16
    norms = foreach_norms([large, torch.ones(9)], torch.float32)
    assert [norm.item() for norm in norms] == [pytest.approx(256.0 * 64), 3.0]
    assert {norm.dtype for norm in norms} == {torch.float32}


def test_groups_are_known_by_name_with_their_ranks():
    def look():
        group = dist.new_group([0, 1], group_desc="pair")
        dist.barrier()
        return group_ranks(), getattr(group, "group_name", None)  # the third rank is not in it

    for ranks, name in run_ranks(3, look)[:2]:
        assert ranks[name] == [0, 1]
        assert [0, 1, 2] in ranks.values()


def test_a_process_without_collectives_has_no_records():
    def look():
        before = collective_records()
        dist.all_reduce(torch.ones(2))
        return before, collective_records()["entries"][0]["profiling_name"]

    assert run_ranks(2, look) == [(None, "gloo:all_reduce")] * 2
