"""A step of scripts with round numbers, added up by hand. `tests/test_plan.py` compares with real steps."""

from dataclasses import dataclass

import pytest

from titan_core.planning.sharding_memory import Group, Policy
from titan_core.planning.step_memory import StageUnits, Unit, step_memory


@dataclass(frozen=True)
class Part:
    forward: tuple
    backward: tuple


def part(kept=100, gradient=10):
    return Part(
        (("bytes", kept),), (("bytes", 50), ("gradient", gradient), ("bytes", -kept - 50), ("handed", gradient))
    )


def group(ranks, whole=10):
    shard = whole // ranks
    return Group(ranks=ranks, whole=whole, shard=shard, trained_whole=whole, trained_shard=shard, largest=whole)


SINGLE = Policy(master=4, param=4, reduce=4, fsdp=False)
MIXED = Policy(master=4, param=2, reduce=4, fsdp=False)
FSDP = Policy(master=4, param=4, reduce=4)


def actions(micro_batches):
    return [(0, kind, i) for i in range(micro_batches) for kind in "FB"]


def test_on_one_device_gradients_stay_and_new_ones_are_added():
    stage = {0: StageUnits(units=(Unit(part=part()), Unit(part=part())), alongside=7)}
    first = step_memory(stage, SINGLE, {"parameters": 80}, actions(1))
    assert (first["parameters"], first["activations"], first["gradients"]) == (80, 257, 40)
    second = step_memory(stage, SINGLE, {"parameters": 80}, actions(2))
    assert (second["activations"], second["gradients"]) == (257 + 40, 80)


def test_gradients_are_cast_before_they_are_added():
    stage = {0: StageUnits(units=(Unit(part=part(kept=0)),))}
    assert sum(step_memory(stage, MIXED, {}, actions(1)).values()) == 50 + 20
    twice = step_memory(stage, MIXED, {}, actions(2))
    assert sum(twice.values()) == 40 + 50 + 20


def test_fsdp_gathers_frees_and_reduces():
    units = (Unit(part=part(), groups=(group(2),)), Unit(part=part(), groups=(group(2),), stays=True))
    found = step_memory({0: StageUnits(units=units)}, FSDP, {}, actions(1))
    # The backward of the second unit: its parameters, and those of the first on their way.
    assert found["communication"] == 40 + 40
    assert found["activations"] == 200 + 50
    never = Policy(master=4, param=4, reduce=4, reshards=False)
    kept = step_memory({0: StageUnits(units=units)}, never, {}, actions(1))
    assert kept["communication"] == 80


def test_whole_gradients_wait_if_they_are_reduced_last():
    stage = {0: StageUnits(units=(Unit(part=part(kept=1000), groups=(group(2),)),))}
    last = Policy(master=4, param=4, reduce=4, reduces_last=True)
    every, late = (step_memory(stage, policy, {}, actions(3)) for policy in (FSDP, last))
    assert late["gradients"] - every["gradients"] == 40 - 20


@pytest.mark.parametrize("replicas", [1, 2])
def test_partial_sums_wait_for_the_replicas(replicas):
    stage = {0: StageUnits(units=(Unit(part=part(kept=1000), groups=(group(2),)),))}
    policy = Policy(master=4, param=2, reduce=4, replicas=replicas)
    assert step_memory(stage, policy, {}, actions(2))["gradients"] == 20 + 20


def test_a_pipeline_keeps_what_is_in_flight_and_buffers_for_all():
    stage = {0: StageUnits(units=(Unit(part=part(), groups=(group(1),)),), received=3, handed_on=5)}
    policy = Policy(master=4, param=4, reduce=4, reshards=False, pipeline=True)
    gpipe = [(0, "F", i) for i in range(4)] + [(0, "B", i) for i in range(4)]
    found = step_memory(stage, policy, {}, gpipe)
    assert found["activations"] == 4 * 100 + 50
    assert found["communication"] == 4 * (3 + 5) + 40
    alternating = [(0, kind, i) for i in range(4) for kind in "FB"]
    assert step_memory(stage, policy, {}, alternating)["activations"] < found["activations"]


def test_what_two_units_share_is_gathered_and_reduced_once():
    shared = (group(2),)
    units = (Unit(part=part(), groups=shared, adds=True, stays=True), Unit(part=part(), groups=shared, stays=True))
    found = step_memory({0: StageUnits(units=units)}, FSDP, {}, actions(1))
    assert found["communication"] == 40 + 0
    assert found["gradients"] == 40


def test_the_next_units_parameters_arrive_while_a_unit_computes():
    busy = Part((("bytes", 1000), ("bytes", -1000)), ())

    def peak(prefetches):
        units = (Unit(part=busy, groups=(group(2),), prefetches=prefetches), Unit(part=part(0), groups=(group(2),)))
        return step_memory({0: StageUnits(units=units)}, FSDP, {}, [(0, "F", 0)])["communication"]

    assert peak(prefetches=True) - peak(prefetches=False) == 40
