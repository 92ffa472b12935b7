"""Decoding with multi-head latent attention over a paged cache, beside torch's matrix products over a dense one.

All heads of a sequence read the same rows of C + R numbers, so with 64 heads the time is that of reading the latents
and with 128 about that of the arithmetic: the roof is whichever takes longer. Pages of a sequence lie anywhere in the
store. Stores take turns, so that no cache holds what is read; both sides are recorded and timed in turns, in runs of a
few milliseconds each, because a GPU at its power limit slows: after a second of load by up to a fifth. Before anything
is timed, the first and last sequences' results are compared with fp64.

The peer is favoured: its cache is dense, so that it gathers nothing. It is what stock parts give: two batched products
and a softmax between them.

Shapes: B sequences with one new token each, S tokens of context, H heads, C latent, R rope dims, X = C + R, P pages of
Z tokens, M = S / Z pages a sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moonbase.bench.rows import absent_peers, findings, kernel_row, say
from moonbase.bench.timing import Cost, Roofs, kernel_seconds, measured_roofs, recorded
from moonbase.config import ModelConfig
from moonbase.errors import UserError
from moonbase.ops.latent_attention import latent_attention
from moonbase.recipe import load_recipe

_GPU_SHAPES = ((32, 4096), (16, 32768), (4, 131072), (128, 4096))
_CPU_SHAPES = ((1, 4096), (16, 1024), (16, 4096))
_PAGE = 16
"""Tokens of a page, as the engine has them."""
_MORE_HEADS = 128
"""DeepSeek-V3 has as many: there the arithmetic is the limit."""
_SPREAD = {"cuda": 2**30, "cpu": 2**26}
"""Bytes of all stores together at least: many times what the caches hold."""
_RUN_BYTES = {"cuda": 8 * 2**30, "cpu": 2**26}
"""Bytes that a run of a few milliseconds reads."""
_TOLERANCE = {"ours": 1e-2, "peer": 5e-2}
"""Relative error against fp64; the peer's logits are rounded to bf16 on a GPU, which alone makes it 1.3e-2."""
_ABSENT = {"flash_mla": "FlashMLA", "flash_attn_interface": "FlashAttention-3"}
_METHOD = ("Sequences x tokens of context. Medians of 15 runs, ours and the peer in turns, each of a few milliseconds "
           "from rest (sustained load slows a GPU at its power limit: this attention by 6 to 22%); stores take turns, "
           "so no cache holds them; the peer's cache is dense; outputs checked against fp64 before timing. Contexts "
           "are cut into as many parts as give every processor one; an engine for more than 32 sequences cuts them "
           "into four, for the sake of a sequence alone.")

Attend = Callable[[Tensor, Tensor], Tensor]
"""From queries [B, H, X] and a store [P, Z, X] to what is read, [B, H, C]."""


class Shape(NamedTuple):
    """What one call works on."""

    batch: int
    context: int
    heads: int
    rank: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.batch} x {_short(self.context)}"

    def cost(self, itemsize: int) -> Cost:
        """Scores over X numbers and sums over C, for every head; every latent read once."""
        pairs = self.batch * self.context
        return Cost(2.0 * self.heads * pairs * (self.width + self.rank), 1.0 * pairs * self.width * itemsize)


def measure(preset: str, peer: str | None) -> dict[str, Any]:
    """A row per batch and context, for the preset's heads and, where that is K2's width on a GPU, for 128 too."""
    config = load_recipe(preset).model
    if not config.kv_lora_rank:
        raise UserError(f"bench mla: {preset} has no latent attention (kv_lora_rank); take another preset")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    roofs = measured_roofs()
    rows = []
    for heads in _heads(config, device):
        for batch, context in _GPU_SHAPES if device.type == "cuda" else _CPU_SHAPES:
            shape = Shape(batch, context, heads, config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim)
            rows.append(_row(shape, config.softmax_scale, device, peer, roofs))
            say(rows[-1])
    return findings("Decoding with multi-head latent attention", rows, roofs, _METHOD, absent_peers(_ABSENT))


def _heads(config: ModelConfig, device: torch.device) -> list[int]:
    own = config.num_attention_heads
    return [own, _MORE_HEADS] if device.type == "cuda" and own == _MORE_HEADS // 2 else [own]


