import pytest
import torch

from titan_core.config import OptimizerConfig, ParamGroupConfig
from titan_core.init import init_parameters, materialize
from titan_core.optim import ModelState, OptimizerError, OptimizerState, build_optimizer, set_lr
from titan_core.optimizers import moments
from titan_core.optimizers.adamw import AdamW
from titan_core.roles import resolve_roles


@pytest.fixture
def make(toy, toy_roles, toy_rules):
    def build(*, tied=False, dtype=torch.float32, seed=0, **settings):
        model = toy(dtype, tied=tied)
        materialize(model, torch.device("cpu"))
        init_parameters(model, toy_rules, 0)
        return model, build_optimizer(model, resolve_roles(model, toy_roles), OptimizerConfig(**settings), seed=seed)

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


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "adamw"},
        {"name": "muon"},
        {"name": "muon", "state_dtype": "bfloat16", "state_rounding": "stochastic"},
        {"state_dtype": "bfloat16", "state_rounding": "stochastic"},
        {"state_dtype": "int8"},
        {"state_dtype": "int4"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_state_restored_into_a_new_optimizer_continues_bitwise(make, settings, monkeypatch):
    monkeypatch.setattr(moments, "_LEAST_QUANTIZED", 1)
    model, optimizer = make(**settings)
    step(model, optimizer, 0)
    saved = [
        {k: v.clone() for k, v in s.state_dict().items()} for s in (ModelState(model), OptimizerState(optimizer, model))
    ]
    step(model, optimizer, 1)

    again, fresh = make(**settings)
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


def kinds(optimizer):
    return {tensor.dtype for state in optimizer.state.values() for name, tensor in state.items() if name != "step"}


def test_moments_are_kept_in_the_format_that_is_asked_for(make, monkeypatch):
    monkeypatch.setattr(moments, "_LEAST_QUANTIZED", 1)
    expected = {
        "float32": {torch.float32},
        "bfloat16": {torch.bfloat16},
        "int8": {torch.uint8, torch.float32},
        "int4": {torch.uint8, torch.float32},
    }
    for state_dtype, dtypes in expected.items():
        model, optimizer = make(state_dtype=state_dtype)
        state = OptimizerState(optimizer, model).state_dict()
        assert kinds(optimizer) == dtypes
        matrix = {key for key in state if key.startswith("layers.0.mix.up.weight.")}
        names = {"moments"} if state_dtype == "int4" else {"exp_avg", "exp_avg_sq"}
        scales = {"exp_avg_scale", "exp_avg_sq_scale"} if state_dtype.startswith("int") else set()
        assert matrix == {f"layers.0.mix.up.weight.{name}" for name in {"step"} | names | scales}


def test_weights_in_bfloat16_have_moments_in_float32_unless_told_otherwise(make):
    for name in ("adamw", "muon"):
        model, optimizer = make(dtype=torch.bfloat16, name=name)
        step(model, optimizer, 0)
        assert kinds(optimizer) == {torch.float32}
        model, optimizer = make(dtype=torch.bfloat16, name=name, state_dtype="bfloat16")
        step(model, optimizer, 0)
        assert kinds(optimizer) == {torch.bfloat16}


def test_torchs_fused_step_is_used_where_it_can_be(make):
    assert type(make()[1]) is torch.optim.AdamW
    assert type(make(dtype=torch.float64)[1]) is torch.optim.AdamW
    assert type(make(state_offload=True)[1]) is AdamW


def test_groups_and_learning_rates_count_with_any_format(make):
    groups = (ParamGroupConfig(roles=("rowwise",), lr_factor=0.0), ParamGroupConfig(roles=("head",), lr_factor=0.5))
    model, optimizer = make(state_dtype="bfloat16", groups=groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_lr(optimizer, 0.1)
    step(model, optimizer, 0)
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert moved["layers.0.mix.down.weight"] == 0.0
    assert 0.04 < moved["head.weight"] < 0.06
    assert 0.09 < moved["layers.0.mix.up.weight"] < 0.15


def test_stochastic_rounding_of_weights_follows_the_seed_and_needs_weights_in_bfloat16(make):
    def weights(seed):
        model, optimizer = make(dtype=torch.bfloat16, parameter_rounding="stochastic", seed=seed)
        step(model, optimizer, 0)
        return model.head.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    with pytest.raises(OptimizerError, match=r"parameter_rounding stochastic .* these are float32; keep them"):
        make(parameter_rounding="stochastic")
