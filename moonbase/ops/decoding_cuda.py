"""GPU kernels between the large products of one decoding pass. Loaded only on a machine with a GPU.

A pass over few tokens costs its launches and its traffic, hardly its arithmetic: so each function is one kernel that
reads and writes everything once. None waits for the host, so all can be recorded in a CUDA graph. Every tile and every
order of summation follows from the model's shapes alone, so a token's result does not depend on what else is in the
batch. Sums are in fp32 and rounded where `model.mla`, `model.moe` and `ops.norm` round.

Shapes: N tokens, D hidden, H heads, C kv latent, R rope dims, P positions, X = C + R; Q query dims per head (the plain
ones before the R rotated ones), V value dims per head, F = Q - R + V; E experts, K chosen experts, I width; Z slots per
cache block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16
"""Tokens of one matrix product: the fewest that the hardware takes, and always so many, as another number would make
the compiler choose an instruction that may add in another order."""
TOKENS_PER_PROGRAM = 64
"""Tokens for which one program reads its part of a weight once."""
ROUTER_PARTS = 4
"""Of a long sum: a router has few outputs, whose programs alone cannot keep the memory busy."""


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):
    """What lies there, 0 outside. Where shapes are round nothing is outside and no mask is computed."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _normalise(wide, gain, inside, eps, D: tl.constexpr, KIND: tl.constexpr):
    """RMS norm of one fp32 row, with both roundings of `ops.norm.rms_norm_reference`."""
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    gains = tl.load(gain, mask=inside, other=0.0).to(KIND).to(tl.float32)
    return ((wide * scale).to(KIND).to(tl.float32) * gains).to(KIND)


