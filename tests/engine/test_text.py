"""Text from tokens: every way of cutting it gives the same words, and a stop string never shows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonbase.engine.text import TextStream
from tests.engine.tiny import Bytes


def streamed(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[tuple[str, bool]], str | None]:
    stream, said = TextStream(Bytes(), stop), []
    for id in ids:
        said += stream.push(id)
        if stream.stopped is not None:
            break
    return said + stream.flush(), stream.stopped


TEXTS = ["plain", "naïve – 月面基地 🌕!", "🌕", "\ufffd is a character too", "tail \ufffd", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_come_whole_and_as_soon_as_they_are_known(text: str) -> None:
    said, _ = streamed(list(text.encode()))
    assert [piece for piece, _ in said] == list(text)
    assert not any(special for _, special in said)


def test_a_character_cut_short_is_still_said() -> None:
    assert "".join(piece for piece, _ in streamed(list("a🌕".encode()[:3]))[0]) == "a\ufffd"
    # A special token ends it too.
    assert streamed([0xF0, 258, 97])[0] == [("\ufffd", False), ("<mark>", True), ("a", False)]


def test_an_id_beyond_the_vocabulary_is_no_character() -> None:
    """Models are padded to round sizes, and a sampled id may lie beyond what the tokenizer knows."""
    class Small(Bytes):
        def token_bytes(self, id: int) -> bytes:
            return [bytes([n]) for n in range(128)][id]

    stream = TextStream(Small())
    assert [stream.push(id) for id in (97, 200, 98)] == [[("a", False)], [("\ufffd", False)], [("b", False)]]


def test_special_tokens_stand_alone_and_letters_that_spell_one_do_not() -> None:
    said, _ = streamed([97, 258, *b"<mark>"])
    assert said[:2] == [("a", False), ("<mark>", True)]
    assert "".join(piece for piece, special in said[2:] if not special) == "<mark>"


@given(
    text=st.text(alphabet="abcé🌕", max_size=12),
    stop=st.lists(st.text(alphabet="abcé🌕", min_size=1, max_size=4), max_size=3),
)
def test_the_first_stop_string_to_be_complete_ends_the_text(text: str, stop: list[str]) -> None:
    """Against trying every prefix of the text."""
    expected, which = text, None
    for end in range(1, len(text) + 1):
        met = [(text[:end].index(one), one) for one in stop if one in text[:end]]
        if met:
            place, which = min(met)
            expected = text[:place]
            break
    said, stopped = streamed(list(text.encode()), tuple(stop))
    assert ("".join(piece for piece, _ in said), stopped) == (expected, which)


def test_a_stop_string_may_lie_across_tokens_but_not_across_a_special_one() -> None:
    said, stopped = streamed(list(b"say stop now"), ("stop",))
    # The first s waits until it is clear that it begins no stop string.
    assert (said, stopped) == ([("sa", False), ("y", False), (" ", False)], "stop")
    said, stopped = streamed([*b"st", 258, *b"op"], ("stop",))
    assert stopped is None and "".join(piece for piece, _ in said) == "st<mark>op"
