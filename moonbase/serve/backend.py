"""What every route of a server shares, and the way from a request to what the engine gets.

A surface says what the client wants in the terms of `Wish`; `Backend.prepare` renders the dialogue, counts it, and
gives the jobs for the engine. Reading a request runs on threads (`Backend.read`): long prompts take a while, and the
interpreter's lock is free for most of it.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from moonbase.chat.prompt import Prompt, default_sampling, prompt_of
from moonbase.chat.schema import check_tools
from moonbase.engine.turn import Turn, fewest_tokens, turn_constraint, writes_calls
from moonbase.errors import UserError
from moonbase.serve.errors import RequestError, from_user_error
from moonbase.serve.generation import Job, Lifetime, ServiceLike, capacity
from moonbase.serve.metrics import Metrics
from moonbase.serve.settings import ANY_MODEL, Settings

if TYPE_CHECKING:
    from moonbase.data import Tokenizer

LONG_BODY_BYTES = 256 << 10
"""Bodies above are read on threads of their own: they may take seconds, and the others do not wait for them."""
LONG_READERS, SHORT_READERS = 2, 4

Result = TypeVar("Result")


@dataclass(frozen=True)
class Wish:
    """One chat request, whichever surface it came through. `messages` and `tools` in OpenAI's form."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    tool_choice: str = "auto"
    """auto, none, required, or the name of a tool prefixed with `:`."""
    allowed_tools: Collection[str] | None = None
    """Names of those among `tools` that this reply may use; the others are as if they had not been given."""
    parallel: bool = True
    thinking: bool | None = None
    """None leaves it to the style."""
    preserve_thinking: bool = False
    """Show the model the reasoning of all its turns, not of the current tool loop alone."""
    schema: dict[str, Any] | None = None
    json_only: bool = False
    """The answer is a JSON object, of `schema` where there is one."""
    places: Sequence[str] = ()
    """Where each of `messages` stands in the request, where that differs (for error messages)."""
    renames: Sequence[tuple[str, str]] = ()
    """The client's own names for what the rooms below call otherwise: (pattern, the client's)."""
    continues: bool = False
    """The last message is the beginning of the answer."""
    n: int = 1
    max_tokens: int | None = None
    """None: to the end of the context."""
    clamp: bool = False
    """Cut `max_tokens` to the context instead of refusing."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `moonbase.engine.Sampling` beside `max_tokens`."""

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        """`tools` without those that are not allowed."""
        allowed = self.allowed_tools
        return [tool for tool in self.tools if allowed is None or tool["function"]["name"] in allowed]

    def field_name(self, path: str) -> str:
        """The client's name for a path such as `messages[2].content` or `tools[0].function.parameters`."""
        for theirs, its in self.renames:
            path = re.sub(theirs, its, path, count=1)
        found = re.match(r"messages\[(\d+)\]", path)
        if found is None or int(found[1]) >= len(self.places):
            return path
        return self.places[int(found[1])] + path[found.end() :]

    def with_sampling(self, *, max_tokens: int, clamp: bool, sampling: Mapping[str, Any]) -> Wish:
        """The same dialogue, with how to generate."""
        return replace(self, max_tokens=max_tokens, clamp=clamp, sampling=sampling)


@dataclass(frozen=True)
class Prepared:
    """What a chat request comes to: one job per choice, and how to read the replies."""

    jobs: list[Job]
    prompt: Prompt
    clamped: bool
    """The context leaves less room than was asked for."""
    notes: Sequence[str] = ()
    """What the client should know: keywords of its schemas that are not enforced."""

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt.ids)

    def turns(self) -> list[Turn]:
        """What reads the replies, one for each job."""
        return [Turn(self.prompt.parser()) for _ in self.jobs]


