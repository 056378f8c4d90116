import time
from unittest.mock import ANY

import torch
import torch.distributed as dist

from ranks import run_ranks
from titan_metrics.spans import Spans
from titan_metrics.stragglers import find_stragglers, summary
from titan_metrics.trace import phases, read_spans
from titan_metrics.waits import measure_clock_offset, timed_waits


def test_the_summary_names_the_rank_that_is_slow_and_where(tmp_path):
    def train():
        rank = dist.get_rank()
        gradient = torch.zeros(8)
        with Spans(tmp_path / f"spans/rank-{rank}.jsonl", rank=rank, world_size=4) as spans, timed_waits(spans):
            for step in range(1, 16):
                spans.step = step
                with spans.span("data_wait"):
                    time.sleep(0.002)
                # The others wait for it inside the same phase, so that it is equally long on all ranks.
                with spans.span("forward_backward"):
                    time.sleep(0.005 + 0.05 * (rank == 2))
                    dist.all_reduce(gradient)
                with spans.span("optimizer"):
                    dist.all_reduce(gradient, async_op=True).wait()

    run_ranks(4, train)
    found = find_stragglers(phases(read_spans(tmp_path)))
    assert (found[0].rank, found[0].phase) == (2, "forward_backward")
    assert found[0].seconds > 0.03
    assert summary(found).startswith("rank 2 is slow in forward_backward: ")
    # Without what was waited it is not to be seen.
    seconds = {span.process.rank: span.seconds for span in read_spans(tmp_path, range(8, 9)) if span.depth == 0}
    assert seconds == dict.fromkeys(range(4), ANY)


def test_waits_end_with_the_context():
    before = dist.Work.wait
    with timed_waits(Spans()):
        assert dist.Work.wait is not before
    assert dist.Work.wait is before


def test_clocks_are_compared_with_the_first_ranks(monkeypatch):
    def offset():
        real = time.time
        if dist.get_rank() == 1:
            time.time = lambda: real() + 100.0
        return measure_clock_offset()

    first, second = run_ranks(2, offset)
    assert first == 0.0
    assert abs(second - 100.0) < 1.0
