"""How the next token is chosen, for a batch whose sequences each have settings of their own.

One uniform number per token decides, made from the request's seed and the token's place alone. So a sample depends
neither on the neighbours in the batch, nor on preemption, nor on speculation, and the same seed gives the same text.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from moonbase.errors import UserError

MAX_LOGPROBS = 100


class Constraint(Protocol):
    """What may follow, decided token by token; one object per sequence."""

    done: bool
    """Nothing more may follow."""
    cut_short: bool
    """The budget forced the ending: what was said is whole, and shorter than the model meant."""
    ignores_stop: bool
    """Something is being written that must not be cut: stop strings do not count now."""

    def mask(self, remaining: int) -> np.ndarray | None:
        """Allowed tokens, bool [V]; None allows all. `remaining`: tokens left of the request's budget."""
        ...

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        ...


@dataclass(frozen=True)
class Sampling:
    """What a request asks for. Raises UserError where a value is out of range."""

    max_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of that probability."""
    top_k: int = 0
    """Keep the k most likely; 0 keeps all."""
    min_p: float = 0.0
    """Keep what is at least this share of the most likely token's probability."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that was generated before (OpenAI)."""
    frequency_penalty: float = 0.0
    """The same, times how often it was."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of the prompt and the reply (CTRL, §4.1)."""
    seed: int | None = 0
    """None draws a seed for the request."""
    logprobs: int | None = None
    """Also return the k most likely tokens of every place with their log-probabilities; None returns none."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply and are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the reply, beside the model's own."""
    ignore_eos: bool = False
    """Go on after the model's own end tokens (for measurements)."""

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all) or more")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _check("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 2, "between -2 and 2")
        _check("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 2, "between -2 and 2")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "more than 0")
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0 <= self.logprobs <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias[{token}]", bias, abs(bias) <= 100, "between -100 and 100")
        _check("stop", self.stop, all(self.stop), "texts of at least one character")

    @property
    def plain(self) -> bool:
        """The logits are taken as they are."""
        return not (self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias)


def _check(name: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise UserError(f"{name}={value!r} must be {wanted}")


class Draw(Protocol):
    """What the sampler needs to know of a sequence."""

    sampling: Sampling
    seed: int
    output_ids: Sequence[int]

    def counts(self, vocab_size: int, device: torch.device) -> Tensor:
        """How often each token was generated, fp32 [V]."""
        ...

    def seen(self, vocab_size: int, device: torch.device) -> Tensor:
        """Which tokens stand in prompt or reply, bool [V]."""
        ...


@dataclass
class Chosen:
    """The next token of every sequence of a batch."""

    ids: list[int]
    logprobs: list[float]
    """Of the chosen token, under the model's own distribution (temperature 1, nothing cut off)."""
    top_logprobs: list[list[tuple[int, float]] | None]


class Scores(NamedTuple):
    """How likely the tokens of a text are, all but the first, each given those before it."""

    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    """The most likely (id, log-probability) of every place, so many as were asked for."""


def uniform(seed: int, place: int) -> float:
    """A number in (0, 1) that depends on both arguments alone (SplitMix64)."""
    mask = (1 << 64) - 1
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & mask
    return (((z ^ (z >> 31)) >> 11) + 0.5) / (1 << 53)


def choose(logits_BV: Tensor, draws: Sequence[Draw], masks: Sequence[np.ndarray | None] = ()) -> Chosen:
    """The next token of each sequence; `logits_BV` fp32, one row per entry of `draws`. `masks`: allowed tokens of each,
    bool [V], None for all; rows that share a mask share the object."""
    own_BV = logits_BV
    logits_BV = _allowed(_adjusted(logits_BV, draws), masks)
    greedy_B = logits_BV.argmax(-1)
    if any(draw.sampling.temperature > 0 for draw in draws):
        sampled_B = _sampled(logits_BV, draws)
        warm = torch.tensor([draw.sampling.temperature > 0 for draw in draws], device=logits_BV.device)
        greedy_B = torch.where(warm, sampled_B, greedy_B)
    log_total_B = own_BV.logsumexp(-1)
    chosen_B = own_BV.gather(-1, greedy_B[:, None]).squeeze(-1) - log_total_B
    most = max((draw.sampling.logprobs or 0 for draw in draws), default=0)
    tops: list[list[tuple[int, float]] | None] = [None] * len(draws)
    if most:
        rows = most_likely(own_BV - log_total_B[:, None], most)
        tops = [row[: draw.sampling.logprobs] if draw.sampling.logprobs else None
                for draw, row in zip(draws, rows, strict=True)]
    for number, draw in enumerate(draws):
        if draw.sampling.logprobs == 0:
            tops[number] = []
    # Together, since each copy to the host waits for the device; fp64 holds either exactly.
    ids, logprobs = torch.stack([greedy_B.double(), chosen_B.double()]).tolist()
    return Chosen([int(id) for id in ids], logprobs, tops)


def most_likely(logprobs_BV: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """(id, log-probability) of the `count` most likely tokens of each row, the most likely first."""
    values, ids = logprobs_BV.topk(min(count, logprobs_BV.shape[-1]), dim=-1)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def _adjusted(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Penalties and biases applied; the same tensor where nobody asks for any."""
    if all(draw.sampling.plain for draw in draws):
        return logits_BV
    logits_BV, size, device = logits_BV.clone(), logits_BV.shape[-1], logits_BV.device
    for row_V, draw in zip(logits_BV, draws, strict=True):
        sampling = draw.sampling
        if (penalty := sampling.repetition_penalty) != 1:
            punished = torch.where(row_V > 0, row_V / penalty, row_V * penalty)
            row_V.copy_(torch.where(draw.seen(size, device), punished, row_V))
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = draw.counts(size, device)
            row_V -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=device)
            row_V[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=device)
    return logits_BV


def _allowed(logits_BV: Tensor, masks: Sequence[np.ndarray | None]) -> Tensor:
    """-inf for what a mask forbids; the same tensor where there is none. One pass for all rows of one mask."""
    rows_of: dict[int, list[int]] = {}
    for row, mask in enumerate(masks):
        if mask is not None:
            rows_of.setdefault(id(mask), []).append(row)
    own_BV = logits_BV
    for rows in rows_of.values():
        forbidden_V = torch.from_numpy(~masks[rows[0]]).to(logits_BV.device)
        if len(rows) == len(logits_BV):
            return logits_BV.masked_fill(forbidden_V, -math.inf)
        logits_BV = logits_BV.clone() if logits_BV is own_BV else logits_BV
        logits_BV[rows] = logits_BV[rows].masked_fill(forbidden_V, -math.inf)
    return logits_BV


def _sampled(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One token per row by inverting the cumulative distribution at the row's uniform number; int64 [B]."""
    device = logits_BV.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    # A greedy row's draw is thrown away; temperature 1 keeps it finite.
    heat = column([max(draw.sampling.temperature, 1e-6) if draw.sampling.temperature else 1.0 for draw in draws])
    # The largest becomes 0 first, so that a tiny temperature cannot overflow.
    probabilities = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / heat).softmax(-1)
    if any(draw.sampling.min_p for draw in draws):
        least = column([draw.sampling.min_p for draw in draws]) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if any(draw.sampling.top_k or draw.sampling.top_p < 1 for draw in draws):
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(ordered.shape[-1], device=device)
        ks = torch.tensor([draw.sampling.top_k or ordered.shape[-1] for draw in draws], device=device)[:, None]
        ordered = ordered.masked_fill(ranks >= ks, 0.0)
        # A token stays if the probability before it has not yet reached top_p; the most likely one always does.
        before = ordered.cumsum(-1) - ordered
        share = column([draw.sampling.top_p for draw in draws]) * ordered.sum(-1, keepdim=True)
        ordered = ordered.masked_fill((before >= share) & (ranks > 0), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    cumulative = probabilities.double().cumsum(-1)
    place = torch.tensor([[uniform(draw.seed, len(draw.output_ids))] for draw in draws], dtype=torch.float64,
                         device=device)
    found = torch.searchsorted(cumulative, place * cumulative[:, -1:]).squeeze(-1)
    return found.clamp_max(logits_BV.shape[-1] - 1)
