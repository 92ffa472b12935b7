"""Weights in bf16 with no fp32 masters behind them: how an update smaller than a weight's last bit is not lost.

A bf16 number has 8 significant bits, so its neighbours are 0.4 to 0.8 % apart, while a training step moves a weight by
0.01 to 1 %: rounded to the nearest, most steps change nothing. Two ways out, both computed in fp32 and rounded once:

    stochastic   w ← up or down with the probability that makes the expectation exact (Gupta et al. 2015, §3)
    compensated  w ← nearest(s), c ← nearest(s − w) with s = w + c + step: c is a second bf16 number that remembers what
                 w could not hold (Kahan 1965); together 16 bits or more. The only one of the two that costs memory.

`nearest` is what happens without either, for comparison.

The random numbers are no stream: a hash of (seed, step, parameter's name, purpose; element), so a resumed run draws the
same ones, whatever order or pieces the parameters are written in.

Shapes: any; pieces of a parameter are contiguous and say with `first` where in it they start.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["nearest", "stochastic", "compensated"]

_PIECE = 1 << 20
"""Elements that the readable form takes at once: its temporaries are 64-bit."""
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Key:
    """Two 32-bit words that name one use of random numbers."""

    low: int
    high: int

    @classmethod
    def of(cls, *parts: object) -> Key:
        """The key of what is written once: seed, step, name, purpose."""
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def random_words(key: Key, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform 32-bit words of the elements first ... first + count − 1 under `key`, as int64.

    Two rounds of a 32-bit mixing function (xor-shift and multiply; the multipliers of "lowbias32", which a search for
    the least bias found), with one word of the key before each.
    """
    assert first + count <= 1 << 32, "the elements of one parameter are counted in 32 bits"
    x = torch.arange(first, first + count, dtype=torch.int64, device=device)
    x = _mix((x * 0x9E3779B9 + key.low) & _WORD)
    return _mix(x ^ key.high)


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def round_stochastically(values: Tensor, random_16: Tensor) -> Tensor:
    """fp32 to bf16: towards zero, or away from it where the 16 bits that are cut off exceed what `random_16` (integers
    in [0, 2^16)) leaves of 2^16. Exact in expectation; numbers that bf16 holds stay; infinities and NaN too."""
    bits = values.view(torch.int32).to(torch.int64)
    rounded = ((bits + random_16) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


@torch.no_grad()
def write_(weight: Tensor, update: Tensor | None, kind: Kind, key: Key, *, first: int = 0, keep: float = 1.0,
           rate: float = 0.0, factors: Tensor | None = None, residual: Tensor | None = None) -> None:
    """weight ← keep · weight − rate · update, or row i times factors[i], rounded once as `kind` says; in place.

    weight: bf16, contiguous. update: of its shape, any floating dtype. factors: fp32 [rows] of a matrix; where one is
    exactly 1 no bit changes. residual: bf16 of the weight's shape, "compensated" alone.
    """
    assert weight.dtype == torch.bfloat16 and weight.is_contiguous()
    assert (residual is not None) == (kind == "compensated") and (update is None or update.is_contiguous())
    flat = [None if x is None else x.view(-1) for x in (weight, update, residual)]
    if weight.is_cuda:
        from moonbase.optim import rounding_cuda

        rounding_cuda.write_(*flat, kind, key, first, keep, rate, factors, weight.shape[-1])
        return
    for start in range(0, weight.numel(), _PIECE):
        part = slice(start, start + _PIECE)
        _write_piece(*(None if x is None else x[part] for x in flat), kind, key, first + start, keep, rate,
                     None if factors is None else _of_elements(factors, start, weight))


def _of_elements(factors: Tensor, start: int, weight: Tensor) -> Tensor:
    elements = torch.arange(start, min(start + _PIECE, weight.numel()), device=weight.device)
    return factors[elements // weight.shape[-1]]


def _write_piece(weight: Tensor, update: Tensor | None, residual: Tensor | None, kind: Kind, key: Key, first: int,
                 keep: float, rate: float, factors: Tensor | None) -> None:
    exact = weight.float()
    if residual is not None:
        exact += residual
    exact *= keep if factors is None else factors
    if update is not None:
        exact -= update.float() * rate
    rounded = exact.bfloat16()
    if kind == "stochastic":
        rounded = round_stochastically(exact, random_words(key, first, len(weight), weight.device) >> 16)
    left = (exact - rounded.float()).bfloat16() if residual is not None else None
    if factors is not None:
        # w + c may need more than fp32's 24 bits: what is not to change is not written.
        rounded = torch.where(factors == 1, weight, rounded)
        left = None if left is None else torch.where(factors == 1, residual, left)
    weight.copy_(rounded)
    if left is not None:
        residual.copy_(left)


@dataclass(frozen=True)
class AdamStep:
    """One step's numbers of AdamW. corrections: fp32 [2] on the parameter's device, 1 − β₁ᵗ and 1 − β₂ᵗ."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    corrections: Tensor


@torch.no_grad()
def adamw_(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: AdamStep, kind: Kind, key: Key,
           residual: Tensor | None = None) -> None:
    """AdamW (Loshchilov and Hutter 2019, Algorithm 2) of bf16 weights with bf16 moments, everything else in fp32.

    The moments are rounded stochastically beside compensated weights too: a mean that moves by 1 − β₂ of the way to
    each new square stands still in bf16 from β₂ = 0.998 on. Two numbers of 16 bits that cost no memory mend that.
    """
    assert weight.dtype == mean.dtype == square.dtype == torch.bfloat16
    assert (residual is not None) == (kind == "compensated")
    flat = [None if x is None else x.view(-1) for x in (weight, gradient.contiguous(), mean, square, residual)]
    if weight.is_cuda:
        from moonbase.optim import rounding_cuda

        rounding_cuda.adamw_(*flat, step, kind, key)
        return
    for start in range(0, weight.numel(), _PIECE):
        part = slice(start, start + _PIECE)
        _adamw_piece(*(None if x is None else x[part] for x in flat), step, kind, key, start)


def _adamw_piece(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, residual: Tensor | None,
                 step: AdamStep, kind: Kind, key: Key, first: int) -> None:
    beta1, beta2 = step.betas
    gradient = gradient.float()
    new_mean = mean.float() * beta1 + gradient * (1 - beta1)
    new_square = square.float() * beta2 + gradient * gradient * (1 - beta2)
    direction = (new_mean / step.corrections[0]) / ((new_square / step.corrections[1]).sqrt() + step.eps)
    _write_piece(weight, direction, residual, kind, key, first, 1 - step.lr * step.weight_decay, step.lr, None)
    if kind == "nearest":
        mean.copy_(new_mean)
        square.copy_(new_square)
    else:
        words = random_words(Key(key.high, key.low), first, len(weight), weight.device)
        mean.copy_(round_stochastically(new_mean, words >> 16))
        square.copy_(round_stochastically(new_square, words & 0xFFFF))
