import time

import pytest
import torch.distributed as dist

from ranks import run_ranks
from titan_metrics.probes.clocks import clock_offsets


def test_clocks_that_are_ahead_or_behind_are_found_within_the_error():
    ahead = [0.0, 3.5, -120.0]

    def compare():
        mine = int(ahead[dist.get_rank()] * 1e9)
        return clock_offsets(clock=lambda: time.time_ns() + mine)

    results = run_ranks(3, compare)
    assert results[0] == results[1] == results[2]
    for offset, truth in zip(results[0], ahead, strict=True):
        assert abs(offset.seconds - truth) <= offset.error + 1e-6
        assert offset.error < 0.05
    assert results[0][0].seconds == 0


def test_the_exchange_with_the_least_delay_counts():
    """A delay on one way only spoils an exchange by half of itself."""

    def compare():
        asked = 0

        def clock():
            nonlocal asked
            asked += 1
            if dist.get_rank() == 1 and asked <= 2 * 3:  # the first three exchanges are answered late
                now = time.time_ns()
                time.sleep(0.1)
                return now + 10**8 if asked % 2 else now
            return time.time_ns()

        return clock_offsets(exchanges=4, clock=clock)[1]

    offset = run_ranks(2, compare)[0]
    assert offset.seconds == pytest.approx(0, abs=0.02)
