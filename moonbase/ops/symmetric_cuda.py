"""Batched matrix products for orthogonalisation on a GPU: symmetric ones at half the work, sums without a copy.

Newton-Schulz multiplies matrices by themselves. What comes out is symmetric: tiles above the diagonal are those below
it, turned over, and need not be computed. And it adds to a product a matrix that is still needed, which PyTorch's
baddbmm does by copying it to the result first: reading and writing every matrix once more. Loaded only on a GPU.

Shapes: N matrices; a product of [M, K] and [K, O].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_TILE, _STEP = 128, 64
"""Rows and columns of what a program computes, and how far along K it goes at a time: what two programs on one
processor have shared memory for, so that one multiplies while the other begins or ends."""


@triton.jit(do_not_specialize=["alpha", "beta"])
def _product_kernel(
    a, b, added, out, alpha, beta, depth, a_rows, b_rows, out_rows, tiles,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, SYMMETRIC: tl.constexpr, ADDED: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    tile, matrix = tl.program_id(0), tl.program_id(1)
    if SYMMETRIC:
        # Row by row through the triangle. The root may be off in its last digit.
        i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, tl.where(i * (i + 1) // 2 > tile, i - 1, i))
        j = tile - i * (i + 1) // 2
    else:
        i, j = tile // tiles, tile % tiles
    total = tl.zeros([TILE, TILE], tl.float32)
    for k in range(0, depth, STEP):
        if A_TURNED:
            left = a.load([matrix * a_rows + k, i * TILE]).T
        else:
            left = a.load([matrix * a_rows + i * TILE, k])
        if B_TURNED:
            right = b.load([matrix * b_rows + j * TILE, k]).T
        else:
            right = b.load([matrix * b_rows + k, j * TILE])
        total = tl.dot(left, right, total, input_precision="ieee")
    total *= alpha
    if ADDED:
        total += added.load([matrix * out_rows + i * TILE, j * TILE]).to(tl.float32) * beta
    result = total.to(out.dtype)
    out.store([matrix * out_rows + i * TILE, j * TILE], result)
    if SYMMETRIC:
        if i != j:
            out.store([matrix * out_rows + j * TILE, i * TILE], result.T)


def takes(x: Tensor) -> bool:
    """Whether the products that orthogonalise x [N, rows, columns] are for this kernel: bf16 on a GPU with a bulk copy
    engine, in whole tiles."""
    return (x.is_cuda and x.dtype == torch.bfloat16 and x.is_contiguous() and 0 < len(x) < 1 << 16
            and x.shape[1] % _TILE == 0 and x.shape[2] % _TILE == 0
            and torch.cuda.get_device_capability(x.device) >= (9, 0))


def product(
    a_NMK: Tensor, b_NKO: Tensor, added_NMO: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0,
    out: Tensor | None = None, symmetric: bool = False,
) -> Tensor:
    """alpha · a · b + beta · added, summed in fp32 and rounded once.

    a and b are contiguous or the transposes of what is, `added` and `out` contiguous; `out` may not be an operand.
    symmetric: the result is known to be, so only tiles on and below its diagonal are computed.
    """
    (count, rows, depth), width = a_NMK.shape, b_NKO.shape[2]
    if out is None:
        out = torch.empty(count, rows, width, dtype=a_NMK.dtype, device=a_NMK.device)
    a_turned, b_turned = a_NMK.stride(2) != 1, b_NKO.stride(2) != 1
    a, b = a_NMK.mT if a_turned else a_NMK, b_NKO.mT if b_turned else b_NKO
    down, across = rows // _TILE, width // _TILE
    assert not symmetric or down == across
    result = _described(out, _TILE, _TILE)
    _product_kernel[(down * (down + 1) // 2 if symmetric else down * across, count)](
        _described(a, *((_STEP, _TILE) if a_turned else (_TILE, _STEP))),
        _described(b, *((_TILE, _STEP) if b_turned else (_STEP, _TILE))),
        result if added_NMO is None else _described(added_NMO, _TILE, _TILE), result, alpha, beta, depth, a.shape[1],
        b.shape[1], rows, across, A_TURNED=a_turned, B_TURNED=b_turned, SYMMETRIC=symmetric,
        ADDED=added_NMO is not None, TILE=_TILE, STEP=_STEP, num_warps=4, num_stages=3)
    return out


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """All matrices below one another, to be copied in blocks."""
    assert x.is_contiguous()
    return TensorDescriptor(x, [x.shape[0] * x.shape[1], x.shape[2]], [x.shape[2], 1], [rows, columns])
