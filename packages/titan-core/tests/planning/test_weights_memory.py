"""Sizes of shards and of optimizer states, against real ones."""

import math

import pytest
import torch
from torch import nn

from ranks import run_ranks
from titan_core.config import OptimizerConfig, ParallelConfig
from titan_core.degrees import resolve_degrees
from titan_core.mesh import build_meshes
from titan_core.optim import OptimizerState, build_optimizer
from titan_core.parallelize import parallelize
from titan_core.planning.weights_memory import Weight, adamw_state_bytes, adamw_working_bytes, groups_of, local_weight
from titan_core.roles import resolve_roles
from titan_core.shards import local


class Region(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(96, 200, bias=False)
        self.outward = nn.Linear(200, 96, bias=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(96)
        self.region = Region()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 96)
        self.blocks = nn.ModuleList([Block()])


ROLES = {
    "embedding": "embedding",
    "blocks.*": "block",
    "blocks.*.norm": "norm",
    "blocks.*.region": "region",
    "blocks.*.region.inward": "colwise",
    "blocks.*.region.outward": "rowwise",
}
DTYPES = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}


def measured(config, world_size, state_dtype):
    """FQN -> elements of the parameter, and bytes of its state, on the first rank."""

    def run():
        model = Model()
        roles = resolve_roles(model, ROLES)
        meshes = build_meshes(resolve_degrees(config, world_size), "cpu", experts=False) if world_size > 1 else None
        layout = parallelize(model, roles, meshes, config, micro_batch_size=1, **DTYPES)
        optimizer = build_optimizer(layout.model, roles, OptimizerConfig(state_dtype=state_dtype))
        state = OptimizerState(optimizer, layout.model).state_dict()
        return {
            fqn: (
                local(p).numel(),
                sum(local(t).numel() * t.itemsize for key, t in state.items() if key.startswith(f"{fqn}.")),
            )
            for fqn, p in layout.model.named_parameters()
        }

    return run() if world_size == 1 else run_ranks(world_size, run)[0]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("degrees", [{}, {"dp_shard": 2}, {"tp": 2}, {"dp_shard": 2, "tp": 2}])
def test_shards_and_states_are_as_large_as_real_ones(degrees, state_dtype):
    world_size = math.prod(degrees.values())
    config = ParallelConfig(**degrees)
    resolved, roles = resolve_degrees(config, world_size), resolve_roles(Model(), ROLES)
    real = measured(config, world_size, state_dtype)
    for fqn, parameter in Model().named_parameters():
        module, _, name = fqn.rpartition(".")
        own = local_weight(Weight(name=name, shape=tuple(parameter.shape), role=roles[module]), resolved)
        state = adamw_state_bytes(own, OptimizerConfig(state_dtype=state_dtype), 4)
        assert (math.prod(own.shard), state) == real[fqn], fqn


def weight(shape, role, degrees, world_size, **options):
    resolved = resolve_degrees(ParallelConfig(**degrees), world_size)
    return local_weight(Weight(name="w", shape=shape, role=role, **options), resolved)


def test_experts_are_cut_by_expert_and_then_where_it_fits():
    own = weight((8, 6, 4), "experts", {"ep": 2, "tp": 2}, 8)
    assert (own.whole, own.shard, own.ranks) == ((4, 6, 4), (1, 6, 4), 4)
    few = weight((4, 8, 4), "experts", {"ep": 2}, 8)
    assert (few.whole, few.shard, few.ranks) == ((2, 8, 4), (2, 2, 4), 4)


def test_what_a_rewrite_adds_is_cut_as_it_says():
    assert weight((8, 64), "colwise", {"tp": 2}, 2, added=True).whole == (8, 64)
    assert weight((8, 64), "rowwise", {"tp": 2}, 2, added=True, tensor_dim=1).whole == (8, 32)
    assert weight((64, 64), "norm", {"tp": 2}, 2).whole == (64, 64)


def test_groups_add_up_what_is_gathered_over_equally_many_ranks():
    degrees = {"ep": 2}
    dense, frozen = (weight((7, 3), "colwise", degrees, 2, trained=trained) for trained in (True, False))
    experts = weight((4, 3, 3), "experts", degrees, 2)
    one, other = groups_of([dense, frozen, experts])
    assert (one.ranks, one.whole, one.shard, one.trained_whole, one.trained_shard) == (2, 42, 24, 21, 12)
    assert (other.ranks, other.whole, other.shard) == (1, 18, 18)


def test_only_states_in_other_formats_are_worked_on_beside():
    own = [weight((64, 64), "colwise", {}, 1)]
    assert adamw_working_bytes(own, OptimizerConfig(), 4) == 0
    assert adamw_working_bytes(own, OptimizerConfig(state_dtype="int8"), 4) >= 2 * 64 * 64 * 4
