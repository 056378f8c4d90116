"""Tensor parallelism of single modules, and what a compiler makes of it."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.fx import GraphModule

from ranks import run_ranks
from titan_core.collectives import gather
from titan_core.loss import vocabulary_parallel_logits, vocabulary_parallel_loss
from titan_core.tensor import AsyncTensorParallelError, TensorParallel, enable_async_tensor_parallel


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32, bias=False)
        self.gate = nn.Linear(16, 32, bias=False)
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, hidden):
        return self.down(torch.relu(self.up(hidden)) * self.gate(hidden))


ROLES = {"": "region", "up": "colwise", "gate": "colwise", "down": "rowwise"}


@pytest.mark.filterwarnings("ignore")  # the compiler imports what it itself deprecates
def test_the_compiler_can_overlap_what_a_region_sends():
    """Async tensor parallelism: inductor's pass finds the gathering and the scattering beside matrix products.

    Without GPUs that share memory the pass itself is run, on the graphs that it would get; it takes an environment with
    nccl for granted.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.micro_pipeline_tp import micro_pipeline_tp_pass
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch.distributed import _symmetric_memory

    def run():
        warnings.simplefilter("ignore")  # the compiler's own
        dist.is_nccl_available = lambda: True
        model, fused = Mix(), []
        TensorParallel(init_device_mesh("cpu", (2,)), sequence_parallel=True).apply(model, ROLES)

        def inspect(graph, inputs):
            traced = GraphModule(graph, copy.deepcopy(graph).graph)
            view_to_reshape(traced)
            with _symmetric_memory._test_mode():
                micro_pipeline_tp_pass(traced.graph)
            fused.append([str(node.target) for node in traced.graph.nodes if "symm_mem" in str(node.target)])
            return graph.forward

        backend = aot_autograd(fw_compiler=inspect, decompositions=select_decomp_table())
        compiled = torch.compile(model.forward, backend=backend)
        compiled(torch.randn(2, 4, 16, requires_grad=True)).sum().backward()
        return fused

    forward, backward = run_ranks(2, run)[0]
    assert forward == ["symm_mem.fused_all_gather_matmul.default", "symm_mem.fused_matmul_reduce_scatter.default"]
    assert backward == ["symm_mem.fused_all_gather_matmul.default"]


@pytest.mark.parametrize(("vocab", "chunk"), [(96, None), (97, 5), (5, 7)])
def test_the_loss_over_a_cut_vocabulary(vocab, chunk):
    """Also where the ranks have different numbers of rows, and labels without loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab, (2, 9), generator=generator)
    labels[0, 3:5] = -100

    def whole():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = h @ w.T
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (loss * 0.5).backward()
        return loss.item(), h.grad, w.grad, logits.detach()

    def run():
        group = dist.group.WORLD
        parts = weight.chunk(3)
        first = sum(len(part) for part in parts[: dist.get_rank()])
        h, w = hidden.clone().requires_grad_(), parts[dist.get_rank()].clone().requires_grad_()
        loss = vocabulary_parallel_loss(h, w, labels, first, chunk, group)
        (loss * 0.5).backward()
        dist.all_reduce(h.grad)
        return loss.item(), h.grad, w.grad, vocabulary_parallel_logits(h, w, vocab, group).detach()

    loss, grad_hidden, grad_weight, logits = whole()
    outcomes = run_ranks(3, run)
    torch.testing.assert_close(torch.cat([outcome[2] for outcome in outcomes]), grad_weight)
    for outcome in outcomes:
        assert outcome[0] == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(outcome[1], grad_hidden)
        torch.testing.assert_close(outcome[3], logits)


def test_gathered_tensors_are_real():
    """A lazily awaited one would lose its gradient at the border of a compiled region, without a word."""

    def run():
        return type(gather(torch.ones(2, requires_grad=True), 0, dist.group.WORLD)) is torch.Tensor

    assert run_ranks(2, run) == [True, True]


def test_equal_modules_share_a_class_so_that_a_compiler_knows_them_all():
    def run():
        tp = TensorParallel(init_device_mesh("cpu", (2,)), sequence_parallel=True)
        first, second = Mix(), Mix()
        tp.apply(first, ROLES)
        tp.apply(second, ROLES)
        return type(first) is type(second) is not Mix and type(first.up) is type(second.gate) is not nn.Linear

    assert run_ranks(2, run) == [True, True]


def test_async_tensor_parallelism_is_refused_where_gpus_cannot_share_memory():
    with pytest.raises(AsyncTensorParallelError, match=r"needs 64 GPUs in one machine.*Leave out --parallel\.async-tp"):
        enable_async_tensor_parallel(64)
