import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from titan_models.head import Head


def make(dtype=torch.float32, chunk=7, vocab=50, dim=16, batch=(3, 10)):
    generator = torch.Generator().manual_seed(0)
    head = Head(dim, vocab, chunk).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocab, dim, generator=generator))
    hidden = torch.randn(*batch, dim, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, batch, generator=generator)
    labels[0, :4] = -100
    return head, hidden, labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_loss_and_gradients_equal_cross_entropy(dtype, tolerance, chunk):
    head, hidden, labels = make(dtype, chunk)
    (head(hidden, labels) / 13).backward()
    ours = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    loss = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum") / 13
    loss.backward()
    torch.testing.assert_close(head(hidden, labels) / 13, loss, rtol=tolerance, atol=0)
    for mine, reference in zip(ours, (hidden.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=tolerance)


def test_many_chunks_round_a_low_precision_gradient_no_more_than_one():
    exact, hidden, labels = make(torch.float64)
    exact.weight = torch.nn.Parameter(exact.weight.detach().bfloat16().double())
    exact(hidden.detach().bfloat16().double(), labels).backward()
    errors = {}
    for chunk in (1, 1000):
        head, hidden, labels = make(torch.bfloat16, chunk)
        loss = head(hidden, labels)
        assert loss.dtype == torch.float32
        loss.backward()
        assert head.weight.grad.dtype == torch.bfloat16
        errors[chunk] = (head.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert errors[1000] < 0.01
    assert errors[1] < 1.1 * errors[1000]  # summed in bfloat16 it would be 1.3 times as large


def test_logits_of_all_tokens_never_exist():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    head, hidden, labels = make(chunk=4, vocab=500)
    with Largest() as largest:
        head(hidden, labels).backward()
    assert largest.numel < 30 * 500
    with Largest() as largest:
        head(hidden)
    assert largest.numel == 30 * 500


def test_all_labels_ignored_gives_zero_loss_and_gradients():
    head, hidden, labels = make()
    loss = head(hidden, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == head.weight.grad.abs().max() == 0


def test_gradients_are_computed_only_where_needed():
    head, hidden, labels = make()
    head.weight.requires_grad_(False)
    head(hidden, labels).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    with torch.no_grad():
        assert not head(hidden, labels).requires_grad


def test_without_gradients_only_the_logits_are_computed():
    head, hidden, labels = make(chunk=4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = head(hidden, labels)
    assert counter.get_total_flops() == 2 * labels.numel() * head.weight.numel()
    assert loss == head(hidden, labels)


def test_gradients_are_let_go_once_they_are_handed_over():
    """A pipeline keeps the losses of all micro-batches until a step ends; they must not keep these."""
    head = Head(8, 16)
    torch.nn.init.normal_(head.weight)
    loss = head(torch.randn(1, 4, 8, requires_grad=True), torch.zeros(1, 4, dtype=torch.int64))
    assert len(loss.grad_fn.saved_tensors) == 2
    loss.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        _ = loss.grad_fn.saved_tensors
