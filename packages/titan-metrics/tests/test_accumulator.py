import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from titan_metrics.accumulator import Accumulator, DeferredLog, Over, Reading
from titan_metrics.sinks import Sinks


def scalar(value):
    return torch.tensor(float(value))


def test_values_are_combined_over_steps_as_declared():
    over = {name: Over(steps=name) for name in ("last", "mean", "sum", "max")}
    accumulator = Accumulator(over)
    for value in (1.0, 6.0, 2.0):
        accumulator.add(**dict.fromkeys(over, scalar(value)))
    assert accumulator.read().numbers() == {"last": 2.0, "mean": 3.0, "sum": 9.0, "max": 6.0}
    assert accumulator.read() is None
    accumulator.add(sum=scalar(4))
    assert accumulator.read().numbers() == {"sum": 4.0}


def test_adding_reads_nothing_and_keeps_no_graph():
    accumulator = Accumulator({"loss": Over(steps="mean")})
    loss = torch.ones((), device="meta", requires_grad=True) * 2  # has no value to read
    accumulator.add(loss=loss)
    (kept,) = accumulator._values["loss"]
    assert kept.grad_fn is None


def test_an_undeclared_name_is_refused():
    with pytest.raises(ValueError, match=r"'lsos'.*\['loss'\]"):
        Accumulator({"loss": Over()}).add(lsos=scalar(1))


def test_ranks_are_added_up_in_one_exchange_of_a_kind():
    def measure():
        calls = []

        def reduce(tensor, kind):
            calls.append((kind, len(tensor)))
            dist.all_reduce(tensor, getattr(dist.ReduceOp, kind.upper()))
            return tensor

        over = {
            "loss": Over(ranks="sum"),
            "grad_norm": Over(),
            "loss_max": Over(ranks="max"),
            "tokens": Over(steps="sum", ranks="sum"),
        }
        accumulator, own = Accumulator(over, reduce), dist.get_rank() + 1
        for _ in range(2):
            accumulator.add(loss=scalar(own), grad_norm=scalar(7), loss_max=scalar(-10 * own), tokens=torch.tensor(own))
        return accumulator.read().numbers(), calls

    for numbers, calls in run_ranks(2, measure):
        assert numbers == {"loss": 3.0, "grad_norm": 7.0, "loss_max": -10.0, "tokens": 6.0}
        assert sorted(calls) == [("max", 1), ("sum", 2)]


def test_a_reading_is_not_changed_by_what_comes_after():
    value = scalar(1)
    reading = Reading(["loss"], value.reshape(1))
    value.add_(5)
    assert reading.ready()
    assert reading.numbers() == {"loss": 1.0}


class Recorder:
    def __init__(self):
        self.lines = []

    def log(self, step, values):
        self.lines.append((step, dict(values)))

    def close(self):
        pass


class OnItsWay:
    """A reading whose numbers are there when the test says so."""

    def __init__(self, **numbers):
        self.there, self.waited, self._numbers = False, False, numbers

    def ready(self):
        return self.there

    def numbers(self):
        self.waited = self.waited or not self.there
        return self._numbers


def test_lines_are_logged_in_order_when_their_numbers_are_there():
    recorder = Recorder()
    log = DeferredLog(Sinks({"recorder": recorder}))
    first, second = OnItsWay(loss=1.0), OnItsWay(loss=2.0)
    log.log(10, {"lr": 0.1}, first, None)
    assert recorder.lines == []
    log.log(20, {"lr": 0.2}, second)
    assert recorder.lines == [(10, {"lr": 0.1, "loss": 1.0})]
    assert first.waited
    second.there = True
    log.log(30, {})
    assert recorder.lines[1:] == [(20, {"lr": 0.2, "loss": 2.0}), (30, {})]
    assert not second.waited


def test_what_is_left_is_logged_at_the_end():
    recorder = Recorder()
    log = DeferredLog(Sinks({"recorder": recorder}))
    log.log(10, {}, OnItsWay(loss=1.0))
    log.flush()
    assert recorder.lines == [(10, {"loss": 1.0})]


@pytest.mark.gpu
def test_a_gpus_numbers_travel_without_a_wait():
    accumulator = Accumulator({"loss": Over(steps="sum")})
    for i in range(3):
        accumulator.add(loss=torch.full((), float(i), device="cuda"))
    torch.cuda._sleep(200_000_000)
    accumulator.add(loss=torch.ones((), device="cuda"))
    reading = accumulator.read()
    assert not reading.ready()
    assert reading.numbers() == {"loss": 4.0}
