import gc

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ranks import run_ranks
from titan_core.config import ParallelConfig
from titan_core.degrees import resolve_degrees
from titan_core.init import init_parameters, materialize
from titan_core.mesh import build_meshes
from titan_core.parallelize import parallelize
from titan_core.planning.memory_use import MemoryRecorder, MemoryUse
from titan_core.roles import resolve_roles

KIB = 1024


def kibibytes(count):
    return torch.ones(count * KIB, dtype=torch.uint8)


def test_the_peak_is_when_most_is_alive():
    with MemoryRecorder() as recorder:
        first = kibibytes(3)
        view = first[10:]  # no bytes of its own
        kibibytes(5)  # dies at once
        del first, view
        last = kibibytes(6)
    assert recorder.peak() == MemoryUse(other=8 * KIB)
    assert len(last) == 6 * KIB


def test_tensors_from_before_count_when_they_are_named():
    before = kibibytes(2)
    with MemoryRecorder() as recorder:
        recorder.hold("parameters", [before, None])
        recorder.hold("parameters", [before[:7]])
        kibibytes(1)
    assert recorder.peak() == MemoryUse(parameters=2 * KIB, other=KIB)


def test_what_a_tensor_is_for_may_be_known_later():
    with MemoryRecorder() as recorder:
        recorder.category = "activations"
        kept, passing = kibibytes(4), kibibytes(1)
        recorder.hold("gradients", [kept])
    assert recorder.peak() == MemoryUse(gradients=4 * KIB, activations=KIB)
    assert recorder.peak().total == 5 * KIB
    assert len(passing) == KIB


def test_two_memories_have_their_own_peaks():
    with MemoryRecorder() as recorder:
        parameter = kibibytes(9)
        recorder.hold("parameters", [parameter], host=True)
        recorder.category = "activations"
        kibibytes(4)
        recorder.host = True
        recorder.category = "other"
        scratch = kibibytes(2)
    assert recorder.peak() == MemoryUse(activations=4 * KIB)
    assert recorder.peak(host=True) == MemoryUse(parameters=9 * KIB, other=2 * KIB)
    assert len(parameter) + len(scratch) == 11 * KIB


def test_a_storage_that_is_resized_is_followed():
    with MemoryRecorder() as recorder:
        recorder.category = "activations"
        x = kibibytes(4)
        x.untyped_storage().resize_(0)
        y = kibibytes(3)
        x.untyped_storage().resize_(2 * KIB)
    assert recorder.peak() == MemoryUse(activations=5 * KIB)
    assert torch.UntypedStorage.resize_.__name__ == "resize_"
    assert len(y) == 3 * KIB


def step(model, roles, rules, config, world_size, rows):
    meshes = build_meshes(resolve_degrees(config, world_size), "cpu")
    layout = parallelize(
        model, roles, meshes, config, micro_batch_size=1, param_dtype=torch.float32, reduce_dtype=torch.float32
    )
    materialize(model, torch.device("cpu"))
    init_parameters(model, rules, 0)
    gc.collect()
    with MemoryRecorder() as recorder:
        recorder.hold("parameters", model.parameters())
        recorder.category = "activations"
        batch = {name: torch.zeros(rows, 10, dtype=torch.int64) for name in ("tokens", "labels")}
        layout.accumulate(batch, divisor=1.0)
        recorder.hold("gradients", [p.grad for p in model.parameters()])
    return recorder.peak(), layout.gradient_bytes()


@pytest.mark.parametrize("grad_sync", ["every", "last"])
def test_gradients_that_wait_for_their_reduction_are_gradients(toy, toy_roles, toy_rules, grad_sync):
    def run():
        model = toy()
        config = ParallelConfig(dp_shard=2, grad_sync=grad_sync)
        return step(model, resolve_roles(model, toy_roles), toy_rules, config, 2, 3)

    for use, whole in run_ranks(2, run):
        parameters = sum(p.numel() for p in toy().parameters()) * 4
        assert use.parameters == pytest.approx(parameters / 2, rel=0.05)
        assert whole == (parameters if grad_sync == "last" else 0)
        assert use.gradients >= 0.9 * whole
        assert use.gradients <= (1.6 if grad_sync == "last" else 0.6) * parameters
        assert use.communication > 0


def test_the_fakes_from_which_shapes_are_derived_have_no_bytes():
    def run():
        mesh = init_device_mesh("cpu", (2,))
        a, b = (distribute_tensor(torch.ones(64, 15), mesh, [Shard(0)]) for _ in range(2))
        with MemoryRecorder() as recorder:
            total = a + b
        return recorder.peak().total, total.to_local().nbytes

    for found, own in run_ranks(2, run):
        assert found == own
