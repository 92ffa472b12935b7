"""How a figure is printed. One place, so that every report and every table cell prints the same string."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moonbase.evals.figures import Figure

NOTHING = "no value"


def decimals_for(share: float) -> int:
    """Digits after the point of a percentage: one, or as many as it takes not to print 0 or 100 for what is neither."""
    distance = min(share, 1.0 - share) * 100.0
    digits = 1
    while 0.0 < distance < 0.5 * 10.0**-digits and digits < 8:
        digits += 1
    return digits


def percent(share: float) -> str:
    return f"{100 * share:.{decimals_for(share)}f}%"


def signed(value: float, form: str) -> str:
    """With its sign, a true minus, and no sign on what prints as zero."""
    text = format(abs(value), form)
    if not any(digit in "123456789" for digit in text):
        return text
    return ("+" if value > 0 else "−") + text


def significant(value: float) -> str:
    """Three digits, and all digits before the point: 0.0123, 1.23, 12,345."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.10f}".rstrip("0") if "e" in text else text


def rate_text(value: float, low: float | None, high: float | None, n: int, clusters: int) -> str:
    """Neither no event nor nothing but events is a bare 0% or 100%."""
    among = f" in {clusters:,} clusters" if 0 < clusters < n else ""
    if value == 0.0:
        return f"0 of {n:,}{among} ({'upper bound ' + percent(high) if high is not None else 'no bound'})"
    if value == 1.0:
        return f"{n:,} of {n:,}{among} ({'lower bound ' + percent(low) if low is not None else 'no bound'})"
    if low is None or high is None:
        return f"{percent(value)} (no interval)"
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def figure_text(figure: Figure) -> str:
    value, low, high = figure.value, figure.low, figure.high
    if value is None:
        missing = figure.unscored + figure.abstained + figure.errors
        return f"{NOTHING} (0 of {missing:,} scored)" if missing and not figure.n else NOTHING
    bounded = low is not None and high is not None
    if figure.unit == "rate":
        return rate_text(value, low, high, figure.n, figure.clusters)
    if figure.unit == "points":
        ends = f"[{signed(100 * low, '.1f')}, {signed(100 * high, '.1f')}]" if bounded else "(no interval)"
        return f"{signed(100 * value, '.1f')} points {ends}"
    if figure.unit == "difference":
        ends = f"[{signed(low, '.4g')}, {signed(high, '.4g')}]" if bounded else "(no interval)"
        return f"{signed(value, '.4g')} {ends}"
    if figure.unit == "coefficient":
        return f"{value:.2f} [{low:.2f}, {high:.2f}]" if bounded else f"{value:.2f} (no interval)"
    prefix = "$" if figure.unit == "dollars" else ""
    ends = f"[{prefix}{significant(low)}, {prefix}{significant(high)}]" if bounded else "(no interval)"
    return f"{prefix}{significant(value)} {ends}"
