import torch


def test_packed_documents_see_exactly_what_they_see_alone(tiny, filled):
    model = filled(tiny)
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(0, tiny.vocab_size, (1, n), generator=generator) for n in (5, 9))
    packed = torch.cat((first, second), 1)
    positions = torch.cat((torch.arange(5), torch.arange(9)))[None]
    ids = torch.tensor([[0] * 5 + [1] * 9])
    together = model(packed, positions, ids)
    alone = torch.cat([model(t, torch.arange(t.shape[1])[None]) for t in (first, second)], 1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    open_ended = model(packed, positions)
    assert (open_ended[:, 5:] - alone[:, 5:]).abs().max() > 1e-2


def test_no_token_sees_a_later_one(tiny, filled):
    model = filled(tiny)
    tokens = torch.randint(0, tiny.vocab_size, (1, 12), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % tiny.vocab_size
    positions = torch.arange(12)[None]
    before, after = model(tokens, positions), model(changed, positions)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])
