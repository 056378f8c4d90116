import pytest

from titan_metrics.meter import Meter


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rates_are_those_of_the_window():
    clock = Clock()
    meter = Meter(flops_per_token=2e9, peak_flops=1e12, devices=4, clock=clock)
    for _ in range(5):
        clock.now += 2.0
        meter.add(tokens=1000, data_wait_seconds=0.5)
    assert meter.read() == pytest.approx(
        {
            "tokens_per_second": 500.0,
            "tokens_per_second_per_device": 125.0,
            "step_seconds": 2.0,
            "data_wait_share": 0.25,
            "tflops_per_device": 0.25,
            "mfu": 0.25,
        }
    )

    clock.now += 1.0
    meter.add(tokens=1000)
    second = meter.read()
    assert second["tokens_per_second"] == pytest.approx(1000.0)
    assert second["data_wait_share"] == 0.0


def test_mfu_is_palms_formula():
    # PaLM, appendix B: MFU = tokens/s x (6N + 12LHQT) / peak. Its table 3 gives 46.2% for PaLM 540B at 238.3K tokens/s
    # on 6144 TPU v4 (275 TFLOP/s each; 118 layers, 48 heads of 256, sequences of 2048).
    clock = Clock()
    flops = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    meter = Meter(flops_per_token=flops, peak_flops=275e12, devices=6144, clock=clock)
    clock.now += 1.0
    meter.add(tokens=238_300)
    assert meter.read()["mfu"] == pytest.approx(0.462, abs=0.002)


def test_what_is_unknown_is_left_out():
    clock = Clock()
    meter = Meter(flops_per_token=None, peak_flops=1e12, devices=1, clock=clock)
    clock.now += 1.0
    meter.add(tokens=10)
    assert not {"mfu", "tflops_per_device"} & meter.read().keys()

    meter = Meter(flops_per_token=1e9, peak_flops=None, devices=1, clock=clock)
    clock.now += 1.0
    meter.add(tokens=10)
    values = meter.read()
    assert values["tflops_per_device"] == pytest.approx(0.01)
    assert "mfu" not in values


def test_a_window_without_a_step_or_time_stays_open():
    clock = Clock()
    meter = Meter(None, None, devices=1, clock=clock)
    meter.add(tokens=4)
    assert meter.read() == {}  # nor before any time has passed
    clock.now += 3.0
    assert meter.read()["tokens_per_second"] == pytest.approx(4 / 3)
    clock.now += 3.0
    assert meter.read() == {}
    clock.now += 1.0
    meter.add(tokens=8)
    assert meter.read()["tokens_per_second"] == pytest.approx(2.0)


def test_restart_leaves_out_what_came_before():
    clock = Clock()
    meter = Meter(None, None, devices=1, clock=clock)
    clock.now += 60.0  # compilation
    meter.add(tokens=100)
    meter.restart()
    clock.now += 1.0
    meter.add(tokens=100)
    assert meter.read()["tokens_per_second"] == pytest.approx(100.0)


def test_time_that_is_left_out_counts_in_its_window_only():
    clock = Clock()
    meter = Meter(None, None, devices=1, clock=clock)
    for validation in (6.0, 0.0):
        clock.now += 4.0 + validation
        meter.add(tokens=100, data_wait_seconds=1.0)
        meter.leave_out(validation)
        values = meter.read()
        assert values["tokens_per_second"] == pytest.approx(25.0)
        assert values["step_seconds"] == pytest.approx(4.0)
        assert values["data_wait_share"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("facts", "wrong"), [((0.0, 1.0, 1), "flops_per_token"), ((1.0, -1.0, 1), "peak_flops"), ((1.0, 1.0, 0), "devices")]
)
def test_impossible_facts_are_refused(facts, wrong):
    with pytest.raises(ValueError, match=wrong):
        Meter(*facts)
