"""The OpenAI surface: POST /v1/chat/completions and /v1/completions, GET /v1/models.

`reasoning_content` stands beside `content` in messages and deltas, as Kimi's own API has it. A tool call that was cut
off by the token limit is not among `tool_calls`; `finish_reason` is then `length`.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from moonbase.chat import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallAborted, ToolCallStart
from moonbase.data.tokenizer import VISIBLE_SPECIALS
from moonbase.engine.turn import TokenLogprob, Turn
from moonbase.serve.backend import Backend, Wish
from moonbase.serve.body import parse_json, validate
from moonbase.serve.errors import RequestError, error_body
from moonbase.serve.generation import as_request_error
from moonbase.serve.openai_types import AllowedChoice, ChatRequest, Common, CompletionRequest, NamedChoice
from moonbase.serve.streaming import Reply, event

if TYPE_CHECKING:
    from moonbase.engine import Scores

DEFAULT_COMPLETION_TOKENS = 16
"""Of plain completions, as OpenAI has it."""

MOST_PROMPTS = 64


async def chat_completions(backend: Backend, body: bytes, record: Any, deadline: float) -> Reply:
    """One chat request. Raises RequestError."""

    def read() -> tuple[ChatRequest, Any]:
        request = validate(ChatRequest, parse_json(body))
        backend.check_model(request.model)
        return request, backend.prepare(_wish(backend, request))

    request, prepared = await backend.read(body, read)
    record.prompt_tokens, record.notes = prepared.prompt_tokens, prepared.notes
    answer = ChatAnswer(backend, request, prepared.turns(), prepared.prompt.ids)
    return Reply(backend, prepared.jobs, answer, record, deadline)


async def completions(backend: Backend, body: bytes, record: Any, deadline: float) -> Reply:
    """Plain text continued, or measured: `echo` with `logprobs` tells how likely the prompt's own tokens are.

    Raises RequestError.
    """

    def read() -> tuple[CompletionRequest, list[list[int]], list[Any]]:
        request = validate(CompletionRequest, parse_json(body))
        backend.check_model(request.model)
        prompts = _prompt_ids(backend, request)
        each = request.n or 1
        backend.check_count(each * len(prompts))
        sampling = {"temperature": 1.0, **_sampling(backend, request), "logprobs": request.logprobs}
        jobs: list[Any] = []
        for ids in prompts:
            # An echo alone needs no room for an answer, but the engine reads no longer text than any other's prompt.
            wanted = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else max(1, request.max_tokens)
            max_tokens, _ = backend.budget(len(ids), wanted, clamp=request.max_tokens is None)
            jobs += backend.jobs(ids, max_tokens, sampling, each, None) if request.max_tokens != 0 else []
        return request, prompts, jobs

    request, prompts, jobs = await backend.read(body, read)
    record.prompt_tokens = sum(len(ids) for ids in prompts)
    turns = [Turn(None, ended=None if jobs else "length") for _ in range(len(prompts) * (request.n or 1))]
    scores = None
    if request.echo and request.logprobs is not None:
        scores = await _scores(backend, prompts, request.logprobs)
    return Reply(backend, jobs, CompletionAnswer(backend, request, turns, prompts, scores), record, deadline)


async def _scores(backend: Backend, prompts: list[list[int]], top: int) -> list[Scores]:
    """Log-probabilities of the tokens of each prompt but its first, with the `top` most likely. One prompt after the
    other: they take no more than one place in the queue. Raises RequestError."""
    try:
        return [await backend.service.score(ids, top) for ids in prompts]
    except Exception as error:
        known = as_request_error(error)
        if known is error:
            raise
        raise known from error


def models(backend: Backend, started: float) -> dict[str, Any]:
    """The list of models. `*` is no name."""
    return {"object": "list", "data": [model(backend, name, started) for name in backend.names]}


def model(backend: Backend, name: str, started: float) -> dict[str, Any]:
    """One entry of the list. Raises RequestError 404."""
    backend.check_model(name)
    return {"id": name, "object": "model", "created": int(started), "owned_by": "moonbase",
            "max_model_len": backend.context_length}


# --- what the client wants --------------------------------------------------------------------------------------------


def _wish(backend: Backend, request: ChatRequest) -> Wish:
    choice, allowed = request.tool_choice or "auto", None
    if isinstance(choice, NamedChoice):
        choice = f":{choice.function.name}"
    elif isinstance(choice, AllowedChoice):
        choice, allowed = choice.allowed_tools.mode, {tool.function.name for tool in choice.allowed_tools.tools}
    form = request.response_format
    sampling = _sampling(backend, request)
    if request.logprobs:
        sampling["logprobs"] = request.top_logprobs or 0
    return Wish(
        messages=[message.plain() for message in request.messages],
        tools=[tool.plain() for tool in request.tools or ()],
        tool_choice=choice,
        allowed_tools=allowed,
        parallel=request.parallel_tool_calls is not False,
        thinking=request.wants_thinking,
        preserve_thinking=request.keeps_thinking,
        schema=form.json_schema.schema_ if form is not None and form.json_schema is not None else None,
        json_only=form is not None and form.type != "text",
        renames=[("^schema", "response_format.json_schema.schema")],
        continues=bool(request.messages[-1].partial),
        n=request.n or 1,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        sampling=sampling,
    )


def _sampling(backend: Backend, request: Common) -> dict[str, Any]:
    """The fields that were given, as the engine names them."""
    names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
             "ignore_eos")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.top_k is not None:
        # Open engines write -1 for "all".
        given["top_k"] = max(request.top_k, 0)
    if request.stops:
        given["stop"] = request.stops
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < backend.vocab_size):
            raise RequestError(400, f"logit_bias: {key[:40]!r} is not a token id from 0 to {backend.vocab_size - 1}",
                               "logit_bias", "invalid_value")
        bias[int(key)] = value
    if bias:
        given["logit_bias"] = bias
    return given


def _prompt_ids(backend: Backend, request: CompletionRequest) -> list[list[int]]:
    prompts = request.prompts
    if not 0 < len(prompts) <= MOST_PROMPTS:
        raise RequestError(400, f"prompt: from 1 to {MOST_PROMPTS} prompts in one request", "prompt", "invalid_value")
    encoded = [backend.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    for number, ids in enumerate(encoded):
        if not ids:
            raise RequestError(400, f"prompt[{number}] is empty; give at least one character", "prompt",
                               "invalid_value")
        wrong = next((id for id in ids if not 0 <= id < backend.vocab_size), None)
        if wrong is not None:
            raise RequestError(400, f"prompt[{number}]: {str(wrong)[:40]} is not a token id from 0 to "
                               f"{backend.vocab_size - 1}", "prompt", "invalid_value")
    return encoded


# --- the answers ------------------------------------------------------------------------------------------------------


class OpenAIAnswer:
    """What both kinds of answer share: identity, usage, streams that end with [DONE]."""

    kind = ""
    chunk_kind = ""

    def __init__(self, backend: Backend, request: Common, turns: list[Turn], prompt_tokens: int) -> None:
        self.backend, self.request, self.turns, self.prompt_tokens = backend, request, turns, prompt_tokens
        self.stream = bool(request.stream)
        self.with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        prefix = "chatcmpl" if self.kind.startswith("chat") else "cmpl"
        self.identity = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()),
                         "model": request.model}

    def usage(self) -> dict[str, Any]:
        completion = sum(turn.completion_tokens for turn in self.turns)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens()},
            "completion_tokens_details": {"reasoning_tokens": sum(turn.reasoning_tokens for turn in self.turns)},
        }

    def cached_tokens(self) -> int:
        """The choices of a prompt share it; how much of it was there already is said of the first."""
        return sum(turn.cached_tokens for turn in self.turns[:: self.request.n or 1])

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        chunk = {**self.identity, "object": self.chunk_kind, "choices": choices}
        return event(chunk | ({"usage": None} if self.with_usage else {}) | more)

    def begin(self) -> Iterable[bytes]:
        return ()

    def end(self) -> Iterator[bytes]:
        if self.with_usage:
            yield self.chunk([], usage=self.usage())
        yield event("[DONE]")

    def ping(self) -> bytes:
        return b": ping\n\n"

    def failure(self, error: RequestError, request_id: str) -> Iterator[bytes]:
        yield event(error_body(error, "openai", request_id))
        yield event("[DONE]")


class ChatAnswer(OpenAIAnswer):
    """chat.completion and chat.completion.chunk."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, backend: Backend, request: ChatRequest, turns: list[Turn], prompt_ids: list[int]) -> None:
        super().__init__(backend, request, turns, len(prompt_ids))
        self.prompt = {"prompt_token_ids": prompt_ids} if request.return_token_ids else {}

    def body(self) -> dict[str, Any]:
        choices = [{"index": number, "message": turn.message(turn.tool_calls), **self._tokens(turn),
                    "finish_reason": turn.finish_reason} for number, turn in enumerate(self.turns)]
        return {**self.identity, "object": self.kind, "choices": choices, "usage": self.usage(), **self.prompt}

    def begin(self) -> Iterator[bytes]:
        for number in range(len(self.turns)):
            more = self.prompt if number == 0 else {}
            yield self.chunk([self._choice(number, {"role": "assistant", "content": ""})], **more)

    def deltas(self, number: int, piece: Any, events: list[Any]) -> Iterator[bytes]:
        turn = self.turns[number]
        for happened in events:
            delta = _delta_of(happened)
            if delta is not None:
                tokens = self._tokens(turn, since=True) if self.prompt or "content" in delta else {}
                yield self.chunk([self._choice(number, delta, **tokens)])
        if piece.finish_reason is not None:
            tokens = self._tokens(turn, since=True) if self.prompt else {}
            yield self.chunk([self._choice(number, {}, finish_reason=turn.finish_reason, **tokens)])

    def _choice(self, number: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None} | more

    def _tokens(self, turn: Turn, since: bool = False) -> dict[str, Any]:
        """`logprobs` of the content; where the ids were asked for, `token_ids` of the whole reply and `logprobs` of
        these. `since`: of those that no chunk has told yet."""
        entries = turn.sampled if self.prompt else turn.logprobs
        told = {"logprobs": self._logprobs(entries) if entries or not since else None}
        if self.prompt:
            told["token_ids"] = [entry.id for entry in entries]
        if since:
            turn.sampled, turn.logprobs = [], []
        return told

    def _logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return {"content": [
            self._token(entry.id, entry.logprob) | {"top_logprobs": [self._token(*top) for top in entry.top]}
            for entry in entries
        ], "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        text, piece = self.backend.token_text(id)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(piece)}


def _delta_of(happened: Any) -> dict[str, Any] | None:
    match happened:
        case ContentDelta():
            return {"content": happened.text}
        case ReasoningDelta():
            return {"reasoning_content": happened.text}
        case ToolCallStart():
            function = {"name": happened.name, "arguments": ""}
            return {"tool_calls": [{"index": happened.index, "id": happened.id, "type": "function",
                                    "function": function}]}
        case ToolCallAborted():
            return {"content": happened.text}
        case ArgumentsDelta():
            return {"tool_calls": [{"index": happened.index, "function": {"arguments": happened.text}}]}
    return None


class ShownText:
    """How many characters of a text the tokens so far have shown; a character counts with its last byte."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.length = backend, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def place(self, id: int) -> int:
        """Where the text of this token begins."""
        begin, name = self.length, self.backend.special_name(id)
        if name is not None:
            self.length += len(self._decoder.decode(b"", final=True))
            self._decoder.reset()
            begin = self.length
            self.length += len(name) if name in VISIBLE_SPECIALS else 0
        else:
            self.length += len(self._decoder.decode(self.backend.token_text(id)[1]))
        return begin


class CompletionAnswer(OpenAIAnswer):
    """text_completion, whole and in chunks. Choices of the first prompt come first.

    With `echo` the prompt precedes, and its tokens the log-probabilities; the first has none, as nothing precedes it,
    and null among the `top_logprobs`.
    """

    kind = chunk_kind = "text_completion"

    def __init__(
        self, backend: Backend, request: CompletionRequest, turns: list[Turn], prompts: list[list[int]],
        scores: list[Scores] | None = None,
    ) -> None:
        super().__init__(backend, request, turns, sum(len(ids) for ids in prompts))
        each = len(turns) // len(prompts)
        echoed = [backend.tokenizer.decode(ids) if request.echo else "" for ids in prompts]
        self.heads = [echoed[number // each] for number in range(len(turns))]
        self.shown = [ShownText(backend) for _ in turns]
        measured: list[list[TokenLogprob]] = [[] for _ in prompts]
        if scores is not None:
            measured = [[TokenLogprob(ids[0], None, None), *map(TokenLogprob, ids[1:], *found)]
                        for ids, found in zip(prompts, scores, strict=True)]
        self.head_logprobs = [measured[number // each] for number in range(len(turns))]

    def body(self) -> dict[str, Any]:
        choices = [
            {"index": number, "text": self.heads[number] + turn.content,
             "logprobs": self._logprobs(number, self.head_logprobs[number] + turn.logprobs),
             "finish_reason": turn.finish_reason}
            for number, turn in enumerate(self.turns)
        ]
        return {**self.identity, "object": self.kind, "choices": choices, "usage": self.usage()}

    def begin(self) -> Iterator[bytes]:
        for number, (head, turn) in enumerate(zip(self.heads, self.turns, strict=True)):
            if head:
                measured = self.head_logprobs[number]
                # Where nothing is generated the echo is the whole answer.
                yield self._chunk(number, head, logprobs=self._logprobs(number, measured) if measured else None,
                                  finish_reason=turn.finish_reason if turn.ended is not None else None)

    def deltas(self, number: int, piece: Any, events: list[Any]) -> Iterator[bytes]:
        turn, text = self.turns[number], "".join(happened.text for happened in events)
        entries, turn.logprobs = turn.logprobs, []
        finish = None if piece.finish_reason is None else turn.finish_reason
        if text or entries or finish:
            yield self._chunk(number, text, logprobs=self._logprobs(number, entries) if entries else None,
                              finish_reason=finish)

    def _chunk(self, number: int, text: str, **more: Any) -> bytes:
        return self.chunk([{"index": number, "text": text, "logprobs": None, "finish_reason": None} | more])

    def _logprobs(self, number: int, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        return {
            "tokens": [self._name(entry.id) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "text_offset": [self.shown[number].place(entry.id) for entry in entries],
            "top_logprobs": [
                None if entry.top is None else {self._name(id): _finite(value) for id, value in (*entry.top, entry[:2])}
                for entry in entries
            ],
        }

    def _name(self, id: int) -> str:
        """A token as the key of an object: parts of characters would all look alike."""
        text, piece = self.backend.token_text(id)
        return text if text.encode() == piece else "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity."""
    return None if logprob is None else max(logprob, -9999.0)
