import pytest

from titan_metrics.report import values


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (values.plain, 2.34567, "2.346"),
        (values.plain, 12345.6, "12,346"),
        (values.plain, 3e-5, "3.00e-05"),
        (values.plain, 0.0, "0"),
        (values.plain, None, "—"),
        (values.large, 1_310_000, "1.31 M"),
        (values.large, 12.0, "12"),
        (values.bytes_, 6.5 * 2**30, "6.5 GiB"),
        (values.bytes_, 12, "12 B"),
        (values.percent, 0.4167, "41.7 %"),
        (values.seconds, 2.5e-5, "25 µs"),
        (values.seconds, 0.0502, "50.2 ms"),
        (values.seconds, 90, "90 s"),
        (values.seconds, 1800, "30 min"),
        (values.seconds, 3 * 3600, "3.0 h"),
        (values.seconds, 72 * 3600, "3.0 days"),
    ],
)
def test_numbers_are_written_as_people_read_them(show, value, text):
    assert show(value) == text
