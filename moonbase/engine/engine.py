"""Batched generation: requests join and leave between forward passes, and share a paged cache.

One pass computes the next token of everyone who is decoding and a part of the prompts that wait (`scheduler`), reads
and writes latents in blocks (`cache`), and draws each sequence's token by its own settings (`sampling`). Where a
checkpoint has a multi-token-prediction module, it guesses the token after the next; the pass that computes the next one
checks the guess for nothing, and the outcome is the same with and without it.

Everything that generates text goes through here: samples during training, the terminal, the server, evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from moonbase.engine.cache import BLOCK_TOKENS, BlockPool, LatentCache
from moonbase.engine.forward import Forward, chunk_tokens
from moonbase.engine.pass_cuda import CudaPass, workspace_bytes
from moonbase.engine.sampling import Chosen, Constraint, Sampling, Scores, choose, most_likely
from moonbase.engine.scheduler import Part, Request, Scheduler
from moonbase.engine.text import Piece, TextStream, TokenizerLike
from moonbase.errors import UserError
from moonbase.model import Transformer
from moonbase.report.machine import free_memory_bytes

MakeConstraint = Callable[[], Constraint]
FINISH_REASONS = ("stop", "length", "cancelled", "failed")


@dataclass
class Output:
    """A finished reply as tokens."""

    ids: list[int]
    """Without the end token."""
    logprobs: list[float]
    """One per id, of the model's own distribution."""
    top_logprobs: list[list[tuple[int, float]]] | None
    finish_reason: str
    """stop, length, cancelled or failed (its constraint raised)."""
    stop_reason: str | int | None
    """The stop string or token id that ended it."""
    cached_tokens: int
    """Prompt tokens whose latents were in the cache already."""
    end_logprob: float | None = None
    """Of the end token, where one was drawn: a model that learns from its replies learns when to stop."""


