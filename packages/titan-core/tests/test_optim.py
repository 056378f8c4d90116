import pytest
import torch

from titan_core.config import OptimizerConfig, ParamGroupConfig
from titan_core.init import init_parameters, materialize
from titan_core.optim import ModelState, OptimizerState, build_optimizer, set_lr
from titan_core.roles import resolve_roles


@pytest.fixture
def make(toy, toy_roles, toy_rules):
    def build(*, tied=False, **settings):
        model = toy(tied=tied)
        materialize(model, torch.device("cpu"))
        init_parameters(model, toy_rules, 0)
        return model, build_optimizer(model, resolve_roles(model, toy_roles), OptimizerConfig(**settings))

    return build


def decayed(model, optimizer):
    names = {p: n for n, p in model.named_parameters()}
    return {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}


def test_norms_biases_and_embeddings_do_not_decay(make):
    model, optimizer = make()
    linears = {f"layers.{i}.mix.{kind}.weight" for i in range(4) for kind in ("up", "down")}
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_restored_into_a_new_optimizer_continues_bitwise(make, name):
    model, optimizer = make(name=name)
    step(model, optimizer, 0)
    saved = [
        {k: v.clone() for k, v in s.state_dict().items()} for s in (ModelState(model), OptimizerState(optimizer, model))
    ]
    step(model, optimizer, 1)

    again, fresh = make(name=name)
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


MATRICES = {f"layers.{i}.mix.{kind}.weight" for i in range(4) for kind in ("up", "down")}


def test_with_muon_the_state_has_one_name_a_matrix_and_is_zero_before_the_first_step(make):
    model, optimizer = make(name="muon")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = OptimizerState(optimizer, model).state_dict()
    others = {f"{name}.{kind}" for name in before.keys() - MATRICES for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert set(state) == {f"{name}.momentum" for name in MATRICES} | others
    assert all(not tensor.any() for tensor in state.values())  # which NaN would be
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {group["lr"] for group in optimizer.param_groups} == {OptimizerConfig.lr}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_with_muon_only_matrices_move_otherwise_than_with_adamw(make):
    moved = []
    for name in ("adamw", "muon"):
        model, optimizer = make(name=name)
        step(model, optimizer, 0)
        moved.append({name: p.detach() for name, p in model.named_parameters()})
    different = {name for name, tensor in moved[0].items() if not torch.equal(tensor, moved[1][name])}
    assert different == MATRICES


def test_every_parameter_may_be_a_matrix_of_muon():
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(3, 4, bias=False)})
    before = model["up"].weight.detach().clone()
    optimizer = build_optimizer(model, {"up": "colwise"}, OptimizerConfig(name="muon"))
    model["up"](torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model["up"].weight, before)


def test_muon_trains(make):
    losses = []
    model, optimizer = make(name="muon", lr=0.02)
    tokens = torch.randint(0, 32, (8, 11), generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 80
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_groups_differ_in_learning_rate_decay_and_optimizer(make, name):
    groups = (
        ParamGroupConfig(patterns=("layers.1.mix.up.weight",), lr_factor=0.5),
        ParamGroupConfig(roles=("head",), weight_decay=0.7),
        ParamGroupConfig(roles=("rowwise",), optimizer="muon"),
    )
    model, optimizer = make(groups=groups, name=name, lr=0.2)
    found = {p: group for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert len(found) == len(parameters)
    assert found[parameters["layers.1.mix.up.weight"]]["lr"] == 0.1
    assert found[parameters["layers.2.mix.up.weight"]]["lr"] == 0.2
    assert decayed(model, optimizer) == MATRICES | {"head.weight"}
    assert found[parameters["head.weight"]]["weight_decay"] == 0.7
    state = OptimizerState(optimizer, model).state_dict()
    assert "layers.0.mix.down.weight.momentum" in state
    assert ("layers.0.mix.up.weight.momentum" in state) == (name == "muon")
    set_lr(optimizer, 0.1)
    assert found[parameters["layers.1.mix.up.weight"]]["lr"] == 0.05
    assert found[parameters["layers.0.mix.down.weight"]]["lr"] == 0.1


def test_set_lr_reaches_every_group(make):
    _, optimizer = make()
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
