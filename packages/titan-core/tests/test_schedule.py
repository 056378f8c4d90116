import itertools
import math

import pytest

from titan_core.config import ScheduleConfig
from titan_core.schedule import lr_factor


def factors(**kwargs):
    config = ScheduleConfig(**{"total_steps": 100, "warmup_steps": 10, "decay_ratio": 0.2, "min_factor": 0.1} | kwargs)
    return [lr_factor(config, step) for step in range(1, 121)]


def test_rises_stays_and_falls():
    f = factors()
    assert f[:10] == pytest.approx([s / 10 for s in range(1, 11)])
    assert set(f[10:80]) == {1.0}
    assert f[80:100] == pytest.approx([0.1 + 0.9 * left / 20 for left in range(19, -1, -1)])
    assert f[99:] == [0.1] * 21


@pytest.mark.parametrize(
    ("decay", "halfway"),
    [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)],
)
def test_shapes_of_the_decay(decay, halfway):
    f = factors(decay=decay, min_factor=0.0)
    assert f[79] == 1.0
    assert f[89] == pytest.approx(halfway)
    assert f[99] == 0.0
    assert all(a > b for a, b in itertools.pairwise(f[79:100]))
    assert factors(decay="cosine")[84] > factors(decay="linear")[84] > factors(decay="sqrt")[84]


def test_no_warmup_and_no_decay():
    assert set(factors(warmup_steps=0, decay_ratio=0.0)) == {1.0}


def test_warmup_into_decay_takes_the_smaller():
    f = factors(warmup_steps=90, decay_ratio=0.5, min_factor=0.0)
    assert max(f) == pytest.approx(min(64 / 90, 36 / 50), abs=0.02)


def test_the_horizon_must_be_known():
    with pytest.raises(ValueError, match="total_steps is not set"):
        lr_factor(ScheduleConfig(), 1)


def test_values_out_of_range_are_listed():
    bad = ScheduleConfig(warmup_steps=-1, decay_ratio=1.5, min_factor=-0.1, total_steps=0)
    assert [p.split()[0] for p in bad.problems()] == [
        "schedule.warmup_steps",
        "schedule.decay_ratio",
        "schedule.min_factor",
        "schedule.total_steps",
    ]