@dataclass
class EngineStatistics:
    """Counters since the start, and how things stand now."""

    waiting: int = 0
    running: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    prompt_tokens: int = 0
    """Of admitted requests; `cached_tokens` of them were not computed."""
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Guesses of multi-token prediction, and how many were right."""
    preemptions: int = 0
    passes: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))


class Engine:
    """`Engine(model, tokenizer).generate([...])`, or `submit`, `step` and `cancel` for those who drive it themselves.

    Not for several threads at once; `engine.service` puts it on a thread of its own.
    """

    def __init__(
        self, model: Transformer, tokenizer: TokenizerLike, stop_ids: Sequence[int] = (), *,
        cache_tokens: int | None = None, max_running: int = 64, chunk_tokens: int | None = None,
        prefix_cache: bool = True, speculate: bool = True, cuda_graphs: bool = True, least_cache_bytes: int = 0,
    ) -> None:
        """`stop_ids` beside the model's own; `cache_tokens`: room for so many tokens, None: for as many as can run
        together, or what fits; with `least_cache_bytes` at least for so much, where it fits;
        `chunk_tokens`: prompt tokens per forward pass, None: 512, and 16,384 where a GPU reads them in expanded form.
        Raises UserError where no cache fits."""
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = frozenset(stop_ids) | frozenset(model.config.eos_token_ids)
        self.prefix_cache, self.max_running, self.chunk_tokens = prefix_cache, max_running, chunk_tokens
        self.speculate = speculate and len(model.mtp) > 0
        self._wanted_tokens, self._least_bytes, self._cuda_graphs = cache_tokens, least_cache_bytes, cuda_graphs
        self._statistics = EngineStatistics()
        self._scheduler: Scheduler | None = None
        self._emitted: list[tuple[Request, Piece]] = []
        self._ended: list[Request] = []

    # --- whole replies ------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str], sampling: Sampling = Sampling()) -> list[str]:
        """Continuations of `prompts`, text each."""
        requests = [self.request(self.tokenizer.encode(prompt), sampling, number=number, text=True)
                    for number, prompt in enumerate(prompts)]
        self._finish_all(requests)
        return ["".join(piece.text for piece in request.inbox) for request in requests]

    def generate_ids(self, prompts: Sequence[Sequence[int]], sampling: Sampling = Sampling()) -> list[list[int]]:
        """Continuations as token ids. Raises UserError for an empty prompt or one that fills the context."""
        return [output.ids for output in self.complete(prompts, sampling)]

    def complete(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling] = Sampling(),
        constraint: MakeConstraint | None = None,
    ) -> list[Output]:
        """Replies with log-probabilities; `sampling`: one for all, or one each. A seed is made one's own by the
        prompt's place, so that equal prompts get different samples."""
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        requests = [self.request(ids, settings[number], constraint, number) for number, ids in enumerate(prompts)]
        self._finish_all(requests)
        return [_output(request) for request in requests]

    def score(self, prompt_ids: Sequence[int], top: int = 0) -> Scores:
        """Log-probability of every token of a text but the first, given those before it; with it the `top` most likely
        tokens of every place."""
        request = self.request(prompt_ids, Sampling(max_tokens=1, logprobs=top), score=True)
        self._finish_all([request])
        assert request.scores is not None
        return request.scores

    def stream(self, prompt: str, sampling: Sampling = Sampling()) -> Iterator[str]:
        """Pieces of text as they come; a character whose bytes are incomplete waits for the rest."""
        for piece in self.pieces(self.tokenizer.encode(prompt), sampling):
            if piece.text:
                yield piece.text

    def pieces(
        self, prompt_ids: Sequence[int], sampling: Sampling = Sampling(), constraint: MakeConstraint | None = None
    ) -> Iterator[Piece]:
        """One reply as it comes. Closing the iterator cancels it."""
        request = self.request(prompt_ids, sampling, constraint, text=True)
        self.submit(request)
        try:
            while request.inbox or request.finish_reason is None:
                while request.inbox:
                    yield request.inbox.popleft()
                if request.finish_reason is None:
                    self._pump()
            if request.error is not None:
                raise request.error
        finally:
            self.cancel(request)

    # --- step by step -------------------------------------------------------------------------------------------------

    def request(
        self, prompt_ids: Sequence[int], sampling: Sampling, constraint: MakeConstraint | None = None, number: int = 0,
        text: bool = False, score: bool = False,
    ) -> Request:
        """Something to `submit`. `number` tells requests of one seed apart; `text`: pieces carry text; `score`: the
        prompt's log-probabilities are wanted, with so many of the most likely tokens as `sampling.logprobs` says.
        Raises UserError for an empty prompt, one that fills the context or the cache, and ids outside the
        vocabulary."""
        ids, config = list(prompt_ids), self.model.config
        limit = min(config.max_position_embeddings, self.capacity)
        if not ids:
            raise UserError("an empty prompt has nothing to continue; give at least one character")
        if len(ids) >= limit:
            whose = "model's context" if limit == config.max_position_embeddings else "cache"
            raise UserError(f"the prompt has {len(ids)} tokens; the {whose} is {limit}")
        wrong = [id for id in (min(ids), max(ids), *sampling.logit_bias) if not 0 <= id < config.vocab_size]
        if wrong:
            raise UserError(f"token id {wrong[0]} is not in the model's vocabulary of {config.vocab_size}")
        base = random.getrandbits(63) if sampling.seed is None else sampling.seed
        stream = TextStream(self.tokenizer, sampling.stop) if text or sampling.stop else None
        return Request(ids, sampling, random.Random(f"{base} {number}").getrandbits(63), limit,
                       constraint() if constraint is not None else None, stream,
                       scores=Scores([], []) if score else None)

    def submit(self, request: Request) -> None:
        """Put a request into the queue."""
        self._ready().add(request)

    def cancel(self, request: Request) -> None:
        """End a request; its blocks are free at once. Does nothing to a finished one. Not within a pass."""
        if request.finish_reason is None and self._scheduler is not None:
            request.finish_reason = "cancelled"
            self._statistics.finished["cancelled"] += 1
            self._scheduler.remove(request)

    @property
    def busy(self) -> bool:
        """Something is waiting or running."""
        return self._scheduler is not None and bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        return self._ready().pool.num_blocks * BLOCK_TOKENS

    @property
    def statistics(self) -> EngineStatistics:
        """How things stand; the same object every time."""
        numbers, scheduler = self._statistics, self._ready()
        numbers.waiting, numbers.running = len(scheduler.waiting), len(scheduler.running)
        numbers.blocks_total, numbers.blocks_used = scheduler.pool.num_blocks, scheduler.pool.used
        numbers.preemptions = scheduler.preemptions
        return numbers

    def weights_changed(self) -> None:
        """Call after an update of the weights: what the cache knows is no longer true. Nothing may be running."""
        assert not self.busy
        if self._scheduler is not None:
            self._scheduler.pool.forget_all()
            self._forward.weights_changed()

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass; `fetch` gives what it produced, also where it raised."""
        parts = self._ready().plan()
        if parts:
            self._statistics.passes += 1
            try:
                self._pass(parts)
            finally:
                # Only now: until the end of the pass their blocks are read and written.
                for request in self._ended:
                    self._scheduler.remove(request)
                self._ended.clear()

    def fetch(self) -> list[tuple[Request, Piece]]:
        """Pieces since the last call, in order, each with whose it is."""
        emitted, self._emitted = self._emitted, []
        return emitted

    def _pass(self, parts: list[Part]) -> None:
        hidden_ND = self._forward.run(parts)
        rows, ends = [], []
        first_row = 0
        for part in parts:
            rows.append(first_row)
            ends.append(first_row + part.count - 1)
            if part.request.scores is not None:
                self._score(part, hidden_ND, first_row)
            first_row += part.count + (part.draft is not None)
            # Before anyone can finish: what a finished one leaves behind may be shared.
            self._scheduler.advance(part.request, part.start + part.count)
        drawing = [number for number, part in enumerate(parts) if part.request.pending == 0]
        self._draw(parts, drawing, hidden_ND, ends)
        if self.speculate:
            self._check(parts, drawing, hidden_ND, ends)
            self._guess(parts, rows, hidden_ND)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _ready(self) -> Scheduler:
        """Make the cache at first use: weights may still move before."""
        if self._scheduler is None:
            parameter = next(self.model.parameters())
            if parameter.is_cuda and CudaPass.fits(self.model):
                CudaPass.prepare(self.model)  # before the cache takes what is free
            num_blocks = self._num_blocks() + 1
            cache = LatentCache(self.model.config, num_blocks, parameter.dtype, parameter.device)
            limit = min(self.model.config.max_position_embeddings, (num_blocks - 1) * BLOCK_TOKENS)
            self._forward = Forward(self.model, cache, self.max_running, -(-limit // BLOCK_TOKENS), self._cuda_graphs)
            pool = BlockPool(num_blocks, self.prefix_cache)
            self._scheduler = Scheduler(pool, self.max_running, max(self._chunk_tokens(), self.max_running),
                                        int(self.speculate), share_replies=self._forward.one_form)
        return self._scheduler

    def _num_blocks(self) -> int:
        config, parameter = self.model.config, next(self.model.parameters())
        layers = config.num_hidden_layers + min(1, config.num_nextn_predict_layers)
        width = config.kv_lora_rank + config.qk_rope_head_dim
        per_token = layers * width * parameter.dtype.itemsize
        if parameter.is_cuda:
            # A GPU is ours, but for what a pass needs room for; of a computer's memory others want their part.
            free = free_gpu_bytes(parameter.device)
            workspace = workspace_bytes(config, self._chunk_tokens(), parameter.dtype.itemsize)
            fitting = int(free - min(max(0.2 * free, workspace), 0.5 * free)) // per_token
        else:
            free = free_memory_bytes() or 1 << 30
            fitting = int(free * 0.4) // per_token
        useful = max(self.max_running * config.max_position_embeddings, self._least_bytes // per_token)
        wanted = self._wanted_tokens or min(fitting, useful)
        if wanted > fitting:
            raise UserError(f"cache_tokens={wanted} needs {wanted * per_token / 1e9:,.1f} GB; "
                            f"{free / 1e9:,.1f} GB are free, so at most {fitting} fit")
        return max(1, wanted // BLOCK_TOKENS)

    def _chunk_tokens(self) -> int:
        return self.chunk_tokens or chunk_tokens(self.model)

    def _finish_all(self, requests: list[Request]) -> None:
        """Submit and run until all are done; their pieces are in their inboxes. Raises what a constraint raised."""
        # Objects that pile up make Python look through all of them again and again: tokens go onto one piece.
        whole = {request for request in requests if request.text is None}
        for request in requests:
            self.submit(request)
        try:
            while any(request.finish_reason is None for request in requests):
                self._pump(whole)
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise
        for request in requests:
            if request.error is not None:
                raise request.error

    def _pump(self, whole: Collection[Request] = ()) -> None:
        """One pass, each piece into its owner's inbox: several replies may be read side by side. Of those in `whole`
        nobody looks at single pieces."""
        self.step()
        for request, piece in self.fetch():
            if request in whole and request.inbox:
                request.inbox[0].extend(piece)
            else:
                request.inbox.append(piece)

    def _score(self, part: Part, hidden_ND: torch.Tensor, row: int) -> None:
        """Log-probabilities of the prompt tokens that follow those of `part`."""
        following = part.request.prompt_ids[part.start + 1 : part.start + part.count + 1]
        if not following:
            return
        rows = range(row, row + len(following))
        logprobs_NV = self._forward.logits(hidden_ND, list(rows)).log_softmax(-1)
        ids = torch.tensor(following, device=logprobs_NV.device)[:, None]
        # By place: who was preempted computes again what has been scored already.
        scores, top = part.request.scores, part.request.sampling.logprobs or 0
        scores.logprobs[part.start :] = logprobs_NV.gather(-1, ids).squeeze(-1).tolist()
        scores.top_logprobs[part.start :] = most_likely(logprobs_NV, top)

    def _draw(self, parts: list[Part], numbers: list[int], hidden_ND: torch.Tensor, rows: list[int]) -> None:
        """Choose the next token of the parts `numbers` from the hidden states at `rows` of all parts."""
        requests, places, masks = [], [], []
        for number in numbers:
            request = parts[number].request
            try:
                masks.append(request.constraint.mask(request.remaining) if request.constraint is not None else None)
            except Exception as error:
                self._fail(request, error)
                continue
            requests.append(request)
            places.append(rows[number])
        if not requests:
            return
        chosen = choose(self._forward.logits(hidden_ND, places), requests, masks)
        for place, request in enumerate(requests):
            try:
                pieces = self._accept(request, chosen, place)
            except Exception as error:
                self._fail(request, error)
                continue
            self._emitted += [(request, piece) for piece in pieces]

    def _accept(self, request: Request, chosen: Chosen, place: int) -> list[Piece]:
        """Append the token, or end the reply."""
        token, logprob, sampling = chosen.ids[place], chosen.logprobs[place], request.sampling
        own_end = token in self.stop_ids
        ends = token in sampling.stop_ids or (own_end and not sampling.ignore_eos)
        if not request.output_ids:
            self._statistics.prompt_tokens += len(request.prompt_ids)
            self._statistics.cached_tokens += request.cached_tokens
        reason, texts = None, []
        if ends:
            reason, request.stop_reason, piece = "stop", token, Piece(end_logprob=logprob)
        else:
            self._statistics.generated_tokens += 1
            request.append(token)
            piece = Piece([token], logprobs=[logprob])
            if (top := chosen.top_logprobs[place]) is not None:
                piece.top_logprobs = [top]
            # An end that is ignored says nothing, neither to a grammar nor to a reader.
            if not own_end:
                texts = self._say(request, token)
                if request.constraint is not None and request.constraint.done:
                    reason = "stop"
            if request.text is not None and request.text.stopped is not None:
                reason, request.stop_reason = "stop", request.text.stopped
            if reason is None and request.remaining <= 0:
                reason = "length"
        if reason == "stop" and request.constraint is not None and request.constraint.cut_short:
            reason = "length"
        if reason is not None:
            texts += request.text.flush() if request.text is not None else []
            piece.finish_reason, piece.stop_reason = reason, request.stop_reason
            piece.cached_tokens = request.cached_tokens
            self._end(request, reason)
        if not texts:
            return [piece]
        *earlier, (piece.text, piece.special) = texts
        return [*[Piece(text=text, special=special) for text, special in earlier], piece]

    def _say(self, request: Request, token: int) -> list[tuple[str, bool]]:
        """Tell the constraint; the text that is certain now."""
        search = True
        if request.constraint is not None:
            search = not request.constraint.ignores_stop
            request.constraint.accept(token)
        return request.text.push(token, search) if request.text is not None else []

    def _fail(self, request: Request, error: Exception) -> None:
        """A constraint raised: its request ends, the others go on."""
        request.error = error
        self._end(request, "failed")
        self._emitted.append((request, Piece(finish_reason="failed")))

    def _end(self, request: Request, reason: str) -> None:
        """Within a pass."""
        request.finish_reason = reason
        self._statistics.finished[reason] += 1
        self._ended.append(request)

    def _check(self, parts: list[Part], drawing: list[int], hidden_ND: torch.Tensor, ends: list[int]) -> None:
        """A guess that came true has been computed already: its row tells the token after it."""
        right = [number for number in drawing if parts[number].draft is not None
                 and parts[number].request.finish_reason is None
                 and parts[number].request.ids[-1] == parts[number].draft]
        for number in right:
            self._scheduler.advance(parts[number].request, parts[number].request.computed + 1)
        self._statistics.drafted_tokens += sum(part.draft is not None for part in parts)
        self._statistics.accepted_tokens += len(right)
        self._draw(parts, right, hidden_ND, [end + 1 for end in ends])

    def _guess(self, parts: list[Part], rows: list[int], hidden_ND: torch.Tensor) -> None:
        """Let the multi-token-prediction module read what was computed, and guess one token on.

        Also of those that have just finished: what they leave in the cache is for whoever begins alike.
        """
        reads, first_rows = [], []
        for part, row in zip(parts, rows, strict=True):
            request = part.request
            # Every token is read together with the one that follows it, so far as that is known.
            count = min(request.computed, len(request.ids) - 1) - part.start
            if count > 0 and request.error is None:
                reads.append(Part(request, part.start, count, None))
                first_rows.append(row)
        if not reads:
            return
        guesses = self._forward.further(reads, hidden_ND, first_rows).argmax(-1).tolist()
        for read, guess in zip(reads, guesses, strict=True):
            request = read.request
            request.draft = guess if request.pending == 1 and request.output_ids else None


def free_gpu_bytes(device: torch.device) -> int:
    """What the driver still has, and what PyTorch holds without using it."""
    free = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _output(request: Request) -> Output:
    """All pieces of a finished request together."""
    output = Output([], [], None, "cancelled", None, 0)
    for piece in request.inbox:
        output.ids += piece.ids
        output.logprobs += piece.logprobs
        if piece.top_logprobs is not None:
            output.top_logprobs = [*(output.top_logprobs or []), *piece.top_logprobs]
        if piece.finish_reason is not None:
            output.finish_reason, output.stop_reason = piece.finish_reason, piece.stop_reason
            output.cached_tokens, output.end_logprob = piece.cached_tokens, piece.end_logprob
    return output
