"""A model whose replies a function decides: for tests, and for baselines whose time and cost can be computed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moonbase.agents.models.base import (
    CallOptions,
    Completion,
    Message,
    ModelError,
    Price,
    Usage,
    estimate_message,
    estimate_tokens,
    tidied,
)

Policy = Callable[[list[Message], list[dict[str, Any]]], Message | ModelError]


@dataclass(frozen=True)
class Latency:
    """Seconds that a call takes."""

    per_call: float = 0.0
    per_input_token: float = 0.0
    per_cached_token: float = 0.0
    per_output_token: float = 0.0

    def of(self, usage: Usage) -> float:
        """Seconds of a call with this usage."""
        return (self.per_call + self.per_input_token * (usage.input_tokens - usage.cached_tokens)
                + self.per_cached_token * usage.cached_tokens + self.per_output_token * usage.output_tokens)


class ScriptedModel:
    """`policy(messages, tools)` gives the reply, or the error to be raised.

    Tokens are counted by the rule of thumb. What a call's prompt has in common with the longest earlier one counts as
    cached, as a prefix cache that forgets nothing would have it; tools count as cached where they were declared before,
    whatever messages they came with.
    """

    def __init__(
        self, policy: Policy, latency: Latency = Latency(), price: Price = Price(), context_tokens: int | None = None,
        name: str = "scripted", warm: Sequence[str] | None = None,
    ) -> None:
        """`warm`: it has served such agents before; these system prompts, and all tools, are in its cache."""
        self.policy, self.latency, self.price = policy, latency, price
        self.context_tokens, self.name = context_tokens, name
        self.calls = 0
        self._known: dict[int, tuple[Message, int, int]] = {}
        self._tools: tuple[list[dict[str, Any]] | None, int, int] = (None, 0, 0)
        self._warm = warm is not None
        self._seen: set[int] = set()
        self._seen_tools: set[int] = set()
        for system in warm or ():
            self._cached([{"role": "system", "content": system}], [])

    async def complete(self, messages: list[Message], tools: list[dict[str, Any]], options: CallOptions) -> Completion:
        """The policy's reply, after the seconds that it takes."""
        self.calls += 1
        prompt_tokens = self.count_tokens(messages, tools)
        if self.context_tokens is not None and prompt_tokens + options.max_tokens > self.context_tokens:
            raise ModelError("context_length", f"prompt of {prompt_tokens} tokens and {options.max_tokens} to come; "
                             f"the context is {self.context_tokens}", status=400)
        reply = self.policy(messages, tools)
        if isinstance(reply, ModelError):
            await asyncio.sleep(self.latency.per_call)
            raise reply
        message = tidied({"content": None, **reply})
        usage = Usage(prompt_tokens, estimate_message(message), self._cached(messages, tools))
        finish_reason = "tool_calls" if message.get("tool_calls") else "stop"
        if usage.output_tokens > options.max_tokens:
            # A cut call is no call; cut text is what there was of it.
            text = (message.get("content") or "").encode()[: 4 * max(0, options.max_tokens - 4)].decode(errors="ignore")
            message, finish_reason = {"role": "assistant", "content": text}, "length"
            usage = Usage(usage.input_tokens, options.max_tokens, usage.cached_tokens)
        await asyncio.sleep(self.latency.of(usage))
        return Completion(message, finish_reason, usage, self.name)

    def count_tokens(self, messages: list[Message], tools: list[dict[str, Any]]) -> int:
        """By the rule of thumb; each message is counted once."""
        known, of_tools = self._known, self._look_at_tools(tools)[0]
        try:
            return of_tools + sum([known[id(message)][1] for message in messages])
        except KeyError:
            return of_tools + sum([self._look(message)[1] for message in messages])

    async def close(self) -> None:
        """Nothing to give back."""

    def _look(self, message: Message) -> tuple[Message, int, int]:
        """(it, tokens, hash), worked out once. It is kept itself, so that no other message gets its id."""
        known = self._known.get(id(message))
        if known is None:
            said = (message.get("role"), str(message.get("content")), str(message.get("tool_calls")))
            known = self._known[id(message)] = (message, estimate_message(message), hash(said))
        return known

    def _look_at_tools(self, tools: list[dict[str, Any]]) -> tuple[int, int]:
        """(tokens, hash), worked out anew where they are other ones than last time."""
        if self._tools[0] is not tools:
            self._tools = (tools, estimate_tokens([], tools), hash(json.dumps(tools)))
        return self._tools[1:]

    def _cached(self, messages: list[Message], tools: list[dict[str, Any]]) -> int:
        """Tokens of the tools, if an earlier prompt declared the same, and of the longest beginning of the messages
        that an earlier prompt had as well."""
        if not self.latency.per_input_token and self.price.cached is None:
            return 0
        chain, (cached, digest) = 0, self._look_at_tools(tools)
        if not self._warm and digest not in self._seen_tools:
            cached = 0
            self._seen_tools.add(digest)
        for message in messages:
            _, tokens, digest = self._look(message)
            chain = hash((chain, digest))
            if chain in self._seen:
                cached += tokens
            else:
                self._seen.add(chain)
        return cached
