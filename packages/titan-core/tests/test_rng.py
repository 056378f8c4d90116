import random

import numpy as np
import torch

from titan_core.rng import RngState


def test_generators_continue_where_they_were():
    state = RngState().state_dict()

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    first = draw()
    assert draw() != first
    RngState().load_state_dict(state)
    assert draw() == first
