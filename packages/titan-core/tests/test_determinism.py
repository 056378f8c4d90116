import pytest
import torch

from titan_core.determinism import set_deterministic


@pytest.fixture(autouse=True)
def _as_before():
    yield
    set_deterministic(False)


def scatter():
    """An operation of which PyTorch has no deterministic implementation."""
    return torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


def test_kernels_without_the_same_bits_each_time_are_refused():
    set_deterministic(True)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        scatter()


def test_it_can_be_switched_off_again():
    set_deterministic(True)
    set_deterministic(False)
    assert scatter()[0] == 1
