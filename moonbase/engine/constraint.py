"""Which tokens may come next: tool calls and JSON replies that cannot be malformed.

A constraint follows one reply token by token. The frame of special tokens (`chat/render.py`) is a small machine of
stages; the JSON inside is followed in `vocabulary.py`. Special tokens are known by their ids: the letters
"<|tool_call_end|>" in a string are text, and the token itself has no place there.

Nothing that was begun is left unfinished for want of tokens. Where only the shortest way out still fits the budget,
that way is all that is offered, and `cut_short` tells so.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import Any

import numpy as np

from moonbase.chat.grammar import opens_thinking
from moonbase.chat.messages import call_id
from moonbase.chat.render import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END
from moonbase.chat.schema import prepare_tools
from moonbase.chat.styles import END_THINK, THINK
from moonbase.engine.sampling import Constraint
from moonbase.engine.vocabulary import Tokenizer, Value, Vocabulary, Written, vocabulary_of
from moonbase.errors import UserError

_SLACK = 2
_TOOL_MARKERS = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END)


class Stage(Enum):
    """Where in a reply a constraint stands."""

    START = auto()  # nothing written; the model may open its reasoning itself
    REASONING = auto()
    TEXT = auto()
    SECTION = auto()  # between calls
    HEADER = auto()  # functions.NAME:IDX
    VALUE = auto()  # of arguments, or of a reply that can only be JSON
    REPLY = auto()  # JSON, unless it begins with a section
    END = auto()


class Factory:
    """Makes a fresh constraint for each reply; what replies have in common is worked out once.

    `minimum_tokens`: with fewer than these no reply that keeps the rules can be finished (0: there is always one).
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, think: bool, thinking_open: bool) -> None:
        if vocab_size < vocabulary.size:
            raise UserError(f"the model has {vocab_size} ids, fewer than its tokenizer ({vocabulary.size})")
        self.vocabulary = vocabulary
        self.vocab_size = vocab_size
        self.special = vocabulary.special
        self.think = think and THINK in self.special
        self.thinking_open = thinking_open
        self.minimum_tokens = 0
        self._masks: dict[Any, np.ndarray] = {}

    def mask_of(self, ids: Iterable[int], ordinary: bool = False) -> np.ndarray:
        """A mask with exactly these ids, and with all ordinary text if asked; made once."""
        key = (frozenset(ids), ordinary)
        if key not in self._masks:
            mask = np.zeros(self.vocab_size, dtype=bool)
            if ordinary:
                mask[: self.vocabulary.size] = self.vocabulary.ordinary
            mask[list(key[0])] = True
            self._masks[key] = mask
        return self._masks[key]


_FREE = frozenset({Stage.START, Stage.REASONING, Stage.TEXT})


class _Base:
    """What constraints share: reasoning, text, one JSON value at a time, the forced way out."""

    def __init__(self, factory: Factory) -> None:
        self.factory = factory
        self.vocabulary = factory.vocabulary
        self.done = False
        self.cut_short = False
        self.stage = Stage.START
        self._plan: list[int] = []
        self._written: Written | None = None
        self._special = factory.special
        if factory.thinking_open:
            self.stage = Stage.REASONING
        elif not factory.think:
            self._after_reasoning()

    @property
    def ignores_stop(self) -> bool:
        """The next token belongs to a tool section or a JSON value, which no stop text must cut, or is a marker."""
        return self.stage not in _FREE or (self.stage is Stage.START and self._wants_json)

    def mask(self, remaining: int) -> np.ndarray | None:
        assert not self.done, "the reply is over"
        mask = None if self._plan else self._offer(remaining)
        if mask is None:
            if not self._plan:
                self._plan, self.cut_short = self._way_out(), True
            mask = self.factory.mask_of([self._plan[0]])
        return mask

    def accept(self, token: int) -> None:
        if self._plan:
            # A sampler that overrules the mask is on its own from here.
            self._plan = self._plan[1:] if token == self._plan[0] else []
        if token in self.vocabulary.eos_ids or token == self.vocabulary.end_id:
            self.done = True
        else:
            self._advance(token)

    @property
    def _wants_json(self) -> bool:
        """What follows the reasoning is never free text."""
        raise AssertionError

    def _offer(self, remaining: int) -> np.ndarray | None:
        """The mask; None: only the way out is left."""
        raise AssertionError

    def _way_out(self) -> list[int]:
        """Tokens of the shortest end of the reply from here."""
        raise AssertionError

    def _advance(self, token: int) -> None:
        raise AssertionError

    def _after_reasoning(self) -> None:
        raise AssertionError

    def _value_mask(self, room: int, close: int) -> np.ndarray | None:
        """Tokens of the value, `close` where it may end. `room`: tokens left for the value itself."""
        assert self._written is not None
        mask = np.zeros(self.factory.vocab_size, dtype=bool)
        if not self._written.mask_into(mask, room) and not self._written.whole:
            return None
        mask[close] = self._written.whole
        return mask


