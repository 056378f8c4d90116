import pytest
import torch
from torch import nn

from titan_core.config import MuonConfig, OptimizerConfig, ParallelConfig, ParamGroupConfig
from titan_core.optimizers.param_groups import ParamGroupError, check_groups, group_parameters
from titan_core.roles import resolve_roles


@pytest.fixture
def treat(toy, toy_roles):
    """The treatment of each parameter of the toy, or of what `part` leaves of it."""

    def build(*groups, part=lambda model: model, tied=False, **settings):
        model = toy(tied=tied)
        roles = resolve_roles(model, toy_roles)
        model = part(model)
        treated = group_parameters(model, roles, OptimizerConfig(groups=groups, **settings))
        names = {parameter: name for name, parameter in model.named_parameters()}
        return {names[p]: treatment for treatment, parameters in treated.items() for p in parameters}

    return build


def having(treated, **expected):
    return {name for name, t in treated.items() if all(getattr(t, key) == value for key, value in expected.items())}


LINEARS = {f"layers.{i}.mix.{kind}.weight" for i in range(4) for kind in ("up", "down")}


def test_without_groups_only_weight_decay_differs_by_role(treat):
    treated = treat()
    assert len(set(treated.values())) == 2
    assert having(treated, weight_decay=0.1, lr_factor=1.0, optimizer="adamw") == LINEARS | {"head.weight"}
    assert having(treated, weight_decay=0.0, lr_factor=1.0, optimizer="adamw") == set(treated) - LINEARS - {
        "head.weight"
    }


def test_groups_take_parameters_by_role_and_by_pattern(treat):
    treated = treat(
        ParamGroupConfig(roles=("embedding", "head"), lr_factor=0.5),
        ParamGroupConfig(patterns=("layers.0.mix.*.weight", "layers.*.mix.up.bias"), weight_decay=0.3),
    )
    assert having(treated, lr_factor=0.5, weight_decay=0.0) == {"embed.weight"}
    assert having(treated, lr_factor=0.5, weight_decay=0.1) == {"head.weight"}
    assert having(treated, weight_decay=0.3) == {
        *(f"layers.0.mix.{kind}.weight" for kind in ("up", "down")),
        *(f"layers.{i}.mix.up.bias" for i in range(4)),
    }


def test_bias_is_a_role_of_its_own(treat):
    biases = {f"layers.{i}.mix.{kind}.bias" for i in range(4) for kind in ("up", "down")}
    assert having(treat(ParamGroupConfig(roles=("bias",), lr_factor=2.0)), lr_factor=2.0) == biases
    assert having(treat(ParamGroupConfig(roles=("colwise", "rowwise"), lr_factor=2.0)), lr_factor=2.0) == LINEARS


def test_the_first_group_that_fits_counts(treat):
    treated = treat(
        ParamGroupConfig(patterns=("layers.0.mix.up.weight",)),
        ParamGroupConfig(roles=("colwise",), lr_factor=3.0),
    )
    assert having(treated, lr_factor=3.0) == {f"layers.{i}.mix.up.weight" for i in (1, 2, 3)}


def test_muon_moves_the_matrices_of_blocks_and_groups_decide_otherwise(treat):
    assert having(treat(name="muon"), optimizer="muon") == LINEARS
    treated = treat(
        ParamGroupConfig(patterns=("layers.3.mix.down.weight",), optimizer="adamw"),
        ParamGroupConfig(roles=("head",), optimizer="muon"),
        name="muon",
    )
    assert having(treated, optimizer="muon") == LINEARS - {"layers.3.mix.down.weight"} | {"head.weight"}
    assert having(treat(ParamGroupConfig(roles=("rowwise",), optimizer="muon")), optimizer="muon") == {
        name for name in LINEARS if "down" in name
    }


def test_stacks_of_experts_are_matrices_and_their_vectors_are_not():
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.w1, model.experts.scale = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(2, 3))
    treated = group_parameters(model, {"experts": "experts"}, OptimizerConfig(name="muon"))
    assert {t.optimizer: [p.ndim for p in parameters] for t, parameters in treated.items()} == {
        "muon": [3],
        "adamw": [2],
    }


def test_frozen_parameters_are_left_out(treat):
    def freeze(model):
        model.embed.weight.requires_grad_(False)
        return model

    assert "embed.weight" not in treat(part=freeze)
    with pytest.raises(ParamGroupError, match="fits no trainable parameter"):
        treat(ParamGroupConfig(roles=("embedding",)), part=freeze)


