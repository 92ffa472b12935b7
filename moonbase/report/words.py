"""Numbers and foreign text in words a reader can take in at a glance."""

from __future__ import annotations

import math
import re

# Direction marks can make a line read as something it is not, and control bytes are not allowed in HTML at all.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
                     "\ud800-\udfff\ufffe\uffff]")


def visible(text: str) -> str:
    """`text` with control bytes, direction marks and lone surrogates shown as symbols; the result encodes as UTF-8."""
    return _HIDDEN.sub(_symbol, text.replace("\r\n", "\n"))


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"
    return f"[U+{code:04X}]"


def cut(text: str, limit: int) -> tuple[str, int]:
    """The first `limit` characters and how many were left out."""
    return text[:limit], max(0, len(text) - limit)


def count(value: float) -> str:
    """A whole number with thousands separators: 12345 -> '12,345'."""
    return f"{value:,.0f}"


def plural(value: float, noun: str, several: str | None = None) -> str:
    """'1 step', '2 steps', '3 layers'."""
    return f"{count(value)} {noun if value == 1 else several or noun + 's'}"


def compact(value: float) -> str:
    """A number in few characters: 5100000 -> '5.1M', 0.00025 -> '0.00025', 3e-6 -> '3e-6'."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,950 rounds to 1,000k, which people write 1M.
        if size >= scale * (0.99995 if scale > 1e3 else 1):
            return f"{_digits(value / scale)}{unit}"
    return _digits(value)


def _digits(value: float) -> str:
    """Three significant digits; every digit of the whole part."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 1e-4:
        text = f"{float(f'{value:.3g}'):.10f}".rstrip("0").rstrip(".")
        return text
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def fixed(value: float, places: int = 2) -> str:
    """A measured value with a fixed number of places, so that a column of them lines up."""
    return f"{value:,.{places}f}"


def byte_size(value: float) -> str:
    """Decimal units, as disks and networks count: 61234567 -> '61.2 MB'."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{value:.0f} bytes"


def duration(seconds: float) -> str:
    """'0.4s', '45s', '4m12s', '2h05m', '3d04h'."""
    total = round(seconds)
    if total < 60:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def enumerate_briefly(items: list[str], limit: int = 8) -> str:
    """'1, 2, 3 and 40 more'."""
    if len(items) <= limit:
        return ", ".join(items)
    return f"{', '.join(items[:limit])} and {count(len(items) - limit)} more"
