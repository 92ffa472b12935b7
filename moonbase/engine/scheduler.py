"""Which tokens the next forward pass computes: continuous batching with chunked prefill and preemption.

Every pass takes one token of each sequence that is decoding, and fills up with parts of prompts to a fixed number of
tokens, so that a long prompt does not make the others wait. When blocks run out, the latest arrival gives up its own
and is computed again later; its prefix may still be in the cache then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from moonbase.engine.cache import BLOCK_TOKENS, BlockPool, block_keys
from moonbase.engine.sampling import Constraint, Sampling
from moonbase.engine.text import TextStream


@dataclass(eq=False)
class Sequence:
    """One request: its tokens, its blocks, and how far the cache knows it."""

    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    limit: int
    """Tokens that prompt and reply may have together."""
    constraint: Constraint | None = None
    text: TextStream | None = None
    output_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(init=False)
    """Prompt and reply."""
    computed: int = 0
    """Leading tokens whose latents are in the cache."""
    cached_tokens: int = 0
    """Of the prompt, found there at the first admission."""
    admitted: bool = False
    row: int = -1
    """Its place among the running ones."""
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    published: int = 0
    draft: int | None = None
    """A guess of the token after the last, from multi-token prediction."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        self.ids = [*self.prompt_ids, *self.output_ids]

    @property
    def remaining(self) -> int:
        """Tokens that it may still generate."""
        return min(self.sampling.max_tokens - len(self.output_ids), self.limit - len(self.ids))

    @property
    def pending(self) -> int:
        """Tokens that the cache does not know yet; 1 while decoding."""
        return len(self.ids) - self.computed

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.output_ids.append(token)


class Part(NamedTuple):
    """What a forward pass computes of one sequence: `count` of its known tokens, then the guess where there is one."""

    sequence: Sequence
    start: int
    count: int
    draft: int | None


class Scheduler:
    """Queues and blocks; knows nothing of tensors."""

    def __init__(self, pool: BlockPool, max_running: int, chunk_tokens: int) -> None:
        assert chunk_tokens >= 1 <= max_running
        self.pool, self.max_running, self.chunk_tokens = pool, max_running, chunk_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._rows = list(range(max_running))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence; its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._give_up(sequence)

    def plan(self) -> list[Part]:
        """The next pass. Empty only when nothing is there to be done."""
        self._admit()
        parts: list[Part] = []
        planned: set[int] = set()
        budget = self.chunk_tokens
        # Decoding first, one token each, then prompts in the order of arrival with what is left.
        decoding = [sequence for sequence in self.running if sequence.pending == 1]
        reading = [sequence for sequence in self.running if sequence.pending > 1]
        for sequence in [*decoding, *reading]:
            if sequence not in self.running or (budget <= 0 and sequence.pending > 1):
                continue
            count = 1 if sequence.pending == 1 else min(sequence.pending, budget)
            draft = sequence.draft if count == sequence.pending and sequence.remaining > 1 else None
            if self._reserve(sequence, sequence.computed + count + (draft is not None), planned):
                parts.append(Part(sequence, sequence.computed, count, draft))
                planned.add(id(sequence))
                budget -= count
        return parts

    def advance(self, sequence: Sequence, computed: int) -> None:
        """The cache now knows the first `computed` tokens; full blocks may be shared."""
        sequence.computed = computed
        full = computed // BLOCK_TOKENS
        if full > sequence.published and self.pool.prefix_cache:
            if len(sequence.keys) < full:
                sequence.keys = block_keys(sequence.ids[: full * BLOCK_TOKENS], sequence.keys)
            for number in range(sequence.published, full):
                self.pool.publish(sequence.blocks[number], sequence.keys[number])
            sequence.published = full

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            if self.pool.prefix_cache:
                sequence.keys = block_keys(sequence.ids, sequence.keys)
            # The last token is always computed: its logits are wanted.
            matched = self.pool.match(sequence.keys[: (len(sequence.ids) - 1) // BLOCK_TOKENS])
            needed = _blocks(len(sequence.ids) + 1) - len(matched)
            if needed > self.pool.available and self.running:
                self.pool.release(matched)
                return
            sequence.blocks, sequence.computed = matched, len(matched) * BLOCK_TOKENS
            sequence.published, sequence.row = len(matched), self._rows.pop()
            if not sequence.admitted:
                sequence.admitted, sequence.cached_tokens = True, sequence.computed
            self.running.append(self.waiting.popleft())

    def _reserve(self, sequence: Sequence, tokens: int, planned: set[int]) -> bool:
        """Blocks for its first `tokens` tokens, at the cost of later arrivals; False where it had to give way."""
        while len(sequence.blocks) < _blocks(tokens):
            block = self.pool.allocate()
            if block is not None:
                sequence.blocks.append(block)
                continue
            victim = next((other for other in reversed(self.running) if id(other) not in planned), sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._give_up(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _give_up(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        if sequence.row >= 0:
            self._rows.append(sequence.row)
            sequence.row = -1
        sequence.blocks, sequence.computed, sequence.published, sequence.draft = [], 0, 0, None


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
