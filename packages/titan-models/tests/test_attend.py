import dataclasses

import pytest
import torch

from titan_models.attend import attend, document_mask

ROWS, LENGTH, HEAD = 3, 40, 16


def some(dtype, device, *, kv_heads=2):
    """Queries, keys, values and documents: several in the first two rows, one that fills the third."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, LENGTH, heads, HEAD) for heads in (4, kv_heads, kv_heads)]
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    starts = torch.rand(ROWS, LENGTH, generator=generator) < torch.tensor([[0.2], [0.6], [0.0]])
    ids = starts.cumsum(1).to(device)
    return [part.to(device, dtype).requires_grad_() for part in parts], ids


def result_and_gradients(parts, ids, kernel):
    mixed = attend(*parts, ids, kernel)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(mixed)
    return mixed, *torch.autograd.grad((mixed * weights).sum(), parts)


def test_the_mask_confines_to_earlier_tokens_of_the_same_document():
    mask = document_mask(torch.tensor([[0, 0, 1, 1]]))
    assert mask.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_all_kernels_are_one_function(kernel, kv_heads, dtype, bound):
    parts, ids = some(dtype, "cpu", kv_heads=kv_heads)
    for ours, expected in zip(
        result_and_gradients(parts, ids, kernel), result_and_gradients(parts, ids, "sdpa"), strict=True
    ):
        assert (ours - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_documents_may_change_in_place(kernel):
    """What is remembered of documents between layers is not what other documents need."""
    parts, ids = some(torch.float64, "cpu")
    attend(*parts, ids, kernel)
    ids.copy_(torch.zeros_like(ids))
    torch.testing.assert_close(attend(*parts, ids, kernel), attend(*parts, ids, "sdpa"))


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_without_documents_a_row_is_one(kernel):
    parts, _ = some(torch.float32, "cpu")
    assert torch.equal(attend(*parts, None, kernel), attend(*parts, None))


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_a_model_computes_with_the_kernel_of_its_configuration(tiny, filled, kernel):
    tokens = torch.randint(0, tiny.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    positions = torch.arange(12).expand(2, 12)
    model = filled(dataclasses.replace(tiny, attention_kernel=kernel))
    assert {block.attention.sdpa.kernel for block in model.layers.values()} == {kernel}
    torch.testing.assert_close(model(tokens, positions, ids), filled(tiny)(tokens, positions, ids))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_a_block_is_compiled_around_it(tiny, filled, kernel):
    model = filled(dataclasses.replace(tiny, attention_kernel=kernel))
    tokens, positions = torch.zeros(1, 12, dtype=torch.int64), torch.arange(12)[None]
    ids = torch.tensor([[0] * 5 + [1] * 7])
    expected = model(tokens, positions, ids)
    for block in model.layers.values():
        block.compile(backend="eager")
    torch.testing.assert_close(model(tokens, positions, ids), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_on_a_gpu(kernel):
    parts, ids = some(torch.bfloat16, "cuda")
    for ours, expected in zip(
        result_and_gradients(parts, ids, kernel), result_and_gradients(parts, ids, "sdpa"), strict=True
    ):
        assert (ours - expected).abs().max() <= 2e-2 * expected.abs().max()
