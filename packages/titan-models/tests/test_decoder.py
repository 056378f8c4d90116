import pytest
import torch

from titan_models.shape import MoEConfig


def run(model, tokens, **kwargs):
    return model(tokens, torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape), **kwargs)


def test_stages_with_missing_parts_compose_to_the_whole(tiny, filled):
    tokens = torch.randint(0, tiny.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    whole, first, second = (filled(tiny) for _ in range(3))
    del first.layers["1"]
    first.norm = first.lm_head = None
    del second.layers["0"]
    second.tok_embeddings = None
    assert "layers.1.attention.wq.weight" in dict(second.named_parameters())
    torch.testing.assert_close(run_stage(second, run(first, tokens), tokens), run(whole, tokens), rtol=0, atol=0)


def run_stage(stage, hidden, tokens):
    return stage(hidden, torch.arange(tokens.shape[1]).expand(tokens.shape))


def test_labels_turn_logits_into_the_summed_loss(tiny, filled):
    model = filled(tiny)
    tokens = torch.randint(0, tiny.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    logits = run(model, tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(run(model, tokens, labels=labels), expected)


def test_float64_stays_float64_everywhere(tiny, filled):
    model = filled(tiny).double()
    tokens = torch.randint(0, tiny.vocab_size, (1, 6), generator=torch.Generator().manual_seed(0))
    exact = run(model, tokens)
    assert exact.dtype == torch.float64
    rounded = run(filled(tiny), tokens).double()
    # Were any part computed in float32, the float64 model would agree with itself only to seven digits.
    model_again = filled(tiny).double()
    shifted = run(model_again, tokens.roll(0))
    assert torch.equal(exact, shifted)
    assert 0 < (exact - rounded).abs().max() < 1e-4


def test_tied_embeddings_are_one_parameter(tiny, filled):
    model = filled(tiny, tie_embeddings=True)
    assert model.lm_head.weight is model.tok_embeddings.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_dense_layers_come_before_layers_with_experts(tiny, filled):
    model = filled(tiny, layers=3, moe=MoEConfig(first_dense_layers=2))
    assert [layer.moe is not None for layer in model.layers.values()] == [False, False, True]
    assert [hasattr(layer, "feed_forward") for layer in model.layers.values()] == [True, True, False]


def test_row_weights_reach_the_routers(tiny, filled):
    tokens = torch.randint(0, tiny.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    gradients = {}
    for weights in (None, (0.5, 0.5), (0.25, 0.75), (1.0, 0.0)):
        model = filled(tiny, moe=MoEConfig(balance_loss=1.0))
        run(model, tokens, labels=tokens, row_weights=None if weights is None else torch.tensor(weights)).backward()
        loads = [layer.moe.router.load.sum().item() for layer in model.layers.values()]
        assert loads == [12 if weights == (1.0, 0.0) else 24] * 2
        gradients[weights] = model.layers["0"].moe.router.gate.weight.grad
    assert torch.equal(gradients[None], gradients[0.5, 0.5])
    assert not torch.equal(gradients[None], gradients[0.25, 0.75])


def test_one_packed_batch_gives_the_same_step_whole_and_in_micro_batches(tiny, filled):
    tokens = torch.randint(0, tiny.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = []
    for size in (4, 1):
        model = filled(tiny, moe=MoEConfig(balance_loss=1.0, z_loss=0.1)).double()
        for rows, weights in zip(tokens.split(size), shares.split(size), strict=True):
            (run(model, rows, labels=rows, row_weights=weights) / 24).backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()))
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("moe", [None, MoEConfig(balance_loss=0.1, groups=2, bias_update_rate=0.1)])
def test_loss_and_gradients_on_a_gpu_equal_those_on_the_cpu(tiny, filled, moe):
    tokens = torch.randint(0, tiny.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0] * 7 + [1] * 9] * 2)
    gradients = {}
    for device in ("cpu", "cuda"):
        model = filled(tiny, moe=moe).double().to(device)
        on_device = tokens.to(device)
        run(model, on_device, document_ids=ids.to(device), labels=on_device.roll(-1, 1)).backward()
        gradients[device] = {name: p.grad.cpu() for name, p in model.named_parameters()}
    for name, gradient in gradients["cpu"].items():
        torch.testing.assert_close(gradients["cuda"][name], gradient, rtol=1e-9, atol=1e-9)