class Backend:
    """The model behind the routes. `context_length`: tokens of prompt and answer together."""

    def __init__(
        self, service: ServiceLike, tokenizer: Tokenizer, vocab_size: int, context_length: int, settings: Settings
    ) -> None:
        self.service, self.tokenizer, self.settings = service, tokenizer, settings
        self.style = settings.style or "kimi-k2"
        self.vocab_size, self.context_length = vocab_size, context_length
        self.lifetime = Lifetime()
        self.metrics = Metrics(service)
        self._special = {id: name for name, id in tokenizer.special_tokens.items()}
        self._readers = ThreadPoolExecutor(SHORT_READERS, "moonbase-read")
        self._long_readers = ThreadPoolExecutor(LONG_READERS, "moonbase-read-long")

    async def read(self, body: bytes, read: Callable[[], Result]) -> Result:
        """What `read` makes of a body, on a thread. Few at a time: no client can keep the others waiting for long."""
        readers = self._long_readers if len(body) > LONG_BODY_BYTES else self._readers
        return await asyncio.get_running_loop().run_in_executor(readers, read)

    def close(self) -> None:
        """Read no more."""
        for readers in (self._readers, self._long_readers):
            readers.shutdown(wait=False, cancel_futures=True)

    @property
    def names(self) -> list[str]:
        """What this server calls its models."""
        return [name for name in self.settings.model_names if name != ANY_MODEL] or ["moonbase"]

    def check_model(self, name: str) -> str:
        """The name to answer under. Raises RequestError 404 for one that this server does not go by."""
        names = self.settings.model_names
        if name not in names and ANY_MODEL not in names:
            known = ", ".join(repr(known) for known in names)
            raise RequestError(404, f"the model {name[:200]!r} does not exist; this server has {known} (moonbase serve "
                               "--model-name adds names; without it, or with '*', any name will do)", "model",
                               "model_not_found")
        return name

    # --- chat ---------------------------------------------------------------------------------------------------------

    def encode(self, wish: Wish) -> tuple[Prompt, list[str]]:
        """Check, render and tokenize; with it what the client should know. Raises RequestError 400 naming the field."""
        try:
            notes = check_tools(list(wish.tools)) or [] if wish.tools else []
            prompt = prompt_of(self.tokenizer, wish.messages, wish.usable_tools, self.style, thinking=wish.thinking,
                               preserve_thinking=wish.preserve_thinking, continues=wish.continues)
        except UserError as error:
            raise from_user_error(error, wish.field_name) from None
        return prompt, [wish.field_name(note) for note in notes]

    def prepare(self, wish: Wish) -> Prepared:
        """Jobs for the engine. Raises RequestError."""
        if self.settings.as_official:
            check_official(wish, self.style)
        self.check_count(wish.n)
        prompt, notes = self.encode(wish)
        max_tokens, clamped = self.budget(len(prompt.ids), wish.max_tokens, wish.clamp)
        sampling = {**default_sampling(self.style, wish.thinking), **wish.sampling}
        constraint = self.constraint(wish, prompt)
        try:
            least = fewest_tokens(constraint)
            if max_tokens < least:
                raise RequestError(400, f"max_tokens={max_tokens} is too small: the shortest answer that keeps to the "
                                   f"schema and tool_choice has {least} tokens", "max_tokens", "invalid_value")
            jobs = self.jobs(prompt.ids, max_tokens, sampling, wish.n, constraint)
        except UserError as error:
            raise from_user_error(error, wish.field_name) from None
        return Prepared(jobs, prompt, clamped, notes)

    def constraint(self, wish: Wish, prompt: Prompt) -> Callable[[], Any] | None:
        """What the reply must obey. Raises RequestError that names the client's field."""
        tools = wish.usable_tools
        choice = wish.tool_choice.removeprefix(":")
        if choice != wish.tool_choice and choice not in prompt.tool_names:
            raise RequestError(400, f"tool_choice names {choice[:80]!r}, which is not among the tools", "tool_choice",
                               "invalid_value")
        if wish.tool_choice == "required" and not tools:
            raise RequestError(400, "tool_choice 'required' needs tools", "tool_choice", "invalid_value")
        if tools and wish.tool_choice != "none" and not writes_calls(self.tokenizer):
            raise RequestError(400, "tools are unsupported: this model's vocabulary has no tool-call tokens", "tools",
                               "unsupported")
        try:
            return turn_constraint(self.tokenizer, self.vocab_size, prompt, tools, choice=choice,
                                   parallel=wish.parallel, json_only=wish.json_only, schema=wish.schema)
        except UserError as error:
            raise from_user_error(error, wish.field_name) from None

    # --- both ---------------------------------------------------------------------------------------------------------

    def check_count(self, count: int) -> None:
        """Raise RequestError 400 where one request has more sequences than would fit even if nobody else asked."""
        most = capacity(self.service)
        if count > most:
            raise RequestError(400, f"n: the request asks for {count} sequences (choices times prompts); this server "
                               f"holds {most} at a time, running and waiting", "n", "invalid_value")

    def budget(self, prompt_tokens: int, max_tokens: int | None, clamp: bool) -> tuple[int, bool]:
        """How many tokens may be generated, and whether the context allows fewer than were asked for.

        Raises RequestError 400 with the numbers where the context is too small.
        """
        room = self.context_length - prompt_tokens
        if room < 1:
            raise RequestError(400, f"the prompt has {prompt_tokens} tokens; the model's context is "
                               f"{self.context_length} tokens for prompt and answer", "messages",
                               "context_length_exceeded")
        if max_tokens is None or max_tokens <= room:
            return max_tokens or room, max_tokens is None
        if not clamp:
            raise RequestError(400, f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together "
                               f"{prompt_tokens + max_tokens}; the model's context is {self.context_length} tokens",
                               "max_tokens", "context_length_exceeded")
        return room, True

    def jobs(
        self, ids: Sequence[int], max_tokens: int, sampling: Mapping[str, Any], n: int,
        constraint: Callable[[], Any] | None,
    ) -> list[Job]:
        """n sequences of one prompt. A seed fixes all of them; they still differ."""
        from moonbase.engine import Sampling

        settings = dict(sampling)
        # A special token is no text in which a stop string could be met.
        marks = [self.tokenizer.special_tokens[stop] for stop in settings.get("stop", ())
                 if stop in self.tokenizer.special_tokens]
        if marks:
            settings["stop_ids"] = tuple(marks)
        seed = settings.pop("seed", None)
        seeds = [seed if seed is None or number == 0 else random.Random(f"{seed} {number}").getrandbits(62)
                 for number in range(n)]
        return [Job(ids, Sampling(max_tokens=max_tokens, seed=seed, **settings), constraint) for seed in seeds]

    def special_name(self, id: int) -> str | None:
        """The name of a special token; None for any other."""
        return self._special.get(id)

    def token_text(self, id: int) -> tuple[str, bytes]:
        """A token for people, and its bytes; a token may be part of a character."""
        piece = self.tokenizer.token_bytes(id) if 0 <= id < self.tokenizer.vocab_size else b""
        return self._special.get(id) or piece.decode("utf-8", "replace"), piece


def check_official(wish: Wish, style: str) -> None:
    """What the official API of a style refuses. Raises RequestError 400."""
    if style == "kimi-k2":
        return
    if style == "kimi-k2.5":
        fixed = {"temperature": 0.6 if wish.thinking is False else 1.0, "top_p": 0.95, "presence_penalty": 0.0,
                 "frequency_penalty": 0.0}  # fmt: skip
        for name, value in (fixed | {"n": 1}).items():
            given = wish.n if name == "n" else wish.sampling.get(name, value)
            if given != value:
                raise RequestError(400, f"{name} is {value:g} for this model and cannot be {given:g}", name,
                                   "invalid_value")
    if wish.thinking is False:
        return
    # The current tool loop: what follows the last message of the assistant that was an answer.
    for number in range(len(wish.messages) - 1, -1, -1):
        message = wish.messages[number]
        if message["role"] == "assistant":
            if not message.get("tool_calls"):
                return
            if not message.get("reasoning_content"):
                place = f"messages[{number}].reasoning_content"
                raise RequestError(400, f"{place}: thinking is on, so the reasoning before a tool call must be sent "
                                   "back", place, "invalid_value")
