import pytest
import torch

from titan_core.config import OptimizerConfig
from titan_core.init import init_parameters, materialize
from titan_core.optim import ModelState, OptimizerState, build_adamw, set_lr
from titan_core.roles import resolve_roles


@pytest.fixture
def make(toy, toy_roles, toy_rules):
    def build(*, tied=False, **settings):
        model = toy(tied=tied)
        materialize(model, torch.device("cpu"))
        init_parameters(model, toy_rules, 0)
        return model, build_adamw(model, resolve_roles(model, toy_roles), OptimizerConfig(**settings))

    return build


def decayed(model, optimizer):
    names = {p: n for n, p in model.named_parameters()}
    return {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}


def test_norms_biases_and_embeddings_do_not_decay(make):
    model, optimizer = make()
    linears = {f"layers.{i}.{kind}.weight" for i in (0, 1) for kind in ("up", "down")}
    assert decayed(model, optimizer) == linears | {"head.weight"}
    total = sum(len(group["params"]) for group in optimizer.param_groups)
    assert total == len(list(model.parameters()))


def test_they_do_if_asked(make):
    model, optimizer = make(no_decay=())
    assert decayed(model, optimizer) == {name for name, _ in model.named_parameters()}


def test_a_tied_head_counts_as_embedding(make):
    model, optimizer = make(tied=True)
    assert "embed.weight" not in decayed(model, optimizer)


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 32, (4, 10), generator=generator)
    model(tokens).logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_state_restored_into_a_new_optimizer_continues_bitwise(make):
    model, optimizer = make()
    step(model, optimizer, 0)
    saved = [
        {k: v.clone() for k, v in s.state_dict().items()} for s in (ModelState(model), OptimizerState(optimizer, model))
    ]
    step(model, optimizer, 1)

    again, fresh = make()
    step(again, fresh, 5)  # whatever it held before is replaced
    ModelState(again).load_state_dict(saved[0])
    OptimizerState(fresh, again).load_state_dict(saved[1])
    step(again, fresh, 1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])


def test_state_of_an_optimizer_that_has_not_stepped_is_zero_and_moves_nothing(make):
    model, optimizer = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = OptimizerState(optimizer, model).state_dict()
    assert set(state) == {f"{name}.{kind}" for name in before for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert all(not tensor.any() for tensor in state.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {group["lr"] for group in optimizer.param_groups} == {OptimizerConfig.lr}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_set_lr_reaches_every_group(make):
    _, optimizer = make()
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
