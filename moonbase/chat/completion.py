"""The shortest way to finish a JSON value that is half written.

A model may run out of its budget of tokens in the middle of a call. The engine asks here, from the bytes so far, for
the fewest bytes that make the value whole and valid, keeps so many tokens in reserve, and writes them when it must.

The text is read along the shape (`shape.py`). Where several readings are possible (`anyOf`, a number that may go on)
all are followed; a reading is known by its place in the text, so the work is linear in the text for ordinary schemas.
"""

from __future__ import annotations

import decimal
import json
import re
from collections.abc import Generator, Iterable
from decimal import Decimal

from moonbase.chat.pattern import Pattern
from moonbase.chat.shape import Array, Choice, Literals, Number, Object, Shape, String, json_bytes

_HIGH = rb"\\u[dD][89abAB][0-9a-fA-F]{2}"
_LOW = rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = _HIGH + _LOW + rb'|\\u(?:[0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2})|\\["\\/bfnrt]'
_BODY = re.compile(rb'"(?:[^"\\]|' + _ESCAPE + rb")*")
_ESCAPES = re.compile(_ESCAPE)
_CONTINUATION = re.compile(rb"[\x80-\xbf]")
_PLAIN_KEY = re.compile(rb'"[^"\\]*')
_NUMBER = re.compile(rb"-?[0-9]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]*)?")
_WHOLE_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")

Outcome = tuple[frozenset[int], "bytes | None"]
"""Where a value that starts in some place may end, and the shortest ending of one that runs to the end of the text."""
_NOTHING: Outcome = (frozenset(), None)
Reading = Generator[tuple[Shape, int], Outcome, Outcome]
"""Asks for what the values inside are, each a shape and where it starts, and returns what the whole is."""


def completion(shape: Shape, text: bytes) -> bytes | None:
    """The fewest bytes that make `text` a value of `shape`; None where no bytes do."""
    ends, suffix = _Reader(text).outcome(shape)
    return b"" if len(text) in ends else suffix


def finish_number(shape: Number, prefix: bytes) -> bytes | None:
    """The fewest characters that make `prefix` a number of this shape; None where none do."""
    found = []
    with decimal.localcontext() as context:
        context.prec = 1000
        for sign, low, high, low_open, high_open in shape.magnitudes():
            if prefix[: len(sign)] == sign[: len(prefix)] and (sign or not prefix.startswith(b"-")):
                rest = prefix[len(sign) :].decode("ascii")
                suffix = _finish_magnitude(shape, rest, low, high, low_open, high_open)
                if suffix is not None:
                    found.append(sign[len(prefix) :] + suffix.encode("ascii"))
    return min(found, key=len, default=None)


