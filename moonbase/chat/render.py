"""From messages to the model's prompt: the exact token grammar of the Kimi family.

    prompt      := [tool_decl] system turn* gen
    tool_decl   := <|im_system|>tool_declare<|im_middle|> TOOLS <|im_end|>
    system      := <|im_system|>system<|im_middle|> text <|im_end|>
    user        := <|im_user|> name <|im_middle|> content <|im_end|>
    assistant   := <|im_assistant|> name <|im_middle|> [think] content [calls] <|im_end|>
    think       := <think> reasoning </think>
    calls       := <|tool_calls_section_begin|> call+ <|tool_calls_section_end|>
    call        := <|tool_call_begin|> id <|tool_call_argument_begin|> json <|tool_call_end|>
    tool result := <|im_system|> name <|im_middle|>## Return of id \\n content <|im_end|>
    gen         := <|im_assistant|>assistant<|im_middle|> [<think> | <think></think>]

A prompt is a list of parts, each either one special token or plain text. Only this file makes special parts; whatever
came from outside (content, names, tool results, and the model's own reasoning and arguments) is plain text, and text
that spells a marker is encoded letter by letter. `render` joins the parts into the string that a client would see;
`encode` is the way to ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from moonbase.chat.messages import normalise_messages
from moonbase.chat.styles import DEFAULT_SYSTEM, END_THINK, NO_THINKING, THINK, Style, find_style, generation_prefix
from moonbase.chat.typescript import compact_json, declare
from moonbase.errors import UserError

IM_SYSTEM, IM_USER, IM_ASSISTANT = "<|im_system|>", "<|im_user|>", "<|im_assistant|>"
IM_MIDDLE, IM_END = "<|im_middle|>", "<|im_end|>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, ARGUMENT_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"

TOOL_DECLARE = "tool_declare"
_SYSTEM_HEADERS = frozenset(["system", TOOL_DECLARE])


class Part(NamedTuple):
    """A piece of a prompt. `special`: `text` is exactly one special token's name; `generated`: an assistant wrote it,
    so that fine-tuning learns it."""

    text: str
    special: bool
    generated: bool


class PlainTokenizer(Protocol):
    """What encoding needs of a tokenizer: plain text to ids, and the special tokens by name."""

    special_tokens: dict[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, never a special token."""


def render_parts(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    style: str = "kimi-k2",
    *,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
    preserve_thinking: bool = False,
) -> list[Part]:
    """The prompt of a dialogue, in parts. Neighbouring plain parts are merged, so that joined ids are a client's.

    A dialogue that does not begin with a system message gets the default one. Thinking styles show the reasoning of the
    current tool loop only: turns up to and including the last assistant message without tool calls have an empty
    block, and so has every turn with `thinking=False`; `preserve_thinking` keeps all. `generated` marks what an
    assistant wrote after its generation prompt, the end-of-turn token included, but not an empty block in the place
    of reasoning that was left out.
    Raises UserError naming `messages[i].field`, `tools[i]` or the style.
    """
    found, opened = find_style(style), generation_prefix(style, thinking)
    turns = normalise_messages(messages)
    page = _Page()
    if tools:
        page.turn(IM_SYSTEM, TOOL_DECLARE)
        page.text(_declare_tools(tools, found))
        page.special(IM_END)
    if not turns or turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": DEFAULT_SYSTEM})
    finals = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and "tool_calls" not in turn]
    first_shown = 0 if preserve_thinking else len(turns) if thinking is False else (finals or [-1])[-1] + 1
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            page.turn(IM_ASSISTANT, turn.get("name") or "assistant")
            if found.thinks:
                _think(page, turn.get("reasoning_content", ""), shown=i >= first_shown, opened=opened)
            _speak(page, turn)
        else:
            _listen(page, turn)
    if add_generation_prompt:
        page.turn(IM_ASSISTANT, "assistant")
        for marker in (THINK, END_THINK):
            if marker in opened:
                page.special(marker)
    return page.parts


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    style: str = "kimi-k2",
    *,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
    preserve_thinking: bool = False,
) -> str:
    """The prompt as one string, for eyes and for clients that send text. Arguments and errors as of `render_parts`.

    Not for encoding: in a string, a marker that a user typed looks like a real one. `encode` keeps them apart.
    """
    parts = render_parts(messages, tools, style, add_generation_prompt=add_generation_prompt, thinking=thinking,
                         preserve_thinking=preserve_thinking)
    return "".join(part.text for part in parts)


