"""Batched generation from the latent cache: prefill in parts, then one token at a time, absorbed form.

Greedy or sampled. The same code serves samples during training, the quickstart's completions and the terminal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moonbase.engine.cache import LatentCache
from moonbase.errors import UserError
from moonbase.model import Transformer

PREFILL_TOKENS = 256
"""Prompts are read so many tokens at a time: scores take B · H · 256 · S numbers, not S² of them."""


class TokenizerLike(Protocol):
    """What the engine needs of a tokenizer. Where a text ends with a whole character, what follows decodes alone."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_p keeps the smallest set of that probability."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1")
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1]")


class Engine:
    """`Engine(model, tokenizer).generate([...])`; ids of finished sequences end before the end-of-text token."""

    def __init__(self, model: Transformer, tokenizer: TokenizerLike, stop_ids: Sequence[int] = ()) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = frozenset(stop_ids) | frozenset(model.config.eos_token_ids)

    def generate(self, prompts: Sequence[str], sampling: Sampling = Sampling()) -> list[str]:
        """Continuations of `prompts`, text each."""
        encoded = [self.tokenizer.encode(prompt) for prompt in prompts]
        return [self.tokenizer.decode(ids) for ids in self.generate_ids(encoded, sampling)]

    def generate_ids(self, prompts: Sequence[Sequence[int]], sampling: Sampling = Sampling()) -> list[list[int]]:
        """Continuations as token ids. Raises UserError for an empty prompt or one that fills the context."""
        results: list[list[int]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        for tokens in self._tokens(prompts, sampling):
            for number, token in enumerate(tokens):
                # A shorter prompt may go on where the longest has filled the context.
                full = len(prompts[number]) + len(results[number]) >= self.model.config.max_position_embeddings
                finished[number] = finished[number] or full or token in self.stop_ids
                if not finished[number]:
                    results[number].append(token)
            if all(finished):
                break
        return results

    def stream(self, prompt: str, sampling: Sampling = Sampling()) -> Iterator[str]:
        """Pieces of text as they come; a character whose bytes are incomplete waits for the rest."""
        waiting: list[int] = []
        for (token,) in self._tokens([self.tokenizer.encode(prompt)], sampling):
            if token in self.stop_ids:
                break
            waiting.append(token)
            text = self.tokenizer.decode(waiting)
            if text and not text.endswith("\ufffd"):
                yield text
                waiting.clear()
        if waiting and (text := self.tokenizer.decode(waiting)):
            yield text

    @torch.no_grad()
    def _tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
        """One list of next tokens (one per prompt) after the other, `max_tokens` times."""
        if not prompts:
            return
        parameter = next(self.model.parameters())
        lengths = [len(prompt) for prompt in prompts]
        device, longest, shortest = parameter.device, max(lengths), min(lengths)
        if shortest == 0:
            raise UserError("an empty prompt has nothing to continue; give at least one character")
        limit = self.model.config.max_position_embeddings
        if longest >= limit:
            raise UserError(f"the prompt has {longest} tokens; the model's context is {limit}")
        steps = min(sampling.max_tokens, limit - shortest)
        cache = LatentCache(self.model.config, len(prompts), longest + steps, parameter.dtype, device)
        cache.skip = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        tokens = torch.tensor(padded, device=device)
        # Each sequence draws for itself: what is sampled for a prompt does not depend on its neighbours.
        generators = [torch.Generator(device=device).manual_seed(random.Random(f"{sampling.seed} {i}").getrandbits(63))
                      for i in range(len(prompts))]
        for _ in range(steps):
            for part in tokens.split(PREFILL_TOKENS, dim=1):
                slots = torch.arange(cache.length, cache.length + part.shape[1], device=device)
                positions = (slots[None] - cache.skip[:, None]).clamp(min=0)
                logits = self.model.decode(part, positions, cache)
                cache.advance(part.shape[1])
            tokens = choose(logits, sampling, generators)[:, None]
            yield tokens[:, 0].tolist()


def choose(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each sequence, int64 [B]; `generators`: one per sequence."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # The largest becomes 0 first, so that a tiny temperature cannot overflow.
    probabilities = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-6)).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # A token stays if the probability before it has not yet reached top_p; the most likely one always does.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered.masked_fill(dropped, 0.0))
    # An exponential race: with e ~ Exp(1) for every token, p / e is largest for token i with probability p_i.
    race = [torch.empty_like(row).exponential_(generator=generator)
            for row, generator in zip(probabilities, generators, strict=True)]
    return (probabilities / torch.stack(race).clamp_min(1e-30)).argmax(-1)
