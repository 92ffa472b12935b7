"""Who answers: a model on this machine, through the engine, or an OpenAI-compatible endpoint, through HTTP.

Both say the same events, those of `moonbase.chat`, and `Finished` at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moonbase.chat import ArgumentsDelta, ContentDelta, Event, ReasoningDelta, ToolCallEnd, ToolCallStart
from moonbase.errors import TryAgain, UserError

if TYPE_CHECKING:
    from moonbase.chat.prompt import Prompt

KEY_VARIABLE = "MOONBASE_API_KEY"
STREAM_SECONDS = 600.0
"""So long may an endpoint be silent."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """The reply is over. `tokens`: how many were written, None where an endpoint does not say."""

    tokens: int | None
    reason: str
    """stop, tool_calls, or length: the token limit cut it."""


@dataclass
class Wishes:
    """How the user wants replies; None leaves it to the model's publisher, or to the endpoint."""

    temperature: float | None = None
    tokens: int | None = None
    thinking: bool | None = None


class Speaker(Protocol):
    name: str
    chats: bool
    """Whether it was taught to chat; otherwise it continues text."""

    def reply(self, messages: list[Message], tools: list[dict[str, Any]], wishes: Wishes, seed: int
              ) -> Iterator[Event | Finished]:
        """The answer to OpenAI messages. Raises UserError or TryAgain."""
        ...

    def proceed(self, text: str, wishes: Wishes, seed: int) -> Iterator[Event | Finished]:
        """What follows a plain text. Raises UserError or TryAgain."""
        ...


# --- on this machine --------------------------------------------------------------------------------------------------


class LocalSpeaker:
    """A run folder or a checkpoint folder, through the engine."""

    def __init__(self, source: str) -> None:
        from moonbase.chat import default_style
        from moonbase.checkpoint import resolve_model_folder
        from moonbase.config import read_json
        from moonbase.engine import Engine
        from moonbase.loading import load, load_tokenizer_of
        from moonbase.recipe import style_of

        self.tokenizer = load_tokenizer_of(source)
        folder = resolve_model_folder(source)
        model = load(source, keep_int4="auto")
        # One reply at a time: room for one context, and the blocks of earlier turns are found again.
        context = model.config.max_position_embeddings
        self.engine = Engine(model, self.tokenizer, self.tokenizer.eos_ids, max_running=1,
                             cache_tokens=None if context > 1 << 15 else 2 * context)
        self.name = source
        self.style = style_of(source) or default_style(self.tokenizer.special_tokens,
                                                       read_json(folder / "config.json"))
        self.chats = "<|im_middle|>" in self.tokenizer.special_tokens and _stage_of(source, folder) in (None, "sft")
        self.context = context

    def reply(self, messages: list[Message], tools: list[dict[str, Any]], wishes: Wishes, seed: int
              ) -> Iterator[Event | Finished]:
        from moonbase.chat.prompt import default_sampling, prompt_of

        prompt = prompt_of(self.tokenizer, messages, tools, self.style, thinking=wishes.thinking)
        parser, constraint = prompt.parser(), self._constraint(tools, prompt)
        sampling = default_sampling(self.style, wishes.thinking)
        if wishes.temperature is not None:
            sampling["temperature"] = wishes.temperature
        if len(prompt.ids) >= self.context:
            raise UserError(f"the conversation has {len(prompt.ids)} tokens; the model's context is {self.context}. "
                            "/new begins another")
        for said in self._speak(prompt.ids, sampling, wishes.tokens or 4096, seed, constraint):
            if isinstance(said, Finished):
                yield from parser.finish()
                called = parser.reply.tool_calls and said.reason == "stop"
                yield Finished(said.tokens, "tool_calls" if called else said.reason)
            else:
                yield from parser.push(said.text, special=said.special)

    def proceed(self, text: str, wishes: Wishes, seed: int) -> Iterator[Event | Finished]:
        sampling = {"temperature": 0.8 if wishes.temperature is None else wishes.temperature, "top_p": 0.95}
        for said in self._speak(self.tokenizer.encode(text), sampling, wishes.tokens or 128, seed):
            yield said if isinstance(said, Finished) else ContentDelta(said.text)

    def _constraint(self, tools: list[dict[str, Any]], prompt: Prompt) -> Any:
        """Calls are well-formed by construction where the package for it is installed; a model whose vocabulary has no
        calls only talks."""
        from moonbase.engine.turn import turn_constraint, writes_calls

        callable_tools = tools if writes_calls(self.tokenizer) else []
        return turn_constraint(self.tokenizer, self.engine.model.config.vocab_size, prompt, callable_tools,
                               strict=False)

    def _speak(self, ids: Sequence[int], settings: dict[str, float], tokens: int, seed: int, constraint: Any = None
               ) -> Iterator[Any]:
        """Pieces with text, then Finished. Ctrl-C ends it with KeyboardInterrupt between two tokens."""
        from moonbase.engine import Sampling

        room = max(1, self.context - len(ids))
        sampling = Sampling(max_tokens=min(tokens, room), seed=seed, **settings)
        count, reason = 0, "stop"
        pieces = self.engine.pieces(ids, sampling, constraint)
        with _asked_to_stop() as stopped, contextlib.closing(pieces):
            for piece in pieces:
                count += len(piece.ids)
                reason = piece.finish_reason or reason
                if piece.text:
                    yield piece
                if stopped():
                    raise KeyboardInterrupt
        yield Finished(count, reason)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is only noted: in the middle of a forward pass it would leave a cache half written. A second one
    interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _stage_of(source: str, folder: Path) -> str | None:
    """The stage of the run that a model comes from; None where no run says so."""
    import yaml

    for file in (Path(source) / "config.yaml", folder.parent.parent / "config.yaml"):
        # A model need not come from a run, nor a file of that name be a run's: then nothing is known of its stage.
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            return str(values.get("stage", "pretrain")) if isinstance(values, dict) else None
    return None


