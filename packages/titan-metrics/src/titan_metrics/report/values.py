"""Numbers as people read them: units, digits, and a dash where there is none."""

from datetime import UTC, datetime

DASH = "—"
_LARGE = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def plain(value: float | None) -> str:
    """`value` with 4 significant digits."""
    if value is None:
        return DASH
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def large(value: float | None) -> str:
    """`value` with a thousand's letter: 12.3k."""
    if value is None:
        return DASH
    return next((f"{value / size:.3g} {letter}" for size, letter in _LARGE if abs(value) >= size), f"{value:.3g}")


def bytes_(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return DASH
    return next((f"{value / size:.3g} {unit}" for size, unit in _BYTES if abs(value) >= size), f"{value:.0f} B")


def percent(value: float | None) -> str:
    """A share of 1 in percent."""
    return DASH if value is None else f"{100 * value:.1f} %"


def seconds(value: float | None) -> str:
    """A duration in the unit that suits it."""
    if value is None:
        return DASH
    if value < 1e-3:
        return f"{1e6 * value:.3g} µs" if value else "0 s"
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    minutes, hours = value / 60, value / 3600
    if hours < 2:
        return f"{minutes:.3g} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def moment(unix_seconds: float) -> str:
    """A time of the Unix clock, in UTC."""
    return f"{datetime.fromtimestamp(unix_seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


FORMATS = {"plain": plain, "large": large, "bytes": bytes_, "percent": percent, "seconds": seconds}
"""Names that charts use, here and in `assets/lines.js`, for how their values are written."""