def test_a_group_that_decides_nothing_is_refused_by_name(treat):
    unknown = ParamGroupConfig(patterns=("layers.*.mix.upp.weight",))
    with pytest.raises(ParamGroupError, match=r"groups\[1\] \(roles \[\], patterns .*upp.*\) fits no .*'rowwise'"):
        treat(ParamGroupConfig(roles=("bias",)), unknown)
    with pytest.raises(ParamGroupError, match=r"groups\[0\] \(roles \['blocks'\].* fits no trainable parameter"):
        treat(ParamGroupConfig(roles=("blocks",)))
    with pytest.raises(ParamGroupError, match=r"groups\[1\].* fits only parameters that earlier groups take"):
        treat(ParamGroupConfig(roles=("colwise",)), ParamGroupConfig(patterns=("layers.*.mix.up.weight",)))


def test_a_part_of_a_pipeline_need_not_have_parameters_of_every_group(treat, toy, toy_roles):
    def first_stage(model):
        model.head = model.norm = None
        return model

    groups = (ParamGroupConfig(roles=("head",), lr_factor=0.1), ParamGroupConfig(roles=("embedding",), lr_factor=0.5))
    assert having(treat(*groups, part=first_stage), lr_factor=0.5) == {"embed.weight"}
    # What the parts cannot see is found before the model is cut.
    model = toy()
    roles = resolve_roles(model, toy_roles)
    check_groups(model, roles, groups)
    with pytest.raises(ParamGroupError, match=r"groups\[2\]"):
        check_groups(model, roles, [*groups, ParamGroupConfig(roles=("gate",))])


def test_muon_refuses_what_is_no_matrix(treat):
    for group in (
        ParamGroupConfig(roles=("norm",), optimizer="muon"),
        ParamGroupConfig(roles=("bias",), optimizer="muon"),
    ):
        with pytest.raises(ParamGroupError, match=r"groups\[0\] asks for muon for 'layers.*Muon is for matrices"):
            treat(group)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"muon": MuonConfig(momentum=1.0), "name": "muon"}, "optimizer.muon.momentum is 1.0; it must lie between"),
        ({"muon": MuonConfig(ns_steps=0), "name": "muon"}, "optimizer.muon.ns_steps is 0; it must lie between"),
        ({"muon": MuonConfig(nesterov=False)}, "optimizer.muon has no effect with --optimizer.name adamw"),
        (
            {"state_rounding": "stochastic"},
            "optimizer.state_rounding stochastic has no effect with --optimizer.state-d",
        ),
        (
            {"state_rounding": "stochastic", "state_dtype": "int8"},
            "optimizer.state_rounding stochastic has no effect with --optimizer.state-dtype int8; use bfloat16",
        ),
        ({"state_dtype": "int8", "name": "muon"}, "optimizer.state_dtype int8 is for AdamW's moments"),
        (
            {"state_dtype": "int4", "groups": (ParamGroupConfig(roles=("rowwise",), optimizer="muon"),)},
            "optimizer.state_dtype int4 is for AdamW's moments",
        ),
        ({"parameter_rounding": "stochastic", "name": "muon"}, "optimizer.parameter_rounding stochastic is AdamW's"),
        ({"state_offload": True, "name": "muon"}, "optimizer.state_offload is AdamW's"),
        ({"groups": (ParamGroupConfig(lr_factor=2.0),)}, "optimizer.groups[0] names no parameters; give it"),
        (
            {"groups": (ParamGroupConfig(roles=("a",), lr_factor=-1.0),)},
            "optimizer.groups[0].lr_factor is -1.0; it must",
        ),
        (
            {"groups": (ParamGroupConfig(roles=("a",), lr_factor=float("nan")),)},
            "optimizer.groups[0].lr_factor is nan;",
        ),
        ({"groups": (ParamGroupConfig(roles=("a",), weight_decay=-1.0),)}, "optimizer.groups[0].weight_decay is -1.0;"),
    ],
)
def test_problems_are_named(settings, message):
    (problem,) = OptimizerConfig(**settings).problems()
    assert problem.startswith(message)


def test_good_configurations_have_no_problems():
    group = ParamGroupConfig(roles=("head",), optimizer="muon")
    assert not OptimizerConfig().problems()
    assert not OptimizerConfig(groups=(group,), muon=MuonConfig(nesterov=False)).problems()


def test_moments_are_offloaded_only_where_there_is_something_to_offload_from():
    offloading = OptimizerConfig(state_offload=True)
    assert not offloading.offload_problems("cuda", ParallelConfig())
    assert not OptimizerConfig().offload_problems("cpu", ParallelConfig(cpu_offload=True))
    (problem,) = offloading.offload_problems("cpu", ParallelConfig())
    assert problem.startswith("optimizer.state_offload has no effect on a CPU")
    (problem,) = offloading.offload_problems("cuda", ParallelConfig(cpu_offload=True))
    assert problem.startswith("optimizer.state_offload has no effect beside parallel.cpu_offload")