# --- elsewhere --------------------------------------------------------------------------------------------------------


class RemoteSpeaker:
    """An OpenAI-compatible endpoint: `http://host:8000`, with or without `/v1`; `#NAME` chooses among its models."""

    chats = True

    def __init__(self, url: str) -> None:
        """Raises UserError or TryAgain where there is no such endpoint."""
        try:
            import httpx
        except ImportError:
            raise UserError("talking to a URL needs httpx; install it with pip install 'moonbase[serve]'") from None
        address, _, wanted = url.partition("#")
        address = address.rstrip("/").removesuffix("/chat/completions")
        self.url = address if address.endswith("/v1") else address + "/v1"
        key = os.environ.get(KEY_VARIABLE)
        try:
            self._client = httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {},
                                        timeout=httpx.Timeout(STREAM_SECONDS, connect=10.0))
            with self._answer("GET", "/models") as response:
                names = [str(entry["id"]) for entry in json.loads(response.read())["data"]]
        except httpx.InvalidURL as error:
            raise UserError(f"{url}: no valid address: {error}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.url}/models: no list of models; is this an OpenAI-compatible endpoint?") from None
        if wanted and wanted not in names:
            raise UserError(f"{address}: no model {wanted}; there are {', '.join(names) or 'none'}")
        if not names:
            raise UserError(f"{self.url}/models: the endpoint has no model")
        self.model = wanted or names[0]
        self.name = f"{self.model} at {address}"

    def reply(self, messages: list[Message], tools: list[dict[str, Any]], wishes: Wishes, seed: int
              ) -> Iterator[Event | Finished]:
        body: dict[str, Any] = {"messages": messages}
        if tools:
            body["tools"] = tools
        if wishes.thinking is not None:
            body["chat_template_kwargs"] = {"thinking": wishes.thinking}
        open_calls: list[int] = []
        tokens, reason = None, "stop"
        for chunk in self._stream("/chat/completions", body, wishes):
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in (chunk.get("choices") or ())[:1]:
                delta = choice.get("delta") or {}
                if delta.get("reasoning_content"):
                    yield ReasoningDelta(delta["reasoning_content"])
                if delta.get("content"):
                    yield ContentDelta(delta["content"])
                for call in delta.get("tool_calls") or ():
                    yield from _call_events(call, open_calls)
                reason = choice.get("finish_reason") or reason
        if reason != "length":
            yield from map(ToolCallEnd, open_calls)
        yield Finished(tokens, reason)

    def proceed(self, text: str, wishes: Wishes, seed: int) -> Iterator[Event | Finished]:
        tokens, reason = None, "stop"
        wishes = Wishes(wishes.temperature, wishes.tokens or 128)
        for chunk in self._stream("/completions", {"prompt": text}, wishes):
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in (chunk.get("choices") or ())[:1]:
                if choice.get("text"):
                    yield ContentDelta(choice["text"])
                reason = choice.get("finish_reason") or reason
        yield Finished(tokens, reason)

    def _stream(self, path: str, body: dict[str, Any], wishes: Wishes) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer."""
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **body}
        if wishes.temperature is not None:
            body["temperature"] = wishes.temperature
        if wishes.tokens is not None:
            body["max_tokens"] = wishes.tokens
        finished = False
        with self._answer("POST", path, body) as response:
            for line in _lines(response.iter_text()):
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                try:
                    chunk = json.loads(data)
                except (ValueError, RecursionError):
                    raise UserError(f"{self.url}{path}: an event that is no JSON: {data[:80]!r}") from None
                if not isinstance(chunk, dict) or chunk.get("error"):
                    raise TryAgain(_message_of(chunk) or f"{self.url}{path}: the answer broke off")
                finished = finished or any(choice.get("finish_reason") for choice in chunk.get("choices") or ())
                yield chunk
        # Some endpoints close the connection instead of saying [DONE].
        if not finished:
            raise TryAgain(f"{self.url}{path}: the endpoint closed the connection in the middle of the answer")

    @contextlib.contextmanager
    def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
        """An open answer with status 200. Raises UserError or TryAgain for what went wrong on the way."""
        import httpx

        try:
            with self._client.stream(method, self.url + path, json=body) as response:
                if response.status_code != 200:
                    raise _refusal(self.url, response.status_code, response.read())
                yield response
        except httpx.TimeoutException:
            raise TryAgain(f"{self.url}: no answer in time") from None
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise UserError(f"{self.url}: {error}") from None
        except httpx.TransportError as error:
            raise TryAgain(f"{self.url} cannot be reached: {error}") from None


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of a stream of events. Only CR and LF end one: what Unicode takes for line ends besides may stand in an
    event's text."""
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line.removesuffix("\r")
    yield rest


def _call_events(call: dict[str, Any], open_calls: list[int]) -> Iterator[Event]:
    """One element of a delta's `tool_calls`; `open_calls` collects the indices that have begun."""
    index, function = call.get("index", 0), call.get("function") or {}
    if index not in open_calls:
        open_calls.append(index)
        yield ToolCallStart(index, call.get("id") or f"call_{index}", function.get("name") or "")
    if function.get("arguments"):
        yield ArgumentsDelta(index, function["arguments"])


def _refusal(url: str, status: int, content: bytes) -> Exception:
    try:
        message = _message_of(json.loads(content))
    except (ValueError, RecursionError):
        message = ""
    message = f"{url}: {message or f'status {status}'}"
    if status == 401:
        return UserError(f"{message} (the key is read from the environment variable {KEY_VARIABLE})")
    return TryAgain(message) if status == 429 or status >= 500 else UserError(message)


def _message_of(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""
