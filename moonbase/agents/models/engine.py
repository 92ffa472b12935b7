"""A model in this process, through the engine: exact counts, and the very tokens of every reply.

Calls that run at the same time are one batch. A reply's tool calls are well-formed by construction where the package
for it is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moonbase.agents.models.base import CallOptions, Completion, Message, ModelError, Price, Usage
from moonbase.chat.prompt import Prompt, prompt_of
from moonbase.errors import TryAgain, UserError

if TYPE_CHECKING:
    import numpy as np

    from moonbase.data import Tokenizer
    from moonbase.engine import Engine, Service

REMEMBERED_TEXTS = 1024
QUEUE_LIMIT = 1 << 20
"""Calls wait as long as they must: to be turned away is for clients from outside."""


class EngineModel:
    """A model in this process. `close` it: the engine has a thread of its own."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, style: str, *, name: str = "moonbase", price: Price = Price(),
        thinking: bool | None = None, preserve_thinking: bool = False,
    ) -> None:
        """`style`: one of `moonbase.chat.STYLES`. `thinking`: None leaves it to the style. `preserve_thinking`: show
        the model the reasoning of all its turns. Raises UserError where no cache fits."""
        self.engine, self.style, self.name, self.price = engine, style, name, price
        self.context_tokens = min(engine.model.config.max_position_embeddings, engine.capacity)
        self.thinking, self.preserve_thinking = thinking, preserve_thinking
        self.tokenizer = tokenizer
        self._memory = _Memory(tokenizer)
        self._service: Service | None = None

    async def complete(self, messages: list[Message], tools: list[dict[str, Any]], options: CallOptions) -> Completion:
        """One reply. Raises ModelError. A call that is cancelled is ended in the engine, and its blocks are free."""
        from moonbase.engine import QueueFull, Sampling
        from moonbase.engine.service import Failed
        from moonbase.engine.turn import Turn

        try:
            # Rendering and grammars take a while for long prompts; the others' replies go on meanwhile.
            prompt, constraint = await asyncio.to_thread(self._prepare, messages, tools, options)
            sampling = Sampling(max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p,
                                seed=options.seed)
            pieces = self._ready().generate(prompt.ids, sampling, constraint)
            async with contextlib.aclosing(pieces), asyncio.timeout(options.timeout) as limit:
                loop, turn = asyncio.get_running_loop(), Turn(prompt.parser())
                async for piece in pieces:
                    turn.push(piece)
                    limit.reschedule(loop.time() + options.timeout)
        except TimeoutError:
            raise ModelError("timeout", f"{self.name}: no token came for {options.timeout:g} s") from None
        except QueueFull as error:
            raise ModelError("overloaded", str(error), retry_after=error.retry_after) from None
        except (Failed, TryAgain) as error:
            raise ModelError("server", f"{self.name}: {error}") from error
        except UserError as error:
            raise ModelError("bad_request", f"{self.name}: {error}") from None
        if turn.ended not in ("stop", "length"):
            raise ModelError("server", f"{self.name}: the engine ended the reply: {turn.ended}")
        # A call that is no JSON stays: its model is told, and can mend it.
        calls = turn.said_calls
        return Completion(
            turn.message(calls), turn.reason_with(calls),
            Usage(len(prompt.ids), turn.completion_tokens, turn.cached_tokens), self.name, prompt_ids=prompt.ids,
            token_ids=[token.id for token in turn.sampled], logprobs=[token.logprob for token in turn.sampled],
            notes=turn.parser.reply.notes)

    def count_tokens(self, messages: list[Message], tools: list[dict[str, Any]]) -> int:
        """Exact. Texts are encoded once. Raises ModelError for messages that cannot be rendered."""
        try:
            return len(self._prompt(messages, tools).ids)
        except UserError as error:
            raise ModelError("bad_request", f"{self.name}: {error}") from None

    async def close(self) -> None:
        """End what runs, and the engine's thread. Another call starts it again."""
        service, self._service = self._service, None
        if service is not None:
            await service.stop()

    def _ready(self) -> Service:
        from moonbase.engine import Service

        if self._service is None:
            self._service = Service(self.engine, queue_limit=QUEUE_LIMIT)
            self._service.start()
        return self._service

    def _prompt(self, messages: list[Message], tools: list[dict[str, Any]]) -> Prompt:
        return prompt_of(self._memory, messages, tools, self.style, thinking=self.thinking,
                         preserve_thinking=self.preserve_thinking)

    def _prepare(
        self, messages: list[Message], tools: list[dict[str, Any]], options: CallOptions
    ) -> tuple[Prompt, Any]:
        """The prompt, and what the reply must obey. Raises ModelError, UserError."""
        prompt = self._prompt(messages, tools)
        wanted = len(prompt.ids) + options.max_tokens
        if wanted > self.context_tokens:
            raise ModelError(
                "context_length", f"{self.name}: the prompt has {len(prompt.ids)} tokens and max_tokens is "
                f"{options.max_tokens}, together {wanted}; the context is {self.context_tokens} tokens", status=400)
        return prompt, self._constraint(prompt, tools, options)

    def _constraint(self, prompt: Prompt, tools: list[dict[str, Any]], options: CallOptions) -> Any:
        from moonbase.engine.turn import fewest_tokens, turn_constraint

        constraint = turn_constraint(self.tokenizer, self.engine.model.config.vocab_size, prompt, tools,
                                     choice=options.tool_choice if tools else "none", strict=False)
        least = fewest_tokens(constraint)
        if options.max_tokens < least:
            raise UserError(f"max_tokens={options.max_tokens} is too small: the shortest answer that keeps to "
                            f"tool_choice has {least} tokens")
        return constraint


class _Memory:
    """A tokenizer that remembers: the texts of a dialogue come again with every step."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special_tokens = tokenizer.special_tokens

        # As arrays, a fraction of a list's size.
        @functools.lru_cache(maxsize=REMEMBERED_TEXTS)
        def known(text: str) -> np.ndarray:
            return tokenizer.encode_array(text)

        self._known = known

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self._known(text).tolist()


def open_engine(source: str, *, price: Price = Price(), style: str | None = None) -> EngineModel:
    """The model of a run folder, of a checkpoint folder, or `preset:NAME` (random weights, and a vocabulary of little
    more than bytes). Raises UserError."""
    from moonbase.chat import default_style
    from moonbase.checkpoint import resolve_model_folder
    from moonbase.config import read_json
    from moonbase.data import load_tokenizer, train_tokenizer
    from moonbase.engine import Engine
    from moonbase.loading import load
    from moonbase.recipe import style_of

    if source.startswith("preset:"):
        # Before the tokenizer, so that an unknown preset is the first thing said.
        model = load(source)
        tokenizer = train_tokenizer(["The quick brown fox jumps over the lazy dog. "], 400)
        published: Any = model.config
    else:
        folder = resolve_model_folder(Path(source))
        tokenizer = load_tokenizer(folder)
        model = load(source, keep_int4="auto")
        published, style = read_json(folder / "config.json"), style or style_of(source)
    engine = Engine(model, tokenizer, stop_ids=tokenizer.eos_ids)
    return EngineModel(engine, tokenizer, style or default_style(tokenizer.special_tokens, published), name=source,
                       price=price)
