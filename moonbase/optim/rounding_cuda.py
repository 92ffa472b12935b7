"""The GPU form of `rounding`: one pass over memory for each write, random numbers made on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from moonbase.optim.rounding import AdamStep, Key, Kind

_BLOCK = 2048
_KINDS = {"nearest": 0, "stochastic": 1, "compensated": 2}


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _random_words(elements, key_low, key_high):
    x = elements.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32) + key_low.to(tl.uint32)
    return _mix(_mix(x) ^ key_high.to(tl.uint32))


@triton.jit
def _round(values, added):
    """To bf16 by adding to what is cut off; the cast that follows is exact."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = ((bits + added) & tl.full((), 0xFFFF0000, tl.uint32)).to(tl.float32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, values).to(tl.bfloat16)


@triton.jit
def _round_to_nearest(values):
    """Ties to even. Written out because Triton's interpreter cuts off where a GPU's cast rounds."""
    return _round(values, ((values.to(tl.uint32, bitcast=True) >> 16) & 1) + 0x7FFF)


@triton.jit(do_not_specialize=["key_low", "key_high", "first"])
def _write_kernel(weight, update, residual, factors, key_low, key_high, first, keep, rate, count, columns,
                  KIND: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < count
    old = tl.load(weight + elements, mask=inside, other=0.0)
    exact = old.to(tl.float32)
    if KIND == 2:
        old_residual = tl.load(residual + elements, mask=inside, other=0.0)
        exact += old_residual.to(tl.float32)
    if HAS_FACTORS:
        factor = tl.load(factors + elements // columns, mask=inside, other=1.0)
        exact *= factor
    else:
        exact *= keep
    if HAS_UPDATE:
        exact -= tl.load(update + elements, mask=inside, other=0.0).to(tl.float32) * rate
    if KIND == 1:
        new = _round(exact, _random_words(elements + first, key_low, key_high) >> 16)
    else:
        new = _round_to_nearest(exact)
    if HAS_FACTORS:
        inside = inside & (factor != 1.0)
    tl.store(weight + elements, new, mask=inside)
    if KIND == 2:
        tl.store(residual + elements, _round_to_nearest(exact - new.to(tl.float32)), mask=inside)


@triton.jit(do_not_specialize=["key_low", "key_high", "first"])
def _adamw_kernel(weight, gradient, mean, square, residual, corrections, key_low, key_high, first, keep, lr, beta1,
                  beta2, eps, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < count
    g = tl.load(gradient + elements, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + elements, mask=inside, other=0.0).to(tl.float32) * beta1 + g * (1 - beta1)
    v = tl.load(square + elements, mask=inside, other=0.0).to(tl.float32) * beta2 + g * g * (1 - beta2)
    direction = (m / tl.load(corrections)) / (tl.sqrt(v / tl.load(corrections + 1)) + eps)
    exact = tl.load(weight + elements, mask=inside, other=0.0).to(tl.float32)
    if KIND == 2:
        exact += tl.load(residual + elements, mask=inside, other=0.0).to(tl.float32)
    exact = exact * keep - direction * lr
    if KIND == 1:
        new = _round(exact, _random_words(elements + first, key_low, key_high) >> 16)
    else:
        new = _round_to_nearest(exact)
    tl.store(weight + elements, new, mask=inside)
    if KIND == 2:
        tl.store(residual + elements, _round_to_nearest(exact - new.to(tl.float32)), mask=inside)
    if KIND == 0:
        tl.store(mean + elements, _round_to_nearest(m), mask=inside)
        tl.store(square + elements, _round_to_nearest(v), mask=inside)
    else:
        words = _random_words(elements + first, key_high, key_low)
        tl.store(mean + elements, _round(m, words >> 16), mask=inside)
        tl.store(square + elements, _round(v, words & 0xFFFF), mask=inside)


def _signed(word: int) -> int:
    """The same 32 bits as a signed number: Triton passes larger ones as 64-bit and would compile once more for them."""
    return word - (1 << 32) if word >= 1 << 31 else word


def write_(weight: Tensor, update: Tensor | None, residual: Tensor | None, kind: Kind, key: Key, first: int,
           keep: float, rate: float, factors: Tensor | None, columns: int) -> None:
    """As `rounding.write_`, of flat tensors."""
    count = weight.numel()
    if count:
        _write_kernel[(triton.cdiv(count, _BLOCK),)](
            weight, weight if update is None else update, weight if residual is None else residual,
            weight if factors is None else factors, _signed(key.low), _signed(key.high), first, keep, rate, count,
            columns, KIND=_KINDS[kind], HAS_UPDATE=update is not None, HAS_FACTORS=factors is not None, BLOCK=_BLOCK)


def adamw_(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, residual: Tensor | None, step: AdamStep,
           kind: Kind, key: Key) -> None:
    """As `rounding.adamw_`, of flat tensors."""
    count = weight.numel()
    if count:
        _adamw_kernel[(triton.cdiv(count, _BLOCK),)](
            weight, gradient, mean, square, weight if residual is None else residual, step.corrections,
            _signed(key.low), _signed(key.high), 0, 1 - step.lr * step.weight_decay, step.lr, *step.betas, step.eps,
            count, KIND=_KINDS[kind], BLOCK=_BLOCK)
