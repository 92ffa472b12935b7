"""Patterns as machines, against Python's own regular expressions."""

from __future__ import annotations

import json
import random
import re
from itertools import product

import pytest

from moonbase.chat.completion import completion
from moonbase.chat.pattern import PatternError, compile_pattern
from moonbase.chat.shape import build_shape

PATTERNS = [
    r"^[A-Z]{3}-\d{4}$", r"^(a|b)*c$", r"\d+", r"^[^@\s]+@[^@\s]+\.[a-z]{2,}$", r"^\+?[0-9]{2,5}$|^none$", r"x{2,3}?y",
    r'^"a\\b"$', r"^(?:a?b?)*z$", r"^.{0,5}$", r"a|^b|c$", r"^\S+$", r"^[\w.-]+$", r"^#([0-9a-f]{3}|[0-9a-f]{6})$",
    "^$", "", r"^(foo|bar(baz)?){2}$", r"^[\u4e00-\u9fff]{2}$", r"^[\]a]$", r"^[a\]]\/$", r"^[^a]*$", r"[\d-]x",
    r"^(?P<year>\d{4})-\d\d$", "^é🌙?$", r"^a.c$", r"^\x41\u0042$",
]  # fmt: skip


@pytest.mark.parametrize("source", PATTERNS)
def test_a_machine_reads_what_the_expression_matches(source: str) -> None:
    generator = random.Random(0)
    pattern = compile_pattern(source)
    expression = re.sub(r"\\u\{([0-9a-f]+)\}", lambda match: f"\\U{int(match[1], 16):08x}", pattern.expression)
    for _ in range(400):
        text = "".join(generator.choice('abcxyz019-@."\\AZB é一🌙/]') for _ in range(generator.randint(0, 6)))
        matches = pattern.ends(pattern.read(text))
        assert matches == bool(re.fullmatch(expression, json.dumps(text, ensure_ascii=False)[1:-1]))
        if matches:
            assert re.search(source, text)
        elif text.isascii() and not set(text) & set('"\\') and "\\S" not in source:
            assert not re.search(source, text)


@pytest.mark.parametrize("source", PATTERNS)
def test_the_shortest_rest_matches(source: str) -> None:
    pattern = compile_pattern(source)
    shortest = pattern.rest(pattern.initial, 0, 100)
    assert shortest is not None and re.search(source, shortest) and len(shortest) <= pattern.farthest()
    for low in (1, 4, 9):
        text = pattern.rest(pattern.initial, low, 12)
        assert text is None or (re.search(source, text) and low <= len(text) <= 12)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"^[A-Z]{3}-\d{4}$", "ABC-0123"),
        (r'^"a\\b" é[🌙-🌟]{2}$', '"a\\b" é🌙🌛'),
        (r"^[^@]+@[a-z]+\.de$", "北京@xy.de"),
    ],
)
def test_a_matching_string_cut_anywhere_is_finished(source: str, text: str) -> None:
    shape = build_shape({"type": "string", "pattern": source, "maxLength": 40})
    written = json.dumps(text, ensure_ascii=False).encode()
    for end in range(len(written) + 1):
        ending = completion(shape, written[:end])
        assert ending is not None and re.search(source, json.loads(written[:end] + ending))
    assert completion(shape, b'"\\n') is None


@pytest.mark.parametrize(
    "source", [r"(?=a)b", r"(?<!a)b", r"\bx", r"(a)\1", r"(?i)a", "a^b", "a$b", "[", "a{5000}", r"\Aa", "a++",
               "a{99999999999}", "a{,5}", "{", "a}", "[]a]", "[^]a]", "]", "(" * 3000]
)
def test_what_cannot_be_followed_is_refused(source: str) -> None:
    with pytest.raises(PatternError):
        compile_pattern(source)


def test_the_shortest_rest_is_the_shortest_of_all() -> None:
    """Brute force over every text of up to six letters."""
    for source in ("^(ab|a)*b$", "^(a{2}|b{3})+$", "^a(bc)*$", "^((a?){3}b)*$"):
        pattern = compile_pattern(source)
        texts = ["".join(text) for count in range(7) for text in product("abc", repeat=count)]
        matching = {len(text) for text in texts if re.search(source, text)}
        for low in range(7):
            wanted = min((length for length in matching if length >= low), default=None)
            found = pattern.rest(pattern.initial, low, 6)
            assert (None if found is None else len(found)) == wanted, (source, low)
