r"""`pattern` of JSON Schema: a regular expression as a machine that can also say how to finish.

The part of regular expressions on which all readers agree: letters, escapes, classes, groups, `|`, quantifiers, `^`
at the beginning and `$` at the end. Where readers differ the narrower meaning is taken: `\d`, `\w`, `\s` and their
opposites are ASCII. Characters that JSON must escape stand only where the pattern spells `"` or `\` itself.
Look-around, back-references, word boundaries and flags are refused.

A machine is a list of states, each with edges (set of characters, next state) and free steps (Thompson, 1968).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

MAX_STATES = 4000
_LAST = 0x10FFFF
_SYNTAX = frozenset(r"\^$.|?*+()[]{}/-")

Ranges = tuple[tuple[int, int], ...]
"""Code points, each pair first to last, in order."""

_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x20, 0x20),)
# What a JSON string may hold as it is.
_PLAIN: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, _LAST))
_SPELLED: Ranges = ((0x22, 0x22), (0x5C, 0x5C))


class PatternError(ValueError):
    """A pattern that cannot be enforced; the message says why."""


def _minus(ranges: Ranges, taken: Ranges) -> Ranges:
    for low, high in taken:
        ranges = tuple(
            part for first, last in ranges for part in ((first, min(last, low - 1)), (max(first, high + 1), last))
            if part[0] <= part[1]
        )
    return ranges


def _both(one: Ranges, two: Ranges) -> Ranges:
    pairs = ((max(a, c), min(b, d)) for a, b in one for c, d in two)
    return tuple(sorted(pair for pair in pairs if pair[0] <= pair[1]))


def _sample(ranges: Ranges) -> str:
    """A character of a set: a letter or a digit if there is one, for they are the shortest to write."""
    for wanted in ((0x61, 0x7A), (0x30, 0x39), (0x21, 0x7E)):
        found = _both(ranges, (wanted,))
        if found:
            return chr(found[0][0])
    return chr(ranges[0][0])


@dataclass
class Pattern:
    """A pattern as a machine, and as an expression over the inside of a JSON string."""

    source: str
    expression: str = ""
    edges: list[list[tuple[Ranges, int]]] = field(default_factory=list)
    free: list[list[int]] = field(default_factory=list)
    start: int = 0
    end: int = 0

    def closed(self, states: Iterable[int]) -> frozenset[int]:
        """States together with those a free step away."""
        found, work = set(states), list(states)
        while work:
            for state in self.free[work.pop()]:
                if state not in found:
                    found.add(state)
                    work.append(state)
        return frozenset(found)

    def step(self, states: Iterable[int], character: str) -> frozenset[int]:
        """Where one character leads."""
        point = ord(character)
        return self.closed({
            after for state in states for ranges, after in self.edges[state]
            if any(low <= point <= high for low, high in ranges)
        })

    def read(self, text: str) -> frozenset[int]:
        """The states after a text; none: no match begins so."""
        states = self.closed([self.start])
        for character in text:
            states = self.step(states, character)
        return states

    def between(self, states: Iterable[int], low: int, high: int) -> str | None:
        """A character from code point `low` to `high` that leads on from some states."""
        for state in states:
            for ranges, _ in self.edges[state]:
                found = _both(ranges, ((low, high),))
                if found:
                    return chr(found[0][0])
        return None

    def farthest(self) -> int:
        """The most characters that any state is away from the end, on its shortest way."""
        before: list[list[tuple[int, int]]] = [[] for _ in self.edges]
        for state, edges in enumerate(self.edges):
            for _, after in edges:
                before[after].append((state, 1))
            for after in self.free[state]:
                before[after].append((state, 0))
        distance, work = {self.end: 0}, deque([self.end])
        while work:
            state = work.popleft()
            for earlier, cost in before[state]:
                if distance[state] + cost < distance.get(earlier, 1 << 60):
                    distance[earlier] = distance[state] + cost
                    work.append(earlier)
        return max(distance.values())

    def rest(self, states: Iterable[int], low: int, high: int) -> str | None:
        """The shortest text of `low` to `high` characters from some states to the end."""
        layers: list[dict[int, tuple[int, str] | None]] = [dict.fromkeys(self.closed(states))]
        while len(layers) - 1 <= min(high, low + len(self.edges)):
            if self.end in layers[-1] and len(layers) - 1 >= low:
                break
            reached: dict[int, tuple[int, str] | None] = {}
            for state in layers[-1]:
                for ranges, after in self.edges[state]:
                    for place in self.closed([after]):
                        reached.setdefault(place, (state, _sample(ranges)))
            if not reached:
                return None
            layers.append(reached)
        else:
            return None
        characters, state = [], self.end
        for layer in reversed(layers[1:]):
            came = layer[state]
            assert came is not None
            state = came[0]
            characters.append(came[1])
        return "".join(reversed(characters))


def compile_pattern(source: str) -> Pattern:
    """The machine of a pattern that may stand anywhere in a text, unless anchored. Raises PatternError."""
    try:
        re.compile(source)
    except re.error as error:
        raise PatternError(f"not a regular expression: {error}") from None
    return _Parser(source).whole()


class _Parser:
    """Recursive descent; every piece is (first state, last state, expression)."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.place = 0
        self.depth = 0
        self.pattern = Pattern(source)

    def whole(self) -> Pattern:
        branches = [self.branch()]
        while self.peek() == "|":
            self.place += 1
            branches.append(self.branch())
        if self.place < len(self.source):
            raise PatternError(f"{self.source[self.place :]!r} is not supported")
        self.pattern.start, self.pattern.end, self.pattern.expression = self.either(branches)
        return self.pattern

    def branch(self) -> tuple[int, int, str]:
        """A branch of the outermost level, where anchors may stand."""
        parts = []
        if self.peek() == "^":
            self.place += 1
        else:
            parts.append(self.repeat(lambda: self.set_of(_PLAIN), 0, None))
        parts.append(self.sequence())
        if self.peek() == "$":
            self.place += 1
        else:
            parts.append(self.repeat(lambda: self.set_of(_PLAIN), 0, None))
        return self.chain(parts)

    def peek(self) -> str:
        return self.source[self.place : self.place + 1]

    def state(self) -> int:
        if len(self.pattern.edges) >= MAX_STATES:
            raise PatternError(f"more than {MAX_STATES} states")
        self.pattern.edges.append([])
        self.pattern.free.append([])
        return len(self.pattern.edges) - 1

    def set_of(self, ranges: Ranges, spelled: bool = False) -> tuple[int, int, str]:
        """One character of a set; `spelled`: the pattern names it, so that it may be one that JSON escapes."""
        ranges = _both(ranges, _PLAIN) or (_both(ranges, _SPELLED) if spelled else ())
        first, last = self.state(), self.state()
        if ranges:
            self.pattern.edges[first].append((ranges, last))
        if ranges and ranges[0][0] in (0x22, 0x5C):
            text = r"\\" + ('"' if ranges[0][0] == 0x22 else r"\\")
        else:
            spans = "".join(f"\\u{{{low:x}}}-\\u{{{high:x}}}" for low, high in ranges)
            text = f"[{spans}]" if spans else r"[^\s\S]"
        return first, last, text

    def chain(self, parts: list[tuple[int, int, str]]) -> tuple[int, int, str]:
        if not parts:
            state = self.state()
            return state, state, "()"
        for one, two in pairwise(parts):
            self.pattern.free[one[1]].append(two[0])
        return parts[0][0], parts[-1][1], "".join(part[2] for part in parts)

    def either(self, parts: list[tuple[int, int, str]]) -> tuple[int, int, str]:
        first, last = self.state(), self.state()
        for begin, end, _ in parts:
            self.pattern.free[first].append(begin)
            self.pattern.free[end].append(last)
        return first, last, "(" + "|".join(part[2] for part in parts) + ")"

    def repeat(self, make, low: int, high: int | None) -> tuple[int, int, str]:  # type: ignore[no-untyped-def]
        """`make` builds a fresh copy of the piece each time."""
        place, copies, text = self.place, [], ""
        for number in range(max(low, 1) if high is None else high):
            self.place = place
            begin, end, text = make()
            if number >= low:
                self.pattern.free[begin].append(end)
            copies.append((begin, end, ""))
        if high is None:
            begin, end, _ = copies[-1]
            self.pattern.free[end].append(begin)
        first, last, _ = self.chain(copies)
        # A loop must not be entered from behind.
        before, after = self.state(), self.state()
        self.pattern.free[before].append(first)
        self.pattern.free[last].append(after)
        bounds = "*" if (low, high) == (0, None) else f"{{{low},{'' if high is None else high}}}"
        return before, after, f"({text}){bounds}" if copies else "()"

    def sequence(self) -> tuple[int, int, str]:
        parts = []
        while self.peek() not in ("", "|", ")") and not (self.peek() == "$" and not self.depth):
            start = self.place
            atom = self.atom()
            end = self.place
            match = re.compile(r"([*+?]|\{(\d+)(,?)(\d*)\})([?+]?)").match(self.source, end)
            if match is None:
                parts.append(atom)
                continue
            if match[5] == "+":
                raise PatternError("possessive quantifiers are not supported")
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(
                match[1], (int(match[2] or 0), int(match[4]) if match[4] else None if match[3] else int(match[2] or 0))
            )
            self.place = start
            parts.append(self.repeat(self.atom, low, high))
            self.place = match.end()
        return self.chain(parts)

    def atom(self) -> tuple[int, int, str]:
        character = self.peek()
        self.place += 1
        if character == "(":
            match = re.compile(r"\?:|\?P?<[A-Za-z_]\w*>").match(self.source, self.place)
            self.place = match.end() if match else self.place
            if self.peek() == "?":
                raise PatternError("look-around and flags are not supported")
            self.depth += 1
            parts = [self.sequence()]
            while self.peek() == "|":
                self.place += 1
                parts.append(self.sequence())
            self.depth -= 1
            self.place += 1
            return self.either(parts)
        if character == "[":
            return self.set_of(self.set_inside(), spelled=True)
        if character == ".":
            return self.set_of(_minus(_PLAIN, ((0x2028, 0x2029),)))
        if character in "^$":
            raise PatternError(f"{character} is supported at the {'beginning' if character == '^' else 'end'} only")
        if character == "\\":
            return self.set_of(self.escape()[0], spelled=True)
        return self.set_of(((ord(character), ord(character)),), spelled=True)

    def escape(self) -> tuple[Ranges, bool]:
        """The set behind a backslash, and whether it is a class of several."""
        character = self.peek()
        self.place += 1
        classes = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
        if character.lower() in classes:
            ranges = classes[character.lower()]
            # Opposites are ASCII too: what else belongs to them depends on the reader.
            return (ranges if character.islower() else _minus(((0x20, 0x7E),), ranges)), True
        match = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})").match(self.source, self.place - 1)
        if match:
            self.place = match.end()
            point = int(match[1] or match[2], 16)
        elif character in _SYNTAX or not character.isalnum():
            point = ord(character)
        else:
            raise PatternError(f"\\{character} is not supported")
        return ((point, point),), False

    def set_inside(self) -> Ranges:
        negated = self.peek() == "^"
        self.place += negated
        found: Ranges = ()
        several = False
        first = True
        while first or self.peek() != "]":
            first = False
            ranges, many = self.member()
            if not many and self.peek() == "-" and self.source[self.place + 1 : self.place + 2] != "]":
                self.place += 1
                last, many = self.member()
                if many:
                    raise PatternError("a range of characters cannot end with a class")
                ranges = ((ranges[0][0], last[0][0]),)
            found += ranges
            several = several or many
        self.place += 1
        if not negated:
            return tuple(sorted(found))
        return _minus(((0x20, 0x7E),) if several else _PLAIN, found)

    def member(self) -> tuple[Ranges, bool]:
        character = self.peek()
        self.place += 1
        if character == "\\":
            return self.escape()
        return ((ord(character), ord(character)),), False