def encode(tokenizer: PlainTokenizer, parts: Sequence[Part]) -> list[int]:
    """Ids of a prompt. Text that spells a marker stays text. Raises UserError where the vocabulary lacks a marker."""
    return encode_with_mask(tokenizer, parts)[0]


def encode_with_mask(tokenizer: PlainTokenizer, parts: Sequence[Part]) -> tuple[list[int], list[bool]]:
    """Ids of a prompt, and for each id whether an assistant generated it. Raises UserError like `encode`."""
    ids: list[int] = []
    mask: list[bool] = []
    for part in parts:
        if not part.special:
            ids += tokenizer.encode(part.text)
        elif part.text in tokenizer.special_tokens:
            ids.append(tokenizer.special_tokens[part.text])
        else:
            raise UserError(f"this vocabulary has no token {part.text}: the model was not made for this chat style")
        mask += [part.generated] * (len(ids) - len(mask))
    return ids, mask


class _Page:
    """Parts as they are written; merges plain neighbours."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def special(self, name: str, generated: bool = False) -> None:
        self.parts.append(Part(name, True, generated))

    def text(self, text: str, generated: bool = False) -> None:
        if not text:
            return
        if self.parts and not self.parts[-1].special and self.parts[-1].generated == generated:
            text = self.parts.pop().text + text
        self.parts.append(Part(text, False, generated))

    def turn(self, role: str, name: str) -> None:
        self.special(role)
        self.text(name)
        self.special(IM_MIDDLE)


def _listen(page: _Page, turn: Mapping[str, Any]) -> None:
    """A turn that is not the assistant's."""
    if turn["role"] == "user":
        page.turn(IM_USER, turn.get("name") or "user")
    elif turn["role"] == "system":
        page.turn(IM_SYSTEM, "system")
    else:
        # A tool called `system` does not speak as the system.
        name = turn.get("name") or "tool"
        page.turn(IM_SYSTEM, "tool" if name in _SYSTEM_HEADERS else name)
        page.text(f"## Return of {turn['tool_call_id']}\n")
    page.text(turn["content"])
    page.special(IM_END)


def _think(page: _Page, reasoning: str, *, shown: bool, opened: str) -> None:
    left_out = bool(reasoning) and not shown
    page.special(THINK, generated=not opened and not left_out)
    if shown:
        page.text(reasoning, generated=True)
    page.special(END_THINK, generated=(opened != NO_THINKING or bool(reasoning)) and not left_out)


def _speak(page: _Page, turn: Mapping[str, Any]) -> None:
    page.text(turn["content"], generated=True)
    if "tool_calls" in turn:
        page.special(SECTION_BEGIN, generated=True)
        for call in turn["tool_calls"]:
            page.special(CALL_BEGIN, generated=True)
            page.text(call["id"], generated=True)
            page.special(ARGUMENT_BEGIN, generated=True)
            page.text(call["function"]["arguments"], generated=True)
            page.special(CALL_END, generated=True)
        page.special(SECTION_END, generated=True)
    page.special(IM_END, generated=True)


def _declare_tools(tools: Any, style: Style) -> str:
    if not isinstance(tools, list | tuple):
        raise UserError(f"tools: expected a list, found {type(tools).__name__}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise UserError(f"tools[{i}]: expected an object with type and function, found {type(tool).__name__}")
        function = tool.get("function")
        if tool.get("type") == "function" and not (isinstance(function, Mapping) and function.get("name")):
            raise UserError(f"tools[{i}].function: expected an object with a name")
    if style.tools == "json":
        return compact_json(tools)
    try:
        return declare(_sorted(tools))
    except RecursionError:
        raise UserError("tools: nested too deeply") from None


def _sorted(value: Any) -> Any:
    """K2.5's own renderer sorts all keys first, so that equal tools give equal text."""
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return value
