"""CPU side of Newton-Schulz and of Muon's whole update: the kernel of cpu_kernels_muon.c, one task per matrix.

Shapes: a stack of matrices is [count, rows, columns].
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moonbase.ops import native

LARGEST_MATRIX = 1 << 17
"""Elements. Larger matrices leave the caches and are too few to divide by matrix: PyTorch's products divide each."""
_Polynomial = ctypes.c_float * 3


class _Stack(ctypes.Structure):
    """struct muon_stack of cpu_kernels_muon.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gradient", "momentum", "weight", "out", "polynomials")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "columns", "num_polynomials", "nesterov", "run")),
        *((name, ctypes.c_float) for name in ("mu", "keep", "rate", "safety", "smallest_norm")),
        ("square", ctypes.c_double),
    ]


class _Task(ctypes.Structure):
    """struct muon."""

    _fields_ = [("stacks", ctypes.c_void_p), ("num_stacks", ctypes.c_int64), ("num_threads", ctypes.c_int64),
                ("squares", ctypes.c_void_p)]


@dataclass(frozen=True)
class Iteration:
    """Newton-Schulz as the kernel is told of it."""

    polynomials: list[tuple[float, float, float]]
    run: int
    """Polynomials between two Gram matrices of X; 1 for the plain form."""
    safety: float
    """What the norm is multiplied by before the division."""
    smallest_norm: float


@dataclass
class Update:
    """One parameter's Muon step: momentum ← μ momentum + gradient, weight ← keep · weight − rate · orthogonal."""

    weight: Tensor
    momentum: Tensor
    gradient: Tensor
    iteration: Iteration
    mu: float
    nesterov: bool
    keep: float
    rate: float


def takes(*stacks: Tensor) -> bool:
    """Whether the kernel works on these: see `native.takes`; contiguous, rows multiples of `GRAIN`, no matrix large."""
    return native.takes(*stacks) and all(
        x.shape[1] % native.GRAIN == 0 and x.shape[1] * x.shape[2] <= LARGEST_MATRIX and x.is_contiguous()
        for x in stacks)


def orthogonalize_cpu(matrices: Tensor, iteration: Iteration, out: Tensor) -> Tensor:
    """Orthogonalise a stack into `out`, which may be the stack itself."""
    _run([_stack(matrices, iteration, out=out.data_ptr())], [iteration])
    return out


def update_(updates: Sequence[Update]) -> list[float]:
    """Every parameter's step, in place; all matrices of all parameters are divided among the threads together.

    Returns for each parameter the sum of squares of its orthogonalised matrices.
    """
    # The largest matrices first, so that the threads end together.
    order = sorted(range(len(updates)), key=lambda i: -_products(updates[i].weight))
    stacks = [
        _stack(update.gradient, update.iteration, momentum=update.momentum.data_ptr(), weight=update.weight.data_ptr(),
               mu=update.mu, nesterov=update.nesterov, keep=update.keep, rate=update.rate)
        for update in (updates[i] for i in order)]
    done = dict(zip(order, _run(stacks, [updates[i].iteration for i in order]), strict=True))
    return [done[i] for i in range(len(updates))]


def _products(stack: Tensor) -> int:
    """Multiplications of one matrix, up to a factor."""
    return stack.shape[1] * stack.shape[2] * min(stack.shape[1:])


def _stack(gradient: Tensor, iteration: Iteration, **fields: float | None) -> _Stack:
    count, rows, columns = gradient.shape
    return _Stack(
        gradient=gradient.data_ptr(), count=count, rows=rows, columns=columns, run=iteration.run,
        num_polynomials=len(iteration.polynomials), safety=iteration.safety, smallest_norm=iteration.smallest_norm,
        **fields)


def _run(stacks: list[_Stack], iterations: list[Iteration]) -> list[float]:
    tables = {}
    for stack, iteration in zip(stacks, iterations, strict=True):
        if id(iteration) not in tables:
            tables[id(iteration)] = (_Polynomial * len(iteration.polynomials))(
                *(_Polynomial(*polynomial) for polynomial in iteration.polynomials))
        stack.polynomials = ctypes.addressof(tables[id(iteration)])
    array = (_Stack * len(stacks))(*stacks)
    native.call("moonbase_muon", _Task(ctypes.addressof(array), len(stacks), torch.get_num_threads()))
    return [stack.square for stack in array]