def _finish_magnitude(
    shape: Number, text: str, low: Decimal, high: Decimal | None, low_open: bool, high_open: bool
) -> str | None:
    def fits(value: Decimal) -> bool:
        return not (value < low or (low_open and value == low)) and (
            high is None or not (value > high or (high_open and value == high))
        )

    def fraction(whole: str, digits: str) -> str | None:
        """Further digits after the point: at each length the smallest value that is not too low."""
        start = Decimal(f"{whole}.{digits or '0'}")
        for more in range(0 if digits else 1, max_fraction - len(digits) + 1):
            grain = Decimal(1).scaleb(-len(digits) - more)
            value = max(start, (low / grain).to_integral_value(decimal.ROUND_CEILING) * grain)
            value += grain if low_open and value == low else 0
            if value < start + Decimal(1).scaleb(-len(digits)) and fits(value):
                return f"{value:.{len(digits) + more}f}".partition(".")[2][len(digits) :]
        return None

    max_whole, max_fraction = shape.digits()
    if shape.places is not None and not re.fullmatch(rf"[0-9]*(\.[0-9]{{0,{shape.places}}})?", text):
        return None
    if "e" in text or "E" in text:
        return "" if text[-1].isdigit() else "0"
    whole, point, digits = text.partition(".")
    if point:
        value_fits = digits and fits(Decimal(text))
        return "" if value_fits else fraction(whole, digits)
    found = None
    for more in range(0 if whole else 1, max_whole - len(whole) + 1):
        if (whole == "0" and more) or (found is not None and more >= len(found)):
            break
        size = 10**more
        first = int(whole or 0) * size if whole else (0 if more == 1 else size // 10)
        lowest = int(low.to_integral_value(decimal.ROUND_CEILING))
        value = max(first, lowest + (1 if low_open and lowest == low else 0))
        value = -(-value // shape.step) * shape.step
        last = int(whole or 0) * size + size - 1
        if value <= last and fits(Decimal(value)):
            return str(value)[len(whole) :]
        if found is None and not shape.integer:
            value = max(first, int(low))
            digits_after = fraction(str(value), "") if value <= last else None
            if digits_after is not None:
                found = f"{str(value)[len(whole) :]}.{digits_after}"
    return found


class _Reader:
    def __init__(self, text: bytes) -> None:
        self.text = text
        self.known: dict[tuple[int, int], Outcome] = {}

    def outcome(self, root: Shape) -> Outcome:
        """Reads the text from its beginning.

        Values hold values as deep as a schema lets them, deeper than Python lets functions call one another. So a
        reading is a generator that asks for the values inside it, and a list holds those that wait.
        """
        waiting = [self.begin(root, 0)]
        answer: Outcome | None = None
        while True:
            key, reading = waiting[-1]
            try:
                shape, start = next(reading) if answer is None else reading.send(answer)
            except StopIteration as stop:
                answer = self.known[key] = stop.value
                waiting.pop()
                if not waiting:
                    return self.known[key]
                continue
            answer = self.known.get((id(shape), start))
            if answer is None:
                waiting.append(self.begin(shape, start))

    def begin(self, shape: Shape, start: int) -> tuple[tuple[int, int], Reading]:
        # A choice that leads back to itself without writing anything adds nothing.
        self.known[id(shape), start] = _NOTHING
        return (id(shape), start), self.read(shape, start)

    def read(self, shape: Shape, start: int) -> Reading:
        if start >= len(self.text):
            return frozenset(), shape.shortest
        if isinstance(shape, Choice):
            outcomes = []
            for option in shape.options:
                outcomes.append((yield option, start))
            return _join(outcomes)
        if isinstance(shape, Literals):
            return _join(self.literal(text, start) for text in shape.texts)
        if isinstance(shape, String):
            return self.string(shape, start)
        if isinstance(shape, Number):
            return self.number(shape, start)
        if isinstance(shape, Array):
            return (yield from self.array(shape, start))
        assert isinstance(shape, Object)
        return (yield from self.object(shape, start))

    def literal(self, text: bytes, start: int) -> Outcome:
        if self.text.startswith(text, start):
            return frozenset({start + len(text)}), None
        written = self.text[start : start + len(text)]
        return (frozenset(), text[len(written) :]) if text.startswith(written) else _NOTHING

    def number(self, shape: Number, start: int) -> Outcome:
        match = _NUMBER.match(self.text, start)
        assert match is not None
        written, end = match.group(), match.end()
        if not written:
            return _NOTHING
        if end < len(self.text):
            fits = _WHOLE_NUMBER.fullmatch(written) and finish_number(shape, written) == b""
            return (frozenset({end}), None) if fits else _NOTHING
        suffix = finish_number(shape, written)
        # The number may stop here or go on.
        return (frozenset({end}) if suffix == b"" else frozenset()), suffix

    def string(self, shape: String, start: int) -> Outcome:
        match = _BODY.match(self.text, start)
        if match is None:
            return _NOTHING
        body, end = match.group(), match.end()
        if shape.pattern is not None:
            return self.matching_string(shape, shape.pattern, body, end)
        if self.text.startswith(b'"', end):
            fits = shape.low <= count_characters(body) - 1 <= _no_more(shape.high)
            return (frozenset({end + 1}), None) if fits else _NOTHING
        tail = self.text[end:]
        suffix = _finish_escape(tail) if tail else _finish_character(body)
        if suffix is None:
            return _NOTHING
        length = count_characters(body) - 1 + bool(tail)
        if length > _no_more(shape.high):
            return _NOTHING
        return frozenset(), suffix + b"a" * max(0, shape.low - length) + b'"'

    def matching_string(self, shape: String, pattern: Pattern, body: bytes, end: int) -> Outcome:
        """A string that a pattern rules; its only escapes are those of a quote and a backslash."""
        tail = self.text[end:]
        cut = body[1:].decode("utf-8", "ignore").encode()
        partial = body[1 + len(cut) :] if not tail else b""
        text = json.loads(b'"' + cut + b'"')
        states = pattern.read(text)
        if tail.startswith(b'"'):
            fits = pattern.ends(states) and shape.low <= len(text) <= _no_more(shape.high)
            return (frozenset({end + 1}), None) if fits else _NOTHING
        starts = [""]
        if tail:
            starts = ['"', "\\"] if tail == b"\\" else []
        elif partial:
            ends = [(partial + more)[: _width(partial)] for more in (_finish_character(body), b"\xbf\xbf\xbf")]
            first, last = (ord(text.decode("utf-8", "replace")[0]) for text in ends)
            if last == 0xFFFD:  # the bytes run into the surrogates, or past the last character
                last = 0x10FFFF if first > 0xFFFF else 0xD7FF
            character = pattern.between(states, first, last)
            starts = [] if character is None else [character]
        suffixes = []
        for start in starts:
            length = len(text) + len(start)
            reached = pattern.step(states, start) if start else states
            rest = pattern.rest(reached, max(0, shape.low - length), _no_more(shape.high) - length)
            if rest is not None:
                suffixes.append(json_bytes(start + rest)[1:][len(tail) + len(partial) :])
        return frozenset(), _shortest(suffixes)

    def array(self, shape: Array, start: int) -> Reading:
        if not self.text.startswith(b"[", start):
            return _NOTHING
        ends: set[int] = set()
        suffixes: list[bytes | None] = []
        work, seen = [(start + 1, 0, 0)], set()
        while work:
            state = work.pop()
            if state in seen:
                continue
            seen.add(state)
            place, count, first = state
            if place == len(self.text):
                suffixes.append(_rest_of_array(shape, count, first))
                continue
            if self.text.startswith(b"]", place) and count >= shape.low:
                ends.add(place + 1)
                continue
            if count:
                if not self.text.startswith(b",", place):
                    continue
                place += 1
            if count >= _no_more(shape.high):
                continue
            for item, after in _next_items(shape, count, first):
                stops, suffix = self.literal(item, place) if isinstance(item, bytes) else (yield item, place)
                rest = None if suffix is None else _rest_of_array(shape, count + 1, after)
                if rest is not None:
                    suffixes.append(suffix + rest)
                work.extend((stop, count + 1, after) for stop in stops)
        return frozenset(ends), _shortest(suffixes)

    def object(self, shape: Object, start: int) -> Reading:
        if not self.text.startswith(b"{", start):
            return _NOTHING
        ends: set[int] = set()
        suffixes: list[bytes | None] = []
        work, seen = [(start + 1, 0, True)], set()
        while work:
            state = work.pop()
            if state in seen:
                continue
            seen.add(state)
            place, number, first = state
            if place == len(self.text):
                suffixes.append(_rest_of_object(shape, number, first))
                continue
            if self.text.startswith(b"}", place) and not any(member.required for member in shape.members[number:]):
                ends.add(place + 1)
                continue
            if not first:
                if not self.text.startswith(b",", place):
                    continue
                place += 1
            for key_rest, value_shape, value_start, after in self.next_members(shape, number, place):
                if key_rest is not None:
                    suffixes.append(key_rest + value_shape.shortest + _rest_of_object(shape, after, False))
                    continue
                stops, suffix = yield value_shape, value_start
                if suffix is not None:
                    suffixes.append(suffix + _rest_of_object(shape, after, False))
                work.extend((stop, after, False) for stop in stops)
        return frozenset(ends), _shortest(suffixes)

    def next_members(self, shape: Object, number: int, place: int) -> Iterable[tuple[bytes | None, Shape, int, int]]:
        """Members that the text at `place` may be: what is missing of the key (None: it is whole), the shape of the
        value, where the value starts, and the number of the member after."""
        for index in range(number, len(shape.members)):
            member = shape.members[index]
            key = member.key + b":"
            written = self.text[place : place + len(key)]
            if written == key:
                yield None, member.shape, place + len(key), index + 1
            elif key.startswith(written):
                yield key[len(written) :], member.shape, place, index + 1
            if member.required:
                return
        if shape.others is None:
            return
        match = _PLAIN_KEY.match(self.text, place)
        if place == len(self.text):
            yield b'"' + _free_key(b'"', shape.taken) + b":", shape.others, place, len(shape.members)
        elif match is not None:
            key, end = match.group(), match.end()
            if end == len(self.text):
                tail = _finish_character(key)
                yield tail + _free_key(key + tail, shape.taken) + b":", shape.others, place, len(shape.members)
            elif self.text[end : end + 1] == b'"' and key + b'"' not in shape.taken:
                if end + 1 == len(self.text):
                    yield b":", shape.others, place, len(shape.members)
                elif self.text[end + 1 : end + 2] == b":":
                    yield None, shape.others, end + 2, len(shape.members)


def count_characters(body: bytes) -> int:
    """Code points in the inside of a JSON string, an escape (or a pair of them for one character) being one."""
    return len(_CONTINUATION.sub(b"", _ESCAPES.sub(b"x", body) if b"\\" in body else body))


def _no_more(high: int | None) -> int:
    return 1 << 60 if high is None else high


def _shortest(found: Iterable[bytes | None]) -> bytes | None:
    return min((text for text in found if text is not None), key=len, default=None)


def _join(outcomes: Iterable[Outcome]) -> Outcome:
    ends, suffixes = set(), []
    for stops, suffix in outcomes:
        ends |= stops
        suffixes.append(suffix)
    return frozenset(ends), _shortest(suffixes)


def _next_items(shape: Array, count: int, first: int) -> list[tuple[Shape | bytes, int]]:
    """What may stand as item number `count`, each with the number of the first literal item that may follow it."""
    if not shape.unique:
        return [(shape.item(count), 0)]
    assert isinstance(shape.items, Literals)
    return [(text, number + 1) for number, text in enumerate(shape.items.texts) if number >= first]


def _rest_of_array(shape: Array, count: int, first: int) -> bytes | None:
    """What closes an array with `count` items; of literal items only those from number `first` are left."""
    missing = max(0, shape.low - count)
    if shape.unique:
        assert isinstance(shape.items, Literals)
        left = shape.items.texts[first:]
        if missing > len(left):
            return None
        chosen = sorted(sorted(range(len(left)), key=lambda index: len(left[index]))[:missing])
        items = [left[index] for index in chosen]
    else:
        found = [shape.item(number).shortest for number in range(count, count + missing)]
        if None in found:
            return None
        items = [text or b"" for text in found]
    return (b"," if items and count else b"") + b",".join(items) + b"]"


def _rest_of_object(shape: Object, number: int, first: bool) -> bytes:
    """The required members from `number` on, and the brace."""
    texts = [member.key + b":" + (member.shape.shortest or b"") for member in shape.members[number:] if member.required]
    return (b"" if first or not texts else b",") + b",".join(texts) + b"}"


def _free_key(begun: bytes, taken: frozenset[bytes]) -> bytes:
    """The end of a key that is none of `taken`."""
    tail = b'"'
    while begun + tail in taken:
        tail = b"a" + tail
    return tail


def _finish_escape(tail: bytes) -> bytes | None:
    r"""The end of an escape; `tail` is what follows the last whole character, from its backslash on."""
    if tail == b"\\":
        return b"n"
    if not tail.startswith(b"\\u"):
        return None
    digits = tail[2:6]
    missing = b"0" * (4 - len(digits))
    if not re.fullmatch(rb"[dD][89abAB]..", digits + missing, re.DOTALL):
        return missing
    return missing + b"\\udc00"[len(tail[6:]) :]


def _width(partial: bytes) -> int:
    """Bytes of the UTF-8 character that begins with `partial`."""
    return 2 if partial[0] < 0xE0 else 3 if partial[0] < 0xF0 else 4


def _finish_character(body: bytes) -> bytes:
    """The missing bytes of a UTF-8 character that `body` ends within."""
    for back in range(1, min(4, len(body)) + 1):
        byte = body[-back]
        if byte < 0x80:
            return b""
        if byte >= 0xC0:
            missing = (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) - back
            second = {0xE0: b"\xa0", 0xF0: b"\x90"}.get(byte, b"\x80") if back == 1 else b"\x80"
            return (second + b"\x80" * (missing - 1)) if missing > 0 else b""
    return b""
