"""From token ids to text as it comes: whole characters only, special tokens apart, stop strings cut out."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class TokenizerLike(Protocol):
    """What the engine needs of a tokenizer."""

    special_tokens: dict[str, int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, id: int) -> bytes: ...


@dataclass
class Piece:
    """What a request has produced since the last piece."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    """Characters that are complete now, without what may still turn out to be a stop string."""
    special: bool = False
    """`text` is the name of one special token."""
    logprobs: list[float] = field(default_factory=list)
    """Of `ids`."""
    top_logprobs: list[list[tuple[int, float]]] | None = None
    finish_reason: str | None = None
    """On the last piece: stop, length, cancelled or failed."""
    stop_reason: str | int | None = None
    """The stop string or token id that ended it."""
    end_logprob: float | None = None
    """Of the end token, where one was drawn; it is not among `ids`."""
    cached_tokens: int = 0
    """Prompt tokens whose latents were there already; on the last piece."""

    def extend(self, later: Piece) -> None:
        """Make one piece of this one and the one that follows it."""
        self.ids += later.ids
        self.text += later.text
        self.logprobs += later.logprobs
        if later.top_logprobs is not None:
            self.top_logprobs = self.top_logprobs or []
            self.top_logprobs += later.top_logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.end_logprob, self.cached_tokens = later.end_logprob, later.cached_tokens


class TextStream:
    """Text of one reply. A character whose bytes are incomplete waits for the rest, and so does the possible beginning
    of a stop string."""

    def __init__(self, tokenizer: TokenizerLike, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._special = {id: name for name, id in tokenizer.special_tokens.items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped: str | None = None
        """The stop string that was met; nothing follows it."""

    def push(self, id: int, search: bool = True) -> list[tuple[str, bool]]:
        """Text that is certain now, each with whether it is a special token's name. `search`: stop strings count."""
        name = self._special.get(id)
        if name is not None:
            before = self.flush()
            return before if self.stopped else [*before, (name, True)]
        try:
            piece = self._tokenizer.token_bytes(id)
        except IndexError:
            # A model's vocabulary may be padded beyond the tokenizer's; such an id is no character.
            piece = "\ufffd".encode()
        return self._advance(self._decoder.decode(piece), final=False, search=search)

    def flush(self) -> list[tuple[str, bool]]:
        """What was held back, because nothing can complete it any more."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return self._advance(text, final=True)

    def _advance(self, text: str, final: bool, search: bool = True) -> list[tuple[str, bool]]:
        if self.stopped is not None:
            return []
        whole, stops = self._held + text, self._stop if search else ()
        found = [(place, stop) for stop in stops if (place := whole.find(stop)) >= 0]
        if found:
            place, self.stopped = min(found)
            whole, self._held = whole[:place], ""
        else:
            keep = 0 if final else max((_overlap(whole, stop) for stop in stops), default=0)
            whole, self._held = whole[: len(whole) - keep], whole[len(whole) - keep :]
        return [(whole, False)] if whole else []


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
