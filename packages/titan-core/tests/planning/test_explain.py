import torch

from ranks import run_ranks
from titan_core.config import CompileConfig, ParallelConfig, RematConfig
from titan_core.degrees import Degrees, resolve_degrees
from titan_core.mesh import build_meshes
from titan_core.parallelize import parallelize
from titan_core.planning.explain import (
    Parameters,
    describe_meshes,
    describe_parameters,
    describe_roles,
    describe_stages,
    merge_parameters,
)
from titan_core.roles import resolve_roles


def described(toy, toy_roles, config, world_size):
    """Views and parameters, by pattern, of each rank."""

    def run():
        meshes = build_meshes(resolve_degrees(config, world_size), "cpu")
        model = toy()
        roles = resolve_roles(model, toy_roles)
        layout = parallelize(
            model, roles, meshes, config, micro_batch_size=1, param_dtype=torch.float32, reduce_dtype=torch.float32
        )
        return describe_meshes(meshes), {p.pattern: p for p in describe_parameters(layout.model, roles)}

    return run_ranks(world_size, run)


def test_parameters_are_described_as_they_lie(toy, toy_roles):
    (views, parameters), *_ = described(toy, toy_roles, ParallelConfig(tp=2), 4)
    assert parameters["layers.*.mix.up.weight"] == Parameters(
        pattern="layers.*.mix.up.weight",
        role="colwise",
        shape=(36, 12),
        local_shape=(9, 12),
        dtype="float32",
        placements=(("fsdp", "S(0)"), ("tp", "S(0)")),
        count=4,
    )
    assert parameters["layers.*.mix.down.weight"].placements == (("fsdp", "S(0)"), ("tp", "S(1)"))
    assert parameters["layers.*.mix.down.weight"].local_shape == (6, 18)
    assert parameters["norm.weight"].placements == (("fsdp", "S(0)"), ("tp", "R"))
    assert [view.name for view in views] == ["data", "dense"]
    assert {axis.name: axis.ranks for axis in views[1].axes if len(axis.ranks) > 1} == {"fsdp": (0, 2), "tp": (0, 1)}


def test_each_rank_sees_its_own_neighbours(toy, toy_roles):
    views = [views for views, _ in described(toy, toy_roles, ParallelConfig(dp_replicate=2), 4)]
    dense = [{axis.name: axis.ranks for axis in view[1].axes} for view in views]
    assert dense[3]["dp_replicate"] == (1, 3)
    assert dense[3]["fsdp"] == (2, 3)


def test_a_plain_model_has_no_placements(toy, toy_roles):
    model = toy(torch.bfloat16)
    lines = describe_parameters(model, resolve_roles(model, toy_roles))
    assert sum(line.count for line in lines) == len(list(model.parameters()))
    assert {(line.placements, line.dtype) for line in lines} == {((), "bfloat16")}
    assert merge_parameters([*lines, *lines])[0].count == 2 * lines[0].count


def test_stages_have_modules_costs_and_parameters(toy, toy_roles):
    model = toy()
    config = ParallelConfig(pp=2, pp_schedule="ZBVZeroBubble", pp_split=("layers.1", "layers.2", "layers.3"))
    costs = {f"layers.{i}.mix.up": 1.0 for i in range(4)} | {"head": 4.0}
    stages = describe_stages(model, resolve_roles(model, toy_roles), config, costs)
    assert [stage.rank for stage in stages] == [0, 1, 1, 0]
    assert [stage.cost_share for stage in stages] == [0.125, 0.125, 0.125, 0.625]
    assert stages[0].modules == ("embed", "layers.0")
    assert stages[3].modules == ("layers.3", "norm", "head")
    assert sum(stage.parameters for stage in stages) == sum(p.numel() for p in model.parameters())
    assert describe_stages(model, resolve_roles(model, toy_roles), ParallelConfig(), costs) == ()


ONE = Degrees(pp=1, dp_replicate=1, dp_shard=1, cp=1, tp=1, ep=1)
ROLES = {"a": "embedding", "b": "block", "c": "region", "d": "attention", "e": "router", "f": "experts", "g": "block"}


def techniques(config, world_size, **options):
    found = describe_roles(ROLES, resolve_degrees(config, world_size), config, **options)
    return {treatment.role: " | ".join(treatment.techniques) for treatment in found}


def test_roles_say_what_is_done_with_them():
    assert set(techniques(ParallelConfig(), 1).values()) == {""}
    assert describe_roles(ROLES, ONE, ParallelConfig())[1].modules == 2
    sharded = techniques(ParallelConfig(dp_replicate=2, tp=2), 8)
    assert "gathered over 2 fsdp ranks, freed after forward" in sharded["block"]
    assert "all-reduced over 2 replicas" in sharded["block"]
    assert "sequence is gathered" in sharded["region"]
    assert "input's gradient is summed" in techniques(ParallelConfig(tp=2, sequence_parallel=False), 2)["region"]
    assert "kept until the step ends" in techniques(ParallelConfig(pp=2), 4)["block"]
    assert "groups of 2 ranks" in techniques(ParallelConfig(reshard_after_forward=2), 4)["block"]
    assert "around a ring of 2" in techniques(ParallelConfig(cp=2), 2)["attention"]
    experts = techniques(ParallelConfig(ep=2), 2)
    assert "2 ep ranks" in experts["experts"]
    assert "load is summed" in experts["router"]
    block = techniques(
        ParallelConfig(), 1, remat=RematConfig(mode="full", every=2), compiling=CompileConfig(enabled=True)
    )
    assert block["block"] == "activations recomputed in backward (full, every 2 blocks) | compiled (inductor)"
