import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ranks import run_ranks
from titan_core.optimizers import whole_matrices
from titan_core.optimizers.whole_matrices import WholeMatrices, own_stack
from titan_core.shards import local, owned


def numbered(count, *shape):
    """Parameters whose elements all differ."""
    size = torch.Size(shape).numel()
    return [torch.arange(size, dtype=torch.float32).view(shape) + i * size for i in range(count)]


def observe(tensors, axes, placements, dtype=torch.float32):
    """What the function saw on this rank, whether results are right, and dtypes and sizes of what was sent."""
    mesh = init_device_mesh("cpu", axes)
    parameters = [nn.Parameter(distribute_tensor(tensor, mesh, placements)) for tensor in tensors]
    results = [torch.zeros_like(local(p)) for p in parameters]
    seen, sent = [], []
    all_to_all = dist.all_to_all_single

    def spy(received, parts, *args, **kwargs):
        sent.append((parts.dtype, parts.numel()))
        all_to_all(received, parts, *args, **kwargs)

    def negated(whole):
        seen.extend(matrix.clone() for matrix in whole)
        return -whole

    def write(i, matrices, part):
        own_stack(results[i])[matrices] += part

    dist.all_to_all_single = spy
    whole = WholeMatrices(parameters, dtype)
    whole.apply(negated, lambda i, matrices: own_stack(parameters[i].detach())[matrices], write)
    right = all(torch.equal(r, -t[owned(p)]) for r, t, p in zip(results, tensors, parameters, strict=True))
    return seen, right, sent


LAYOUTS = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "copies": ((4,), [Replicate()]),
    "copies of rows": ((2, 2), [Replicate(), Shard(0)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_matrix_is_worked_on_once_whole_and_ranks_share_evenly(layout):
    tensors = numbered(8, 6, 10)
    ranks = run_ranks(4, observe, tensors, *LAYOUTS[layout])
    assert all(right for _, right, _ in ranks)
    assert [len(seen) for seen, _, _ in ranks] == [2] * 4
    everything = [matrix for seen, _, _ in ranks for matrix in seen]
    assert sorted(m[0, 0].item() for m in everything) == [t[0, 0].item() for t in tensors]
    assert all(any(torch.equal(m, t) for t in tensors) for m in everything)
    # Of copies only one is sent, and each gets its result.
    gathered, returned = (sum(sent[i][1] for _, _, sent in ranks) for i in (0, 1))
    copies = {"copies": 4, "copies of rows": 2}.get(layout, 1)
    assert gathered * copies == returned == copies * 8 * 60


def test_large_matrices_do_not_fall_to_one_rank():
    tensors = [*numbered(4, 20, 20), *numbered(1, 40, 40), *numbered(4, 20, 20)]
    ranks = run_ranks(2, observe, tensors, (2,), [Shard(0)])
    # The large one costs as much as the eight others together.
    assert [[matrix.shape[0] for matrix in seen] for seen, _, _ in ranks] == [[40], [20] * 8]


def test_whole_experts_move_nowhere():
    tensors = numbered(2, 5, 4, 3)
    for (seen, right, sent), count in zip(run_ranks(2, observe, tensors, (2,), [Shard(0)]), (3, 2), strict=True):
        assert right
        assert not sent
        assert len(seen) == 2 * count


def test_a_rank_without_experts_takes_part():
    ranks = run_ranks(4, observe, numbered(1, 3, 4, 5), (4,), [Shard(0)])
    assert [len(seen) for seen, _, _ in ranks] == [1, 1, 1, 0]
    assert all(right for _, right, _ in ranks)


def test_memory_is_bounded_by_rounds(monkeypatch):
    tensors = numbered(8, 6, 10)
    ((_, _, at_once), _) = run_ranks(2, observe, tensors, (2,), [Shard(0)])
    monkeypatch.setattr(whole_matrices, "_ROUND_ELEMENTS", 60)
    for _, right, sent in run_ranks(2, observe, tensors, (2,), [Shard(0)]):
        assert right
        assert len(sent) == 4 * len(at_once)
        assert max(size for _, size in sent) <= 60


def test_large_stacks_are_worked_on_in_parts(monkeypatch):
    monkeypatch.setattr(whole_matrices, "_JOB_ELEMENTS", 20)
    for axes, placements in (((2,), [Shard(1)]), ((2,), [Replicate()]), ((2,), [Shard(0)])):
        ranks = run_ranks(2, observe, numbered(1, 6, 4, 5), axes, placements)
        assert all(right for _, right, _ in ranks)
        assert [len(seen) for seen, _, _ in ranks] == [3, 3]


def test_ranks_exchange_the_smaller_dtype():
    for dtype, wire in ((torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)):
        for seen, _, sent in run_ranks(2, observe, numbered(2, 4, 6), (2,), [Shard(0)], dtype):
            assert {kind for kind, _ in sent} == {wire}
            assert {matrix.dtype for matrix in seen} == {dtype}


def test_an_unknown_way_to_cut_is_refused():
    def make():
        mesh = init_device_mesh("cpu", (2,))
        lying = DTensor.from_local(torch.zeros(1, 4), mesh, [Shard(0)], run_check=False, shape=(4, 4), stride=(4, 1))
        with pytest.raises(
            RuntimeError, match=r"shape \(4, 4\) is cut in an unknown way: .* \[1, 1, 4\] of it, but \[1, 2"
        ):
            WholeMatrices([lying], torch.float32)

    run_ranks(2, make)