class _Json(_Base):
    """A reply that is one JSON value."""

    factory: JsonFactory
    _wants_json = True

    def _after_reasoning(self) -> None:
        self.stage = Stage.VALUE
        self._written = Written(self.factory.value)

    def _way_out(self) -> list[int]:
        end = [self.vocabulary.end_id]
        if self._written is not None:
            return self._written.ending + end
        close = [self._special[END_THINK]] if self.stage is Stage.REASONING else []
        return close + self.factory.value.shortest + end

    def _offer(self, remaining: int) -> np.ndarray | None:
        if self.stage is Stage.VALUE:
            return self._value_mask(remaining - 1, self.vocabulary.end_id)
        if remaining <= len(self._way_out()) + _SLACK:
            return None
        if self.stage is Stage.REASONING:
            return self.factory.mask_of([self._special[END_THINK]], ordinary=True)
        mask = np.zeros(self.factory.vocab_size, dtype=bool)
        Written(self.factory.value).mask_into(mask, remaining - 1)
        mask[self._special[THINK]] = True
        return mask

    def _advance(self, token: int) -> None:
        if self.stage is Stage.START and token == self._special.get(THINK):
            self.stage = Stage.REASONING
        elif self.stage is Stage.REASONING:
            if token == self._special[END_THINK]:
                self._after_reasoning()
        else:
            if self._written is None:
                self._after_reasoning()
            assert self._written is not None
            self._written.accept(token)


