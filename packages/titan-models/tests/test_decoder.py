import pytest
import torch


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


@pytest.mark.gpu
def test_loss_and_gradients_on_a_gpu_equal_those_on_the_cpu(tiny, filled):
    tokens = torch.randint(0, tiny.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0] * 7 + [1] * 9] * 2)
    gradients = {}
    for device in ("cpu", "cuda"):
        model = filled(tiny).double().to(device)
        on_device = tokens.to(device)
        run(model, on_device, document_ids=ids.to(device), labels=on_device.roll(-1, 1)).backward()
        gradients[device] = {name: p.grad.cpu() for name, p in model.named_parameters()}
    for name, gradient in gradients["cpu"].items():
        torch.testing.assert_close(gradients["cuda"][name], gradient, rtol=1e-9, atol=1e-9)
