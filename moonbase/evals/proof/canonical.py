"""JSON that has one spelling: RFC 8785 out, a strict reader in.

Two programs that agree on a value agree on its bytes, and so on its digest. The reader refuses what would let one file
mean two things (a key given twice, NaN, bytes that are not UTF-8) and what would only serve to exhaust it (numbers of
thousands of digits, endless nesting).
"""

from __future__ import annotations

import hashlib
import json
import math
from json.encoder import encode_basestring
from typing import Any

from moonbase.errors import UserError

SAFE_INTEGER = 2**53 - 1
"""The largest whole number that every reader of JSON reads exactly (RFC 8785 §3.2.2.3, RFC 7493 §2.2)."""
MOST_VALUES = 4_000_000
"""In one document or line: an empty list takes one byte in a file and sixty in memory."""
LONGEST_NUMBER = 400
"""Characters; the longest that a double needs in plain digits are 309."""


class BundleError(UserError):
    """Something in a bundle is not what it should be: one line."""


def clean(text: object, limit: int = 160) -> str:
    """`text` from an untrusted file, fit for one line on a terminal."""
    words = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(text)[:limit + 1])
    return words[:limit] + "…" if len(words) > limit else words


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value. Raises BundleError for what JSON cannot hold exactly.

    As `canonical_reference`, four times as fast: strings are spelled by the standard library's C code.
    """
    try:
        return _spelled(value).encode("utf-8")
    except UnicodeEncodeError:
        raise BundleError("not canonical JSON: half of a character") from None
    except RecursionError:
        raise BundleError("not canonical JSON: nested too deeply") from None


def canonical_reference(value: Any) -> bytes:
    """The same by the rfc8785 package."""
    import rfc8785

    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise BundleError(f"not canonical JSON: {clean(error)}") from None
    except RecursionError:
        raise BundleError("not canonical JSON: nested too deeply") from None


def _spelled(value: Any) -> str:
    kind = type(value)
    if kind is str:
        return encode_basestring(value)
    if value is None:
        return "null"
    if kind is bool:
        return "true" if value else "false"
    if kind is int and abs(value) <= SAFE_INTEGER:
        return str(value)
    if kind is dict:
        # Sorted by UTF-16, which is the order of code points as long as there are none beyond 16 bits.
        names = sorted(value) if all(type(name) is str and name.isascii() for name in value) else \
            sorted(value, key=_utf16)
        return "{" + ",".join([f"{encode_basestring(name)}:{_spelled(value[name])}" for name in names]) + "}"
    if kind is list or kind is tuple:
        return "[" + ",".join([_spelled(item) for item in value]) + "]"
    return canonical_reference(value).decode()


def _utf16(name: Any) -> bytes:
    if not isinstance(name, str):
        raise BundleError("not canonical JSON: a key is no text")
    return name.encode("utf-16be")


def digest_bytes(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """`sha256:...` of the canonical spelling of a JSON value."""
    return digest_bytes(canonical(value))


def portable(value: Any) -> Any:
    """The same value with whole numbers that not every reader reads exactly as decimal strings (RFC 8785, D)."""
    if isinstance(value, dict):
        return {name: portable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > SAFE_INTEGER:
        return str(value)
    return value


def parse(data: bytes) -> Any:
    """A JSON value from untrusted bytes. Raises BundleError, in one line."""
    if len(data) > MOST_VALUES and data.count(b",") + data.count(b"[") + data.count(b"{") > MOST_VALUES:
        raise BundleError(f"more than {MOST_VALUES} values")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant,
                          parse_int=_integer, parse_float=_float)
    except UnicodeDecodeError as error:
        raise BundleError(f"not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise BundleError("not readable JSON: nested too deeply") from None
    except ValueError as error:
        raise BundleError(f"not readable JSON: {clean(error)}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {clean(twice, 40)!r} is given twice")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int | float:
    # Beyond the safe range the canonical spelling of a double looks like a whole number.
    if len(digits) > 16:
        return _float(digits)
    number = int(digits)
    return number if abs(number) <= SAFE_INTEGER else float(digits)


def _float(digits: str) -> float:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{clean(digits, 40)} is beyond the range of a double")
    return number