class _Tools(_Base):
    """A reply that may, or must, call tools."""

    factory: ToolFactory

    def __init__(self, factory: ToolFactory) -> None:
        self._index = factory.first_index
        self._header = b""
        self._called: str | None = None
        super().__init__(factory)

    def _after_reasoning(self) -> None:
        self.stage = Stage.TEXT
        if self.factory.reply is not None:
            self.stage, self._written = Stage.REPLY, Written(self.factory.reply)

    @property
    def _wants_json(self) -> bool:
        return self.factory.reply is not None

    @property
    def _begun(self) -> bool:
        """JSON instead of calls has been decided for."""
        return self.stage is Stage.REPLY and self._written is not None and bool(self._written.text)

    def _end_of_section(self) -> list[int]:
        return [self._special[SECTION_END], self.vocabulary.end_id]

    def _way_out(self) -> list[int]:
        call_end = [self._special[CALL_END]]
        if self.stage is Stage.END:
            return [self.vocabulary.end_id]
        if self.stage is Stage.VALUE:
            assert self._written is not None
            return self._written.ending + call_end + self._end_of_section()
        if self.stage is Stage.HEADER:
            if self._called is not None:
                rest = [self._special[ARGUMENT_BEGIN], *self.factory.tools[self._called].shortest]
            else:
                rest = self.factory.shortest_call(self._index, self._header)
            return rest + call_end + self._end_of_section()
        if self.stage is Stage.SECTION and self._index > self.factory.first_index:
            return self._end_of_section()
        close = [self._special[END_THINK]] if self.stage is Stage.REASONING else []
        if self.factory.reply is not None and self.stage is not Stage.SECTION:
            rest = self.factory.reply.shortest if self._written is None else self._written.ending
            return [*close, *rest, self.vocabulary.end_id]
        if not self.factory.must_call and self.stage is not Stage.SECTION:
            return [self.vocabulary.end_id]
        call = [self._special[CALL_BEGIN], *self.factory.shortest_call(self._index, b""), *call_end]
        begin = [] if self.stage is Stage.SECTION else [self._special[SECTION_BEGIN]]
        return close + begin + call + self._end_of_section()

    def _offer(self, remaining: int) -> np.ndarray | None:
        if self.stage is Stage.VALUE:
            return self._value_mask(remaining - 3, self._special[CALL_END])
        if self.stage is Stage.HEADER:
            return self._offer_header(remaining)
        if self.stage is Stage.SECTION:
            return self._offer_section(remaining)
        if self.stage is Stage.END:
            return self.factory.mask_of([self.vocabulary.end_id])
        if self.factory.reply is not None and self.stage is not Stage.REASONING:
            return self._offer_reply(remaining)
        return self._offer_text(remaining)

    def _offer_reply(self, remaining: int) -> np.ndarray | None:
        """JSON, and as long as none is written, a section."""
        assert self.factory.reply is not None
        if self._begun:
            return self._value_mask(remaining - 1, self.vocabulary.end_id)
        mask = np.zeros(self.factory.vocab_size, dtype=bool)
        offered = (self._written or Written(self.factory.reply)).mask_into(mask, remaining - 1)
        if self.factory.tools and remaining > self.factory.section_tokens + _SLACK:
            mask[self._special[SECTION_BEGIN]] = offered = True
        if self.stage is Stage.START and self.factory.think and remaining > len(self._way_out()) + 1 + _SLACK:
            mask[self._special[THINK]] = offered = True
        return mask if offered else None

    def _offer_text(self, remaining: int) -> np.ndarray | None:
        factory, must_call = self.factory, self.factory.must_call or self.factory.reply is not None
        if must_call and remaining <= len(self._way_out()) + _SLACK:
            return None
        ids = [] if must_call else list(self.vocabulary.eos_ids)
        if factory.tools and remaining > factory.section_tokens + _SLACK:
            ids.append(self._special[SECTION_BEGIN])
        if self.stage is Stage.REASONING:
            ids.append(self._special[END_THINK])
        elif self.stage is Stage.START:
            ids.append(self._special[THINK])
        # A call that must come is the first thing after the reasoning.
        return factory.mask_of(ids, ordinary=not must_call or self.stage is Stage.REASONING)

    def _offer_section(self, remaining: int) -> np.ndarray | None:
        begin, end = self._special[CALL_BEGIN], self._special[SECTION_END]
        if self._index == self.factory.first_index:
            return self.factory.mask_of([begin])
        more = self.factory.parallel and remaining > self.factory.section_tokens + _SLACK
        return self.factory.mask_of([end, begin] if more else [end])

    def _offer_header(self, remaining: int) -> np.ndarray | None:
        if self._called is not None:
            return self.factory.mask_of([self._special[ARGUMENT_BEGIN]])
        return self.factory.header_mask(self._index, self._header, remaining)

    def _advance(self, token: int) -> None:
        name = self.vocabulary.pieces[token] if token < self.vocabulary.size else b""
        special = name.decode() if token == self._special.get(name.decode("utf-8", "replace")) else None
        if self.stage is Stage.VALUE:
            if special == CALL_END:
                self.stage, self._written, self._called = Stage.SECTION, None, None
                self._index += 1
            elif special is None:
                assert self._written is not None
                self._written.accept(token)
        elif self.stage is Stage.HEADER:
            if special == ARGUMENT_BEGIN and self._called is not None:
                self.stage, self._written = Stage.VALUE, Written(self.factory.tools[self._called])
            elif special is None:
                self._header += name
                self._called = self.factory.called(self._index, self._header)
        elif self.stage is Stage.SECTION:
            if special == CALL_BEGIN:
                self.stage, self._header = Stage.HEADER, b""
            elif special == SECTION_END:
                self.stage = Stage.END
        elif special == SECTION_BEGIN and self.factory.tools:
            self.stage, self._written = Stage.SECTION, None
        elif special == THINK and self.stage is Stage.START:
            self.stage = Stage.REASONING
        elif self.stage is Stage.START or (special == END_THINK and self.stage is Stage.REASONING):
            self._after_reasoning()
            if special is None and self._written is not None:
                self._written.accept(token)
        elif self.stage is Stage.REPLY and special is None:
            assert self._written is not None
            self._written.accept(token)


class JsonFactory(Factory):
    """Constraints for replies that are one JSON value."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, value: Value, think: bool, thinking_open: bool) -> None:
        super().__init__(vocabulary, vocab_size, think, thinking_open)
        self.value = value
        self.minimum_tokens = len(_Json(self)._way_out())

    def __call__(self) -> Constraint:
        return _Json(self)


class ToolFactory(Factory):
    """Constraints for replies that may call tools."""

    def __init__(
        self, vocabulary: Vocabulary, vocab_size: int, tools: dict[str, Value], must_call: bool, parallel: bool,
        first_index: int, think: bool, thinking_open: bool, reply: Value | None = None,
    ) -> None:
        super().__init__(vocabulary, vocab_size, think, thinking_open)
        self.tools = tools
        self.reply = None if must_call else reply
        self.must_call = must_call
        self.parallel = parallel
        self.first_index = first_index
        self._rests: dict[tuple[int, bytes], list[tuple[bytes, list[int]]]] = {}
        # Tokens from the beginning of a section to the end of the turn; indices may grow to six digits meanwhile.
        self.section_tokens = 11 + len(self.shortest_call(first_index, b"")) if tools else 0
        if must_call or self.reply is not None:
            self.minimum_tokens = len(_Tools(self)._way_out())

    def __call__(self) -> Constraint:
        return _Tools(self)

    def candidates(self, index: int, header: bytes) -> list[tuple[str, bytes]]:
        """The tools that a header begun with `header` can still name, each with what is missing of the header."""
        headers = [(name, call_id(name, index).encode()) for name in self.tools]
        return [(name, text[len(header) :]) for name, text in headers if text.startswith(header)]

    def called(self, index: int, header: bytes) -> str | None:
        """The tool that a whole header names."""
        return next((name for name, rest in self.candidates(index, header) if not rest), None)

    def rests(self, index: int, header: bytes) -> list[tuple[bytes, list[int]]]:
        """For each candidate what is missing of its header, and the tokens up to the end of its shortest arguments."""
        begin, key = self.special[ARGUMENT_BEGIN], (index, header)
        if key not in self._rests:
            if len(self._rests) > 1000:
                self._rests.clear()
            self._rests[key] = [
                (rest, [*self.vocabulary.spell(rest), begin, *self.tools[name].shortest])
                for name, rest in self.candidates(index, header)
            ]
        return self._rests[key]

    def shortest_call(self, index: int, header: bytes) -> list[int]:
        """The fewest tokens from inside a header to the end of the arguments."""
        return min((tokens for _, tokens in self.rests(index, header)), key=len)

    def header_mask(self, index: int, header: bytes, remaining: int) -> np.ndarray | None:
        """Tokens that go on towards a tool whose shortest call fits into what remains; None: no tool's does."""
        fitting = [rest for rest, tokens in self.rests(index, header) if remaining > len(tokens) + 3 + _SLACK]
        ids = {id for rest in fitting for id in self.vocabulary.prefixes(rest)}
        return self.mask_of(ids) if ids else None