@triton.jit
def _add_and_norm_kernel(
    x, gain, addend, choices, shared, summed, normed, eps, x_row, addend_row, shared_row,
    D: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < D
    kind: tl.constexpr = normed.dtype.element_ty
    wide = tl.load(x + token * x_row + dims, mask=inside, other=0.0).to(tl.float32)
    if addend is not None:
        wide += tl.load(addend + token * addend_row + dims, mask=inside, other=0.0).to(tl.float32)
    if shared is not None:
        wide += tl.load(shared + token * shared_row + dims, mask=inside, other=0.0).to(tl.float32)
    if choices is not None:
        for choice in tl.static_range(CHOICES):
            row = choices + (token * CHOICES + choice) * D
            wide += tl.load(row + dims, mask=inside, other=0.0).to(tl.float32)
    if summed is not None:
        rounded = wide.to(kind)
        tl.store(summed + token * D + dims, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    tl.store(normed + token * D + dims, _normalise(wide, gain + dims, inside, eps, D, kind), mask=inside)


def add_and_norm(
    x_ND: Tensor, weight_D: Tensor, eps: float, addend_ND: Tensor | None = None, choices_NKD: Tensor | None = None,
    shared_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + addend + shared + choice 0 + choice 1 + ..., and the RMS norm of that times `weight_D`.

    Added in this order in fp32, rounded once to x's dtype; the norm is of the rounded sum. With nothing to add the sum
    is `x_ND` itself. D is at most 8192: a row is one block.
    """
    num_tokens, dims = x_ND.shape
    addends = [addend for addend in (addend_ND, choices_NKD, shared_ND) if addend is not None]
    assert dims <= 8192 and weight_D.shape == (dims,) and weight_D.stride(0) == 1
    assert all(tensor.stride(-1) == 1 and tensor.shape[0] == num_tokens for tensor in (x_ND, *addends))
    assert all(tensor.shape[-1] == dims for tensor in addends)
    assert choices_NKD is None or choices_NKD.is_contiguous()
    summed_ND = torch.empty(num_tokens, dims, dtype=x_ND.dtype, device=x_ND.device) if addends else None
    normed_ND = torch.empty(num_tokens, dims, dtype=x_ND.dtype, device=x_ND.device)
    block = triton.next_power_of_2(dims)
    _add_and_norm_kernel[(num_tokens,)](
        x_ND, weight_D, addend_ND, choices_NKD, shared_ND, summed_ND, normed_ND, eps, x_ND.stride(0),
        0 if addend_ND is None else addend_ND.stride(0), 0 if shared_ND is None else shared_ND.stride(0), D=dims,
        CHOICES=0 if choices_NKD is None else choices_NKD.shape[1], BLOCK=block,
        num_warps=max(1, min(16, block // 512)))
    return x_ND if summed_ND is None else summed_ND, normed_ND


@triton.jit
def _rotate(row, cos, sin, position, inside, pairs, HALF: tl.constexpr):
    """Adjacent pairs in, all first members and all second members out (`model.rope.rotate`)."""
    first = tl.load(row + 2 * pairs, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + 2 * pairs + 1, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(cos + position * HALF + pairs, mask=inside, other=0.0)
    sine = tl.load(sin + position * HALF + pairs, mask=inside, other=0.0)
    return first * cosine - second * sine, first * sine + second * cosine


@triton.jit
def _store_latents_kernel(
    kv, gain, cos, sin, positions, store, slots, eps, kv_row,
    C: tl.constexpr, HALF: tl.constexpr, C_PAD: tl.constexpr, HALF_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = kv + token * kv_row
    out = store + tl.load(slots + token).to(tl.int64) * (C + 2 * HALF)
    kind: tl.constexpr = store.dtype.element_ty
    latent, pairs = tl.arange(0, C_PAD), tl.arange(0, HALF_PAD)
    in_latent, in_half = latent < C, pairs < HALF
    wide = tl.load(row + latent, mask=in_latent, other=0.0).to(tl.float32)
    tl.store(out + latent, _normalise(wide, gain + latent, in_latent, eps, C, kind), mask=in_latent)
    position = tl.load(positions + token).to(tl.int64)
    first, second = _rotate(row + C, cos, sin, position, in_half, pairs, HALF)
    tl.store(out + C + pairs, first.to(kind), mask=in_half)
    tl.store(out + C + HALF + pairs, second.to(kind), mask=in_half)


def store_latents(
    kv_NX: Tensor, weight_C: Tensor, eps: float, cos_PR: Tensor, sin_PR: Tensor, positions_N: Tensor, store_PZX: Tensor,
    slots_N: Tensor,
) -> None:
    """Write each token's [normalised latent, rotated key] to its slot of the cache.

    `kv_NX` is what `kv_a_proj_with_mqa` gives; `cos_PR`, `sin_PR` fp32 [P, R/2] are indexed by `positions_N` (int32 or
    int64, all below P); `slots_N` int64 are rows of `store_PZX` seen as [-1, X]. Of several tokens with one slot, as
    padding has, any may be the last to write.
    """
    num_tokens, width = kv_NX.shape
    half, rank = cos_PR.shape[1], weight_C.shape[0]
    assert rank + 2 * half == width == store_PZX.shape[-1] and store_PZX.dtype == kv_NX.dtype
    assert kv_NX.stride(1) == 1 and store_PZX.is_contiguous() and cos_PR.is_contiguous() and sin_PR.is_contiguous()
    assert weight_C.stride(0) == 1 and positions_N.stride(0) == 1 and slots_N.stride(0) == 1
    _store_latents_kernel[(num_tokens,)](
        kv_NX, weight_C, cos_PR, sin_PR, positions_N, store_PZX, slots_N, eps, kv_NX.stride(0), C=rank, HALF=half,
        C_PAD=triton.next_power_of_2(rank), HALF_PAD=triton.next_power_of_2(half), num_warps=2)


@triton.jit(do_not_specialize=["num_tokens"])
def _absorb_query_kernel(
    query, weight, cos, sin, positions, out, num_tokens, num_heads, query_token, query_head,
    PLAIN: tl.constexpr, HALF: tl.constexpr, F: tl.constexpr, C: tl.constexpr, PLAIN_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.program_id(2) * SPAN
    end = tl.minimum(begin + SPAN, num_tokens)
    kind: tl.constexpr = out.dtype.element_ty
    if block * BLOCK < C:
        latent, plain = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PLAIN_PAD)
        in_plain, in_latent = plain < PLAIN, (latent < C)[None]
        part = _load(weight + (head * F + plain[:, None]) * C + latent[None], in_plain[:, None] & in_latent, EVEN)
        for start in range(begin, end, TOKENS):
            tokens = start + tl.arange(0, TOKENS)
            # Rows behind the last token repeat it: nothing to mask when reading.
            token = tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None]
            rows = _load(query + token * query_token + head * query_head + plain[None], in_plain[None], EVEN)
            absorbed = tl.dot(rows, part, input_precision="ieee").to(kind)
            tl.store(out + (token * num_heads + head) * (C + 2 * HALF) + latent[None], absorbed,
                     mask=(tokens < num_tokens)[:, None] & in_latent)
    else:
        pairs = tl.arange(0, HALF_PAD)[None]
        for start in range(begin, end, TOKENS):
            tokens = (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
            known = tokens < num_tokens
            inside = known & (pairs < HALF)
            position = tl.load(positions + tokens, mask=known, other=0).to(tl.int64)
            rows = query + tokens * query_token + head * query_head + PLAIN
            first, second = _rotate(rows, cos, sin, position, inside, pairs, HALF)
            place = out + (tokens * num_heads + head) * (C + 2 * HALF) + C + pairs
            tl.store(place, first.to(kind), mask=inside)
            tl.store(place + HALF, second.to(kind), mask=inside)


def absorb_query(query_NHQ: Tensor, weight_FC: Tensor, cos_PR: Tensor, sin_PR: Tensor, positions_N: Tensor) -> Tensor:
    """The query that reads latents [N, H, X]: q_plain · W_UK of its head, then the rotated dims.

    `weight_FC` is `kv_b_proj.weight` [H · F, C]: per head the Q - R rows of W_UK, then the V rows of W_UV. `cos_PR`,
    `sin_PR`, `positions_N` as in `store_latents`.
    """
    num_tokens, num_heads, width = query_NHQ.shape
    half, rank = cos_PR.shape[1], weight_FC.shape[1]
    plain, per_head = width - 2 * half, weight_FC.shape[0] // num_heads
    assert 0 < plain < per_head and per_head * num_heads == weight_FC.shape[0] and weight_FC.dtype == query_NHQ.dtype
    assert query_NHQ.stride(2) == 1 and weight_FC.is_contiguous() and positions_N.stride(0) == 1
    assert cos_PR.is_contiguous() and sin_PR.is_contiguous()
    out_NHX = torch.empty(num_tokens, num_heads, rank + 2 * half, dtype=query_NHQ.dtype, device=query_NHQ.device)
    plain_padded, block = max(16, triton.next_power_of_2(plain)), max(16, min(64, triton.next_power_of_2(rank)))
    # One block more than the latent has: it rotates.
    _absorb_query_kernel[(num_heads, triton.cdiv(rank, block) + 1, triton.cdiv(num_tokens, TOKENS_PER_PROGRAM))](
        query_NHQ, weight_FC, cos_PR, sin_PR, positions_N, out_NHX, num_tokens, num_heads, query_NHQ.stride(0),
        query_NHQ.stride(1), PLAIN=plain, HALF=half, F=per_head, C=rank, PLAIN_PAD=plain_padded,
        HALF_PAD=triton.next_power_of_2(half), TOKENS=TOKENS, SPAN=TOKENS_PER_PROGRAM, BLOCK=block,
        EVEN=plain == plain_padded and rank % block == 0, num_warps=4)
    return out_NHX


@triton.jit(do_not_specialize=["num_tokens"])
def _expand_values_kernel(
    read, weight, out, num_tokens, num_heads,
    F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_values = values < V
    weight_rows = weight + (head * F + (F - V) + values[:, None]) * C
    begin = tl.program_id(2) * SPAN
    for start in range(begin, tl.minimum(begin + SPAN, num_tokens), TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        token = tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None]
        total = tl.zeros([TOKENS, BLOCK_V], tl.float32)
        for base in range(0, C, BLOCK_C):
            latent = base + tl.arange(0, BLOCK_C)
            in_latent = (latent < C)[None]
            rows = _load(read + (token * num_heads + head) * C + latent[None], in_latent, EVEN)
            part = _load(weight_rows + latent[None], in_values[:, None] & in_latent, EVEN)
            total = tl.dot(rows, tl.trans(part), total, input_precision="ieee")
        tl.store(out + (token * num_heads + head) * V + values[None], total.to(out.dtype.element_ty),
                 mask=(tokens < num_tokens)[:, None] & in_values[None])


def expand_values(read_NHC: Tensor, weight_FC: Tensor, value_dims: int) -> Tensor:
    """What each head read of the latents times its W_UVᵀ: [N, H · V], as `o_proj` takes it.

    `weight_FC` as in `absorb_query`; W_UV is the last `value_dims` rows of each head.
    """
    num_tokens, num_heads, rank = read_NHC.shape
    per_head = weight_FC.shape[0] // num_heads
    assert weight_FC.shape == (per_head * num_heads, rank) and 0 < value_dims < per_head
    assert read_NHC.is_contiguous() and weight_FC.is_contiguous() and weight_FC.dtype == read_NHC.dtype
    out_NV = torch.empty(num_tokens, num_heads * value_dims, dtype=read_NHC.dtype, device=read_NHC.device)
    block_values = max(16, min(32, triton.next_power_of_2(value_dims)))
    block_rank = max(16, min(128, triton.next_power_of_2(rank)))
    _expand_values_kernel[
        (num_heads, triton.cdiv(value_dims, block_values), triton.cdiv(num_tokens, TOKENS_PER_PROGRAM))](
        read_NHC, weight_FC, out_NV, num_tokens, num_heads, F=per_head, V=value_dims, C=rank, TOKENS=TOKENS,
        SPAN=TOKENS_PER_PROGRAM, BLOCK_V=block_values, BLOCK_C=block_rank,
        EVEN=value_dims % block_values == 0 and rank % block_rank == 0, num_warps=4, num_stages=4)
    return out_NV


@triton.jit(do_not_specialize=["num_tokens"])
def _router_logits_kernel(
    x, weight, out, num_tokens, num_experts, x_row, D: tl.constexpr, PARTS: tl.constexpr, APART: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    # Rows behind the last one repeat it: nothing to mask when reading.
    token = tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None]
    expert = tl.minimum(experts, num_experts - 1)[:, None]
    size: tl.constexpr = (D + PARTS * BLOCK - 1) // (PARTS * BLOCK) * BLOCK
    total = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for one in range(1 if APART else PARTS):
        first = (tl.program_id(2) if APART else one) * size
        sums = tl.zeros([TOKENS, EXPERTS], tl.float32)
        for base in range(first, tl.minimum(first + size, D), BLOCK):
            dims = (base + tl.arange(0, BLOCK))[None]
            rows = _load(x + token * x_row + dims, dims < D, EVEN)
            part = _load(weight + expert * D + dims, dims < D, EVEN)
            if rows.dtype != part.dtype:
                rows, part = rows.to(tl.float32), part.to(tl.float32)
            sums = tl.dot(rows, tl.trans(part), sums, input_precision="ieee")
        total += sums
    out += tl.program_id(2).to(tl.int64) * num_tokens * num_experts
    tl.store(out + token * num_experts + experts[None], total,
             mask=(tokens < num_tokens)[:, None] & (experts < num_experts)[None])


def router_logits(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x · Wᵀ as if both were fp32: fp32 [P, N, E], whose sum over P, from first to last, are the logits. Products of
    bf16 values are exact in the hardware's fp32 sums."""
    (num_tokens, dims), num_experts = x_ND.shape, weight_ED.shape[0]
    assert x_ND.stride(1) == 1 and weight_ED.is_contiguous() and weight_ED.shape[1] == dims
    # A large D is cut into parts, whose sums are added: always, so that they are the same for any number of tokens. Few
    # tokens: many programs, each with a small part of the weight. Many: fewer passes over the tokens.
    few = num_tokens <= TOKENS_PER_PROGRAM
    parts = ROUTER_PARTS if dims >= ROUTER_PARTS * 1024 else 1
    experts = 16 if few else 64
    block = max(16, min(128 if x_ND.dtype == weight_ED.dtype == torch.bfloat16 else 64, triton.next_power_of_2(dims)))
    out_PNE = torch.empty(parts if few else 1, num_tokens, num_experts, dtype=torch.float32, device=x_ND.device)
    _router_logits_kernel[(triton.cdiv(num_tokens, TOKENS), triton.cdiv(num_experts, experts), len(out_PNE))](
        x_ND, weight_ED, out_PNE, num_tokens, num_experts, x_ND.stride(0), D=dims, PARTS=parts, APART=few,
        TOKENS=TOKENS, EXPERTS=experts, BLOCK=block, EVEN=dims % block == 0, num_warps=4,
        num_stages=8 if experts == 16 else 4)
    return out_PNE


@triton.jit
def _first_of_largest(values, open_, ids, BEYOND: tl.constexpr):
    """The lowest id of an open place with the largest value; some place is open and no value is NaN."""
    largest = tl.max(tl.where(open_, values, -float("inf")))
    return tl.min(tl.where(open_ & (values == largest), ids, BEYOND))


@triton.jit
def _nan_above_all(values):
    return tl.where(values != values, float("inf"), values)


@triton.jit
def _select_experts_kernel(
    logits, bias, sequences, indices, weights, scale,
    E: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, CHOICES: tl.constexpr,
    NORMALISE: tl.constexpr, GROUPS_PAD: tl.constexpr, SIZE_PAD: tl.constexpr, CHOICES_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = E // GROUPS
    groups, members = tl.arange(0, GROUPS_PAD), tl.arange(0, SIZE_PAD)
    open_ = (groups < GROUPS)[:, None] & (members < size)[None]
    experts = tl.where(open_, groups[:, None] * size + members[None], E)
    row = token
    if sequences is not None:
        half = tl.num_programs(0) // 2
        row = tl.where((tl.load(sequences + token) < 0) & (token >= half), token - half, token)
    logit = tl.load(logits + row * E + experts, mask=open_, other=0.0)
    for part in tl.static_range(1, PARTS):
        logit += tl.load(logits + (part * tl.num_programs(0) + row) * E + experts, mask=open_, other=0.0)
    scores = tl.sigmoid(logit)
    biased = _nan_above_all(scores + tl.load(bias + experts, mask=open_, other=0.0))
    if GROUPS > 1:
        biased = tl.where(open_, biased, -float("inf"))
        best = tl.max(biased, 1)
        place = tl.min(tl.where(biased == best[:, None], members[None], SIZE_PAD), 1)
        second = tl.max(tl.where(members[None] == place[:, None], -float("inf"), biased), 1)
        worth = _nan_above_all(best + second)
        left = groups < GROUPS
        for _ in tl.static_range(KEPT):
            left = left & (groups != _first_of_largest(worth, left, groups, GROUPS_PAD))
        open_ = open_ & ~left[:, None]
    ranks = tl.arange(0, CHOICES_PAD)
    chosen = tl.zeros([CHOICES_PAD], tl.int32)
    shares = tl.zeros([CHOICES_PAD], tl.float32)
    for rank in tl.static_range(CHOICES):
        expert = _first_of_largest(biased, open_, experts, E)
        open_ = open_ & (experts != expert)
        chosen = tl.where(ranks == rank, expert, chosen)
        shares = tl.where(ranks == rank, tl.sum(tl.where(experts == expert, scores, 0.0)), shares)
    if NORMALISE:
        shares = shares / (tl.sum(shares, 0) + 1e-20)
    tl.store(indices + token * CHOICES + ranks, chosen, mask=ranks < CHOICES)
    tl.store(weights + token * CHOICES + ranks, shares * scale, mask=ranks < CHOICES)


def select_experts(
    logits_PNE: Tensor, bias_E: Tensor, num_choices: int, num_groups: int, kept_groups: int, normalise: bool,
    scale: float, sequence_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`model.moe.Router` after its product: chosen experts int32 [N, K], best first, and their weights fp32 [N, K].

    `logits_PNE` as `router_logits` leaves them. Of equal scores, and of groups of equal worth, the lower index wins
    (`torch.topk` leaves that open). As there, a NaN counts as the largest and reaches the weights; the experts are
    valid and distinct all the same. Rows with a negative `sequence_N` (int32) are padding up to a power of two: they
    get what others chose, since nobody's experts need be read for them.
    """
    num_parts, num_tokens, num_experts = logits_PNE.shape
    size = num_experts // num_groups
    assert size * num_groups == num_experts and kept_groups <= num_groups and num_choices <= kept_groups * size
    assert num_groups == 1 or size > 1, "a group's worth is the sum of its best two"
    assert logits_PNE.dtype == bias_E.dtype == torch.float32 and logits_PNE.is_contiguous() and bias_E.is_contiguous()
    indices_NK = torch.empty(num_tokens, num_choices, dtype=torch.int32, device=logits_PNE.device)
    weights_NK = torch.empty(num_tokens, num_choices, dtype=torch.float32, device=logits_PNE.device)
    # One warp: the many short searches then need no exchange between warps.
    _select_experts_kernel[(num_tokens,)](
        logits_PNE, bias_E, sequence_N, indices_NK, weights_NK, scale, E=num_experts, PARTS=num_parts,
        GROUPS=num_groups, KEPT=kept_groups, CHOICES=num_choices, NORMALISE=normalise,
        GROUPS_PAD=triton.next_power_of_2(num_groups), SIZE_PAD=triton.next_power_of_2(size),
        CHOICES_PAD=triton.next_power_of_2(num_choices), num_warps=1)
    return indices_NK, weights_NK
