"""A dialogue as the model gets it, and how its reply is to be read: one way for everyone who asks a model to chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moonbase.chat.messages import next_call_index, normalise_messages
from moonbase.chat.parse import StreamParser
from moonbase.chat.render import IM_END, encode, render_parts
from moonbase.chat.styles import NO_THINKING, THINK, generation_prefix

if TYPE_CHECKING:
    from moonbase.chat.render import PlainTokenizer


@dataclass(frozen=True)
class Prompt:
    """A dialogue as token ids, and what is known of the reply to it."""

    ids: list[int]
    prefix: str
    """What the prompt has opened for the reply: nothing, `<think>`, or `<think></think>`."""
    messages: list[dict[str, Any]]
    """Normalised."""
    style: str
    tool_names: tuple[str, ...] = ()

    def parser(self) -> StreamParser:
        """What reads one reply."""
        return StreamParser(self.style, prefix=self.prefix, tool_names=self.tool_names)

    def rules(self) -> dict[str, Any]:
        """What a constraint of the reply has to know: `style` and `thinking_open`.

        Where the prompt has closed the reasoning already, the model may not open it once more: its reply is then one of
        the style without reasoning.
        """
        return {"style": "kimi-k2" if self.prefix == NO_THINKING else self.style,
                "thinking_open": self.prefix == THINK}

    @property
    def first_call_index(self) -> int:
        """The number of the reply's first tool call."""
        return next_call_index(self.messages)


def prompt_of(
    tokenizer: PlainTokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]], style: str, *,
    thinking: bool | None = None, preserve_thinking: bool = False, continues: bool = False,
) -> Prompt:
    """Normalise, render and encode a dialogue.

    `thinking`: None leaves it to the style. `continues`: the last message is the beginning of the reply, which goes on
    where that stops; its reasoning is behind it. Raises UserError naming `messages[i].field`.
    """
    normal = normalise_messages(messages)
    parts = render_parts(normal, list(tools) or None, style, add_generation_prompt=not continues, thinking=thinking,
                         preserve_thinking=preserve_thinking)
    prefix = generation_prefix(style, thinking)
    if continues:
        assert parts[-1].text == IM_END
        parts = parts[:-1]
        prefix = generation_prefix(style, False)
    names = tuple(tool["function"]["name"] for tool in tools)
    return Prompt(encode(tokenizer, parts), prefix, normal, style, names)


def default_sampling(style: str, thinking: bool | None) -> dict[str, float]:
    """What the publisher recommends for a style: fields of `moonbase.engine.Sampling`."""
    if style == "kimi-k2":
        return {"temperature": 0.6}
    if style == "kimi-k2-thinking":
        return {"temperature": 1.0}
    return {"temperature": 0.6 if thinking is False else 1.0, "top_p": 0.95}
