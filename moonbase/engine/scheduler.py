"""Which tokens the next forward pass computes: continuous batching with chunked prefill and preemption.

Every pass takes one token of each sequence that is decoding, and fills up with parts of prompts to a fixed number of
tokens, so that a long prompt does not make the others wait. When blocks run out, the latest arrival gives up its own
and is computed again later; its prefix may still be in the cache then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from moonbase.engine.cache import BLOCK_TOKENS, BlockPool, block_keys
from moonbase.engine.sampling import Constraint, Sampling, Scores
from moonbase.engine.text import Piece, TextStream


@dataclass(eq=False)
class Request:
    """One sequence: its tokens, its blocks, and how far the cache knows it."""

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
    """Of the prompt, found there before it was ever computed."""
    preempted: bool = False
    row: int = -1
    """Its place among the running ones."""
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    published: int = 0
    draft: int | None = None
    """A guess of the token after the last, from multi-token prediction."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: Exception | None = None
    """What its constraint raised; only this request ends of it."""
    scores: Scores | None = None
    """Filled for a request that wants its prompt scored; it takes nothing from the cache."""
    inbox: deque[Piece] = field(default_factory=deque)
    """Pieces that nobody has fetched yet."""
    _counts: Tensor | None = field(default=None, repr=False)
    _seen: Tensor | None = field(default=None, repr=False)

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

    @property
    def reading(self) -> bool:
        """A token of the prompt comes next."""
        return self.computed < len(self.prompt_ids)

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.output_ids.append(token)
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    def counts(self, vocab_size: int, device: torch.device) -> Tensor:
        """How often each token was generated, fp32 [V]; kept up to date from the first call on."""
        if self._counts is None:
            ids = torch.tensor(self.output_ids, dtype=torch.int64, device=device)
            self._counts = torch.bincount(ids, minlength=vocab_size).float()
        return self._counts

    def seen(self, vocab_size: int, device: torch.device) -> Tensor:
        """Which tokens stand in prompt or reply, bool [V]; kept up to date from the first call on."""
        if self._seen is None:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(self.ids, dtype=torch.int64, device=device)] = True
        return self._seen


class Part(NamedTuple):
    """What a forward pass computes of one sequence: `count` of its known tokens, then the guess where there is one."""

    request: Request
    start: int
    count: int
    draft: int | None


class Scheduler:
    """Queues and blocks; computes nothing."""

    def __init__(
        self, pool: BlockPool, max_running: int, chunk_tokens: int, lag: int = 0, share_replies: bool = True
    ) -> None:
        """`lag`: so many tokens behind the last computed one a block has to end before it may be shared. 1 where
        multi-token prediction reads every token together with the one that follows it. `share_replies`: a generated
        token's latents are, bit for bit, those of the same token in a prompt."""
        assert chunk_tokens >= 1 <= max_running
        self.pool, self.max_running, self.chunk_tokens = pool, max_running, chunk_tokens
        self.lag, self.share_replies = lag, share_replies
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self._rows = list(range(max_running))

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a finished or cancelled request; its blocks are free at once."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._give_up(request)

    def plan(self) -> list[Part]:
        """The next pass. Empty only when nothing is there to be done."""
        self._admit()
        parts: list[Part] = []
        planned: set[int] = set()
        coming: set[bytes] = set()
        budget = self.chunk_tokens
        # Decoding first, one token each, then replies of those who gave way, then prompts, each in the order of arrival
        # and with what is left.
        for request in sorted(self.running, key=lambda request: (request.reading, request.pending > 1)):
            decoding = request.pending == 1 and not request.reading
            # Who has just given way has no row any more.
            if request.row < 0 or (not decoding and (budget <= 0 or self._shares(request, coming))):
                continue
            pending = request.pending
            count = 1 if decoding else min(pending, budget)
            if request.reading:
                count = min(count, len(request.prompt_ids) - request.computed)
            draft = request.draft
            if draft is not None and (count < pending or request.remaining <= 1):
                draft = None
            if self._reserve(request, request.computed + count + (draft is not None), planned):
                parts.append(Part(request, request.computed, count, draft))
                planned.add(id(request))
                budget -= count
                if count >= BLOCK_TOKENS:
                    # Block by block of what this pass will make known; someone else may need the same.
                    coming.update(request.keys[part // BLOCK_TOKENS] for part in
                                  range(request.computed, request.computed + count - BLOCK_TOKENS + 1, BLOCK_TOKENS)
                                  if part // BLOCK_TOKENS < len(request.keys))
        return parts

    def advance(self, request: Request, computed: int) -> None:
        """The cache now knows the first `computed` tokens; full blocks may be shared."""
        request.computed = computed
        full = max(0, min(computed - self.lag, self._shared_tokens(request))) // BLOCK_TOKENS
        if full > request.published and self.pool.prefix_cache:
            if len(request.keys) < full:
                request.keys = block_keys(request.ids[: full * BLOCK_TOKENS], request.keys)
            for number in range(request.published, full):
                self.pool.publish(request.blocks[number], request.keys[number])
            request.published = full

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            if self.pool.prefix_cache:
                request.keys = block_keys(request.ids, request.keys)
            matched = self.pool.match(self._shareable(request))
            needed = _blocks(len(request.ids) + 1) - len(matched)
            if needed > self.pool.available and self.running:
                self.pool.release(matched)
                return
            request.blocks, request.published, request.row = [], 0, self._rows.pop()
            self._take(request, matched)
            self.running.append(self.waiting.popleft())

    def _shareable(self, request: Request) -> list[bytes]:
        """Keys of the blocks that it may take from others from where it is. Its last token is always computed: its
        logits are wanted."""
        if request.scores is not None:
            return []
        last = min(len(request.ids) - 1, self._shared_tokens(request))
        return request.keys[request.computed // BLOCK_TOKENS : last // BLOCK_TOKENS]

    def _shared_tokens(self, request: Request) -> int:
        """So many of its tokens are the same to whoever else has them."""
        return len(request.ids) if self.share_replies else len(request.prompt_ids)

    def _take(self, request: Request, blocks: list[int]) -> None:
        request.blocks += blocks
        request.computed += len(blocks) * BLOCK_TOKENS
        request.published = len(request.blocks)
        if not request.preempted:
            request.cached_tokens += len(blocks) * BLOCK_TOKENS

    def _shares(self, request: Request, coming: set[bytes]) -> bool:
        """Take what has become known since it was admitted. True where its next block is being computed in this very
        pass: it waits for that, so that many who arrive together with the same beginning compute it once."""
        if not self.pool.prefix_cache or len(request.blocks) * BLOCK_TOKENS != request.computed:
            return False
        self._take(request, self.pool.match(self._shareable(request)))
        return any(key in coming for key in self._shareable(request)[:1])

    def _reserve(self, request: Request, tokens: int, planned: set[int]) -> bool:
        """Blocks for its first `tokens` tokens, at the cost of later arrivals; False where it had to give way."""
        while len(request.blocks) * BLOCK_TOKENS < tokens:
            block = self.pool.allocate()
            if block is not None:
                request.blocks.append(block)
                continue
            victim = next((other for other in reversed(self.running) if id(other) not in planned), request)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        request.preempted = True
        self._give_up(request)
        self.running.remove(request)
        self.waiting.appendleft(request)

    def _give_up(self, request: Request) -> None:
        self.pool.release(request.blocks)
        if request.row >= 0:
            self._rows.append(request.row)
            request.row = -1
        request.blocks, request.computed, request.published, request.draft = [], 0, 0, None


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
