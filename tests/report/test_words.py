from __future__ import annotations

import pytest

from moonbase.report import words


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (1, "1"), (999, "999"), (1000, "1k"), (5_102_784, "5.1M"), (999_960, "1M"), (1.026e12, "1.03T"),
    (0.00025, "0.00025"), (3e-6, "3e-6"), (-1234, "-1.23k"), (17_512, "17.5k"), (100.4, "100"), (0.1 + 0.2, "0.3")])
def test_compact(value, text):
    assert words.compact(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (0.42, "0.4s"), (45, "45s"), (59.7, "1m00s"), (252, "4m12s"), (7500, "2h05m"), (273_600, "3d04h")])
def test_duration(value, text):
    assert words.duration(value) == text


def test_byte_size():
    sizes = [words.byte_size(value) for value in (12, 1500, 61_234_567, 2e9)]
    assert sizes == ["12 bytes", "1.5 kB", "61.2 MB", "2 GB"]


def test_visible_text_always_encodes_and_hides_nothing():
    everything = "".join(map(chr, range(0x3000))) + "\ud800\udfff\ufffe\U0001f600"
    shown = words.visible(everything)
    shown.encode("utf-8")
    assert not set(shown) & (set(map(chr, range(32))) - {"\t", "\n"})
    assert "[U+202E]" in shown and "␀" in shown and "\U0001f600" in shown and "é" in shown
    assert words.visible("a\r\nb\tc") == "a\nb\tc"


def test_lists_and_plurals():
    assert words.enumerate_briefly(list("abc")) == "a, b, c"
    assert words.enumerate_briefly([str(i) for i in range(20)], 2) == "0, 1 and 18 more"
    assert (words.plural(1, "step"), words.plural(2000, "step")) == ("1 step", "2,000 steps")
    assert words.cut("abcdef", 4) == ("abcd", 2)