def tool_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    tools: list[dict[str, Any]] | None,
    *,
    choice: str = "auto",
    parallel: bool = True,
    style: str,
    first_index: int = 0,
    thinking_open: bool = False,
    response_schema: dict[str, Any] | None = None,
    json_reply: bool = False,
) -> ToolFactory:
    """A factory of constraints, one for each reply, for a reply that may call `tools` (OpenAI tool objects).

    `vocab_size`: ids of the model, at least those of the tokenizer; ids beyond the tokenizer's are never offered.
    `choice`: "auto" leaves it to the model; "none" forbids calls; "required" makes a call the first thing after the
    reasoning; a tool's name does, with that tool. `parallel`: whether a section may hold several calls. `first_index`:
    the number of the first call, counted over the whole dialogue. `thinking_open`: the prompt ends with `<think>`.
    `json_reply`: a reply without calls is one JSON value, of `response_schema` (which alone asks for it too; None: any
    object), and whether it is calls or the value is decided by the first token after the reasoning.

    What is enforced of the schemas of tools without `strict: true` says `chat/relax.py`.
    Raises SchemaError naming the place in `tools`, or in `response_schema` from `schema` on; UserError for a choice
    without a tool, a tokenizer without the markers, or llguidance missing.
    """
    vocabulary = vocabulary_of(tokenizer)
    parameters = prepare_tools(tools or []).parameters
    functions = [tool["function"] for tool in tools or []]
    names = [function["name"] for function in functions]
    if choice not in ("auto", "none", "required") and choice not in names:
        raise UserError(f'tool_choice: there is no tool named "{choice}"; known: {", ".join(names) or "none"}')
    if choice == "required" and not names:
        raise UserError('tool_choice: "required" needs at least one tool')
    values = {}
    for number, function in enumerate(functions):
        if choice != "none" and choice in ("auto", "required", function["name"]):
            values[function["name"]] = vocabulary.value(parameters[number], f"tools[{number}].function.parameters")
    _need(vocabulary, _TOOL_MARKERS if values else (), thinking_open)
    must_call = bool(values) and choice != "auto"
    think = opens_thinking(style, thinking_open)
    reply = vocabulary.value(response_schema, "schema") if json_reply or response_schema is not None else None
    return ToolFactory(vocabulary, vocab_size, values, must_call, parallel, first_index, think, thinking_open, reply)


def json_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    schema: dict[str, Any] | None,
    *,
    style: str = "kimi-k2",
    thinking_open: bool = False,
    path: str = "schema",
) -> JsonFactory:
    """A factory of constraints for replies that, after the reasoning, are one value of `schema` (None: any object).

    Raises SchemaError with a place that starts with `path`, and UserError as `tool_constraint` does.
    """
    vocabulary = vocabulary_of(tokenizer)
    _need(vocabulary, (), thinking_open)
    value = vocabulary.value(schema, path)
    return JsonFactory(vocabulary, vocab_size, value, opens_thinking(style, thinking_open), thinking_open)


def _need(vocabulary: Vocabulary, markers: Iterable[str], thinking_open: bool) -> None:
    wanted = [*markers, *([END_THINK] if thinking_open else [])]
    missing = [name for name in wanted if name not in vocabulary.special]
    if missing:
        raise UserError(f"the tokenizer has no token {missing[0]}: it cannot write tool calls or reasoning")