def _row(shape: Shape, scale: float, device: torch.device, peer: str | None, roofs: Roofs) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = shape.batch * shape.context * shape.width * dtype.itemsize
    pages = shape.context // _PAGE
    count = max(2, math.ceil(_SPREAD[device.type] / size))
    stores = [torch.randn(shape.batch * pages, _PAGE, shape.width, device=device, dtype=dtype) for _ in range(count)]
    query_BHX = torch.randn(shape.batch, shape.heads, shape.width, device=device, dtype=dtype)
    tables_BM = torch.randperm(shape.batch * pages, device=device).int().view(shape.batch, pages)
    name, ours = _ours(query_BHX, stores[0], tables_BM, shape, scale)
    _check(ours(query_BHX, stores[0]), query_BHX, lambda number: stores[0][tables_BM[number].long()], shape, scale,
           _TOLERANCE["ours"])
    sides = {"ours": ours}
    if peer:
        sides["peer"] = _torch(shape, scale)
        _check(sides["peer"](query_BHX, stores[0]), query_BHX,
               lambda number: stores[0].view(shape.batch, -1, shape.width)[number], shape, scale,
               _TOLERANCE["peer"])
    calls = max(count, math.ceil(_RUN_BYTES[device.type] / size))
    works = {side: recorded([functools.partial(attend, query_BHX, stores[number % count]) for number in range(calls)],
                            device.type == "cuda") for side, attend in sides.items()}
    times = {side: value / calls for side, value in kernel_seconds(works, rounds=15, warmup=3).items()}
    return kernel_row(f"{shape.name} tokens, {shape.heads} heads x {shape.width}", f"{shape.name}, {shape.heads} heads",
                      shape.cost(dtype.itemsize), times, roofs, ours_name=name,
                      peer_name="torch matmul, dense cache")


def _ours(query_BHX: Tensor, store_PZX: Tensor, tables_BM: Tensor, shape: Shape, scale: float) -> tuple[str, Attend]:
    """What runs here, and its name."""
    device = query_BHX.device
    where = (tables_BM, torch.arange(shape.batch, device=device, dtype=torch.int32),
             torch.full((shape.batch,), shape.context - 1, device=device, dtype=torch.int32))
    name, attend = "C kernel or torch, CPU", latent_attention
    if device.type == "cuda":
        from moonbase.ops import latent_attention_hopper as hopper

        name = "Triton"
        if hopper.fits(query_BHX, store_PZX, shape.rank) and hopper.available():
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            few = max(1, processors // (shape.batch * math.ceil(shape.heads / hopper.HEADS)))
            name, attend = "CUDA C++ for Hopper", functools.partial(hopper.latent_attention_hopper, few=few)
    return name, lambda query, store: attend(query, store, *where, scale, shape.rank)


def _torch(shape: Shape, scale: float) -> Attend:
    """The store taken as a dense cache [B, S, X]; logits rounded as the queries are, their softmax in fp32."""

    def attend(query_BHX: Tensor, store_PZX: Tensor) -> Tensor:
        cache_BSX = store_PZX.view(shape.batch, shape.context, shape.width)
        logits_BHS = (query_BHX @ cache_BSX.mT).float() * scale
        return logits_BHS.softmax(-1).to(query_BHX.dtype) @ cache_BSX[..., :shape.rank]

    return attend


def _check(out_BHC: Tensor, query_BHX: Tensor, rows_of: Callable[[int], Tensor], shape: Shape, scale: float,
           tolerance: float) -> None:
    """The first and the last sequence's outputs against fp64. Raises AssertionError."""
    for number in {0, shape.batch - 1}:
        rows_SX = rows_of(number).reshape(-1, shape.width).double()
        weights_HS = (query_BHX[number].double() @ rows_SX.T * scale).softmax(-1)
        right_HC = weights_HS @ rows_SX[:, :shape.rank]
        error = ((out_BHC[number].double() - right_HC).norm() / right_HC.norm()).item()
        assert error < tolerance, f"sequence {number} of {shape.name}: relative error {error:.2e} against fp64"


def _short(number: int) -> str:
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)
