r"""`pattern` of JSON Schema: a regular expression as a machine that can also say how to finish.

The part of regular expressions on which all readers agree: letters, escapes, classes, groups, `|`, quantifiers, `^`
at the beginning and `$` at the end. Where readers differ the narrower meaning is taken: `\d`, `\w`, `\s` and their
opposites are ASCII. Characters that JSON must escape stand only where the pattern spells `"` or `\` itself.
Look-around, back-references, word boundaries and flags are refused, and so is what one reader takes for letters and
another for syntax: a brace or a closing bracket by itself, `{,5}`, and the classes `[]...]` and `[^]...]`.

A machine is a list of states, each with edges (set of characters, next state) and free steps (Thompson, 1968).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

MAX_STATES = 1000
MAX_LETTERS = 2000
MAX_WORK = 100_000
"""States times the characters that a text must have at least: the size of the table that `rest` reads."""
_REMEMBERED_STEPS = 2000
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
    _closed: list[int] = field(default_factory=list, repr=False)
    _reach: dict[int, int] = field(default_factory=dict, repr=False)
    _steps: dict[tuple[int, str], int] = field(default_factory=dict, repr=False)

    def close(self) -> None:
        """Work out, once the machine is built, which states are free steps away from each."""
        self._closed = [1 << state for state in range(len(self.free))]
        changed, forward = True, False
        while changed:
            changed, forward = False, not forward
            for state in range(len(self.free)) if forward else reversed(range(len(self.free))):
                mask = self._closed[state]
                for after in self.free[state]:
                    mask |= self._closed[after]
                changed |= mask != self._closed[state]
                self._closed[state] = mask
        self._reach = {0: 1 << self.end}

    @property
    def initial(self) -> int:
        """The states before the first character. Sets of states are the bits of a number."""
        return self._closed[self.start]

    def ends(self, states: int) -> bool:
        """Whether a text that led to these states matches."""
        return bool(states >> self.end & 1)

    def step(self, states: int, character: str) -> int:
        """Where one character leads."""
        key = (states, character)
        found = self._steps.get(key)
        if found is None:
            point, found = ord(character), 0
            for state in _bits(states):
                for ranges, after in self.edges[state]:
                    if any(low <= point <= high for low, high in ranges):
                        found |= self._closed[after]
            if len(self._steps) >= _REMEMBERED_STEPS:
                self._steps.clear()
            self._steps[key] = found
        return found

    def read(self, text: str) -> int:
        """The states after a text; 0: no match begins so."""
        states = self.initial
        for character in text:
            states = self.step(states, character)
        return states

    def between(self, states: int, low: int, high: int) -> str | None:
        """A character from code point `low` to `high` that leads on from some states."""
        for state in _bits(states):
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

    def reaching(self, count: int) -> int:
        """The states that exactly `count` further characters can bring to the end."""
        for number in range(len(self._reach), count + 1):
            behind, found = self._reach[number - 1], 0
            for state, edges in enumerate(self.edges):
                if any(self._closed[after] & behind for _, after in edges):
                    found |= 1 << state
            # Keyed by number, so that two threads at once write the same.
            self._reach[number] = found
        return self._reach[count]

    def rest(self, states: int, low: int, high: int) -> str | None:
        """The shortest text of `low` to `high` characters from some states to the end."""
        for count in range(low, min(high, low + len(self.edges)) + 1):
            reaching = self.reaching(count)
            if not reaching:
                return None
            if states & reaching:
                break
        else:
            return None
        characters = []
        for left in reversed(range(count)):
            behind = self._reach[left]
            ranges, after = next(
                edge for state in _bits(states & self._reach[left + 1]) for edge in self.edges[state]
                if self._closed[edge[1]] & behind
            )
            characters.append(_sample(ranges))
            states = self._closed[after]
        return "".join(characters)


def _bits(states: int) -> Iterator[int]:
    while states:
        lowest = states & -states
        yield lowest.bit_length() - 1
        states ^= lowest


@lru_cache(maxsize=128)
def compile_pattern(source: str) -> Pattern:
    """The machine of a pattern that may stand anywhere in a text, unless anchored. Raises PatternError."""
    if len(source) > MAX_LETTERS:
        raise PatternError(f"more than {MAX_LETTERS} letters")
    try:
        re.compile(source)
        pattern = _Parser(source).whole()
    except PatternError:
        raise
    except (re.error, OverflowError, ValueError) as error:
        raise PatternError(f"not a regular expression: {error}") from None
    except RecursionError:
        raise PatternError("its groups nest too deep") from None
    pattern.close()
    return pattern


def check_pattern(source: str, low: int = 0) -> None:
    """Raise PatternError for a pattern that cannot be followed, or not through a text of `low` characters."""
    states = len(compile_pattern(source).edges)
    if states * low > MAX_WORK:
        raise PatternError(f"{states} states times minLength {low} is more than {MAX_WORK:,}")


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
        if character in "{}]":
            raise PatternError(f"{character} by itself is read in different ways: write \\{character}")
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
        if self.peek() == "]":
            raise PatternError(r"a class that begins with ] is read in different ways: write \]")
        while self.peek() != "]":
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
