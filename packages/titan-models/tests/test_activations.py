"""What blocks are said to keep for their backward, against what autograd really saves."""

import dataclasses

import pytest
import torch

from titan_models.activations import DecoderActivations, Extent
from titan_models.config import DecoderConfig
from titan_models.rope import rope_table
from titan_models.shape import MoEConfig

ROWS, LENGTH = 2, 32
DENSE = DecoderConfig(vocab_size=300, dim=64, layers=2, heads=8, kv_heads=4, head_dim=8, hidden_dim=160)
CONFIGS = {
    "dense": DENSE,
    "normalised heads": dataclasses.replace(DENSE, qk_norm=True),
    "experts": dataclasses.replace(DENSE, moe=MoEConfig(experts=8, top_k=2, hidden_dim=64, balance_loss=0.1)),
    "shared experts": dataclasses.replace(DENSE, moe=MoEConfig(hidden_dim=64, shared_hidden_dim=32, z_loss=0.1)),
}


def saved_bytes(model, dtype, *, confined):
    """Bytes of the storages that a block saves, without parameters, its input and the rotary table; whether the input
    is among what it saves."""
    block = model.layers["0"]
    x = torch.randn(ROWS, LENGTH, DENSE.dim, dtype=dtype, requires_grad=True)
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    table = rope_table(positions, model.rope_frequencies, dtype)
    known = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *table)}
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    documents = torch.zeros(ROWS, LENGTH, dtype=torch.int64) if confined else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = block(x, table, positions, documents, None)
    own = x.untyped_storage()._cdata
    return sum(s.nbytes() for key, s in found.items() if key not in known | {own}), own in found, result


@pytest.mark.parametrize("confined", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_keeps_what_autograd_saves(name, dtype, confined):
    config = CONFIGS[name]
    saved, input_saved, result = saved_bytes(config.build().to(dtype), dtype, confined=confined)
    extent = Extent(rows=ROWS, length=LENGTH, itemsize=dtype.itemsize, confined=confined)
    played = DecoderActivations(config, extent).block(0)
    size = result.numel() * result.itemsize
    kept = sum(amount for _, amount in played.forward) - size + (0 if input_saved else size)
    assert kept == pytest.approx(saved, rel=0.01 if config.moe is None else 0.03)
    assert played.result == size


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_backward_give_back_all_they_take(name, remat):
    config = CONFIGS[name]
    parts = DecoderActivations(config, Extent(rows=ROWS, length=LENGTH, itemsize=2, chunk_tokens=16))
    for part in (parts.embedding(), parts.block(0, remat=remat), parts.block(1, remat=remat), parts.head()):
        assert sum(n for kind, n in (*part.forward, *part.backward) if kind == "bytes") == 0
    gradients = [n for kind, n in parts.block(0, remat=remat).backward if kind == "gradient"]
    assert sum(gradients) == sum(p.numel() for p in config.build().layers["0"].parameters())


def test_recomputation_keeps_less_and_costs_a_second_forward():
    parts = DecoderActivations(DENSE, Extent(rows=ROWS, length=LENGTH, itemsize=2))

    def kept_and_peak(remat):
        played = parts.block(0, remat=remat)
        alive = most = 0
        for _, amount in played.backward:
            alive += amount
            most = max(most, alive)
        return sum(amount for _, amount in played.forward), most

    none, selective, full = map(kept_and_peak, ("none", "selective", "full"))
    assert none[0] > selective[0] > full[0] == parts.hidden
    assert none[1] < selective[1] < full[1]


def test_the_head_holds_a_few_chunks_of_logits():
    def peak(chunk):
        extent = Extent(rows=ROWS, length=LENGTH, itemsize=4, chunk_tokens=chunk)
        alive = most = 0
        for _, amount in DecoderActivations(DENSE, extent).head().forward:
            alive += amount
            most = max(most, alive)
        return most

    assert peak(32) - peak(16) == 3 * 16 * DENSE.vocab_size * 4


def test_what_is_cut_is_smaller():
    whole = Extent(rows=ROWS, length=LENGTH, itemsize=2)
    half = dataclasses.replace(whole, inner_parts=2, stream_parts=2)
    assert DecoderActivations(DENSE, half).hidden * 2 == DecoderActivations(DENSE, whole).hidden
    assert half.stream * 2 == whole.stream == whole.tokens
