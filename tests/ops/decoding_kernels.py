"""The kernels of a decoding pass against the model's own modules. `test_cuda_kernels` runs this file in a process of
its own: in Triton's interpreter on any machine that has triton, and on the GPU where there is one."""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.nn.functional as F

from moonbase.model.mla import LatentAttention
from moonbase.model.moe import Router
from moonbase.model.rope import rotations
from moonbase.ops import decoding_cuda
from moonbase.ops.norm import rms_norm_reference
from tests.model.tiny import randomise, tiny_config, yarn

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="slow in the interpreter")
KINDS = [torch.float32, torch.bfloat16]
# The interpreter holds bf16 as whole numbers and multiplies matrices of those.
KINDS_OF_PRODUCTS = KINDS if DEVICE == "cuda" else KINDS[:1]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(kind: torch.dtype) -> dict[str, float]:
    """Two steps of bf16, as a norm rounds twice; the interpreter cuts off where a GPU rounds."""
    if kind == torch.float32:
        return dict(rtol=1e-5, atol=1e-5)
    return dict(rtol=1.6e-2, atol=1e-3) if DEVICE == "cuda" else dict(rtol=3e-2, atol=1e-2)


def there(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "dims", "addends"), [
    (1, 20, ""), (5, 20, "a"), (5, 1300, "s"), (2, 24, "c"), (37, 64, "sc"), (5, 37, "asc"), (3, 1, "as"),
])
def test_add_and_norm(tokens: int, dims: int, addends: str, kind: torch.dtype) -> None:
    x, addend, shared = (normal(tokens, dims + 3, seed=seed).to(kind)[:, :dims] for seed in range(3))
    addend, shared = addend if "a" in addends else None, shared if "s" in addends else None
    choices, weight = normal(tokens, 3, dims, seed=4).to(kind) if "c" in addends else None, normal(dims, seed=5)
    total = x.float()
    for part in (addend, shared, *(() if choices is None else choices.unbind(1))):
        total = total if part is None else total + part.float()
    summed, normed = decoding_cuda.add_and_norm(*there(x, weight), 1e-5, *there(addend, choices, shared))
    if DEVICE == "cuda" or kind == torch.float32:
        assert summed.cpu().equal(total.to(kind))
    torch.testing.assert_close(summed.cpu(), total.to(kind), **near(kind))
    torch.testing.assert_close(normed.cpu(), rms_norm_reference(summed.cpu(), weight, 1e-5), **near(kind))
    assert normed.dtype == kind


def test_nothing_added_is_not_copied() -> None:
    x = normal(2, 20).to(DEVICE)
    assert decoding_cuda.add_and_norm(x, x[0], 1e-5)[0] is x


class Noting:
    """A cache that notes what it is given and hands out set values."""

    def __init__(self, read_NHC: torch.Tensor) -> None:
        self.read_NHC = read_NHC

    def attend(self, layer, query_NHX, latent_NC, key_rope_NR, scale):
        self.query_NHX, self.row_NX = query_NHX, torch.cat([latent_NC, key_rope_NR], -1)
        return self.read_NHC


def attention_case(tokens: int, kind: torch.dtype, shape: dict[str, int]):
    """A layer, its input, what its cache saw and gave, and what came out; positions in no order."""
    config = tiny_config(rope_scaling=yarn(40), q_lora_rank=None, **shape)
    attention = randomise(LatentAttention(config, 0)).to(kind)
    # What came out is then what the heads made of the read, without the last product.
    del attention.o_proj
    attention.o_proj = torch.nn.Identity()
    x = normal(tokens, config.hidden_size, seed=1).to(kind)
    positions = torch.randperm(100, generator=torch.Generator().manual_seed(2))[:tokens]
    cache = Noting(normal(tokens, config.num_attention_heads, config.kv_lora_rank, seed=3).to(kind))
    with torch.no_grad():
        output = attention.decode(x, rotations(config, positions), cache)
    return attention, x, positions, cache, output


SHAPES = {
    "odd": dict(num_attention_heads=3, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=20),
    "small": dict(num_attention_heads=1, kv_lora_rank=10, qk_nope_head_dim=5, qk_rope_head_dim=2, v_head_dim=9),
    "blocks": dict(num_attention_heads=2, kv_lora_rank=136, qk_nope_head_dim=20, qk_rope_head_dim=6, v_head_dim=36),
    "round": dict(num_attention_heads=2, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=64),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "shape"), [(1, "round"), (5, "odd"), (37, "small")])
@torch.no_grad()
def test_store_latents(tokens: int, shape: str, kind: torch.dtype) -> None:
    attention, x, positions, cache, _ = attention_case(tokens, kind, SHAPES[shape])
    kv, norm = attention.kv_a_proj_with_mqa(x), attention.kv_a_layernorm
    cos, sin = rotations(attention.config, torch.arange(100))
    slots = torch.randperm(44, generator=torch.Generator().manual_seed(4))[:tokens]
    store = normal(11, 4, kv.shape[1], seed=5).to(kind)
    expected = store.clone()
    expected.view(-1, kv.shape[1])[slots] = cache.row_NX
    # Columns of a wider product, and both kinds of position.
    wide = torch.cat([x, kv], dim=1).to(DEVICE)[:, x.shape[1]:]
    store = store.to(DEVICE)
    decoding_cuda.store_latents(wide, norm.weight.to(DEVICE), norm.eps, *there(cos, sin),
                                positions.to(DEVICE, torch.int32 if tokens > 1 else None), store, slots.to(DEVICE))
    torch.testing.assert_close(store.cpu(), expected, **near(kind))


@pytest.mark.parametrize("kind", KINDS_OF_PRODUCTS)
@pytest.mark.parametrize(("tokens", "shape"), [(5, "odd"), (1, "small"), (18, "blocks"), (70, "small"), (37, "round")])
@torch.no_grad()
def test_absorb_query_and_expand_values(tokens: int, shape: str, kind: torch.dtype) -> None:
    attention, x, positions, cache, output = attention_case(tokens, kind, SHAPES[shape])
    query = attention.q_proj(x).unflatten(-1, (attention.config.num_attention_heads, -1))
    cos, sin = rotations(attention.config, torch.arange(100))
    query, weight, cos, sin, positions, read = there(
        query, attention.kv_b_proj.weight, cos, sin, positions, cache.read_NHC)
    absorbed = decoding_cuda.absorb_query(query, weight, cos, sin, positions)
    expanded = decoding_cuda.expand_values(read, weight, attention.config.v_head_dim)
    assert absorbed.dtype == expanded.dtype == kind
    torch.testing.assert_close(absorbed.cpu(), cache.query_NHX, **near(kind))
    torch.testing.assert_close(expanded.cpu(), output, **near(kind))
    # A token's result does not depend on how many there are.
    last = slice(tokens - 1, tokens)
    assert decoding_cuda.absorb_query(query[last], weight, cos, sin, positions[last]).equal(absorbed[last])
    assert decoding_cuda.expand_values(read[last], weight, attention.config.v_head_dim).equal(expanded[last])


ROUTERS = [(5, 1, 1, 2), (12, 4, 2, 3), (12, 3, 1, 4), (37, 1, 1, 6), (12, 1, 1, 12), (64, 8, 4, 8)]
"""Experts, groups, groups kept, choices."""


@pytest.mark.parametrize(("experts", "groups", "kept", "choices"), ROUTERS)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
@torch.no_grad()
def test_router(experts: int, groups: int, kept: int, choices: int, normalise: bool, tokens: int) -> None:
    config = tiny_config(n_routed_experts=experts, n_group=groups, topk_group=kept, num_experts_per_tok=choices,
                         norm_topk_prob=normalise, routed_scaling_factor=1.7)
    router = randomise(Router(config), seed=experts)
    router.e_score_correction_bias -= 2  # an expert left out that counted as 0 would win
    x, bias = normal(tokens, config.hidden_size, seed=1), router.e_score_correction_bias
    _, indices, weights = router(x)
    logits = decoding_cuda.router_logits(*there(x, router.weight))
    found = decoding_cuda.select_experts(logits, bias.to(DEVICE), choices, groups, kept, normalise, 1.7)
    assert [tensor.dtype for tensor in found] == [torch.int32, torch.float32]
    by_index, order = indices.sort(-1)
    found_by_index, found_order = found[0].cpu().long().sort(-1)
    assert found_by_index.equal(by_index)
    torch.testing.assert_close(found[1].cpu().gather(-1, found_order), weights.gather(-1, order))
    biased = (F.linear(x, router.weight).sigmoid() + bias).gather(-1, found[0].cpu().long())
    assert (biased.diff(dim=-1) <= 1e-6).all(), "best first"


def test_equal_scores_go_to_the_lower_index() -> None:
    logits, bias = there(torch.zeros(1, 2, 12), torch.zeros(12))
    for groups, kept in ((1, 1), (4, 2)):
        indices, weights = decoding_cuda.select_experts(logits, bias, 5, groups, kept, True, 2.0)
        assert indices.tolist() == [[0, 1, 2, 3, 4]] * 2
        torch.testing.assert_close(weights.cpu(), torch.full((2, 5), 0.4))


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (3, 2)])
def test_not_a_number_among_the_logits(groups: int, kept: int) -> None:
    logits = normal(3, 12)
    logits[0], logits[1, 7] = torch.nan, torch.nan
    bias = torch.zeros(12)
    bias[8:] = -torch.inf
    indices, weights = (tensor.cpu() for tensor in decoding_cuda.select_experts(
        *there(logits.unsqueeze(0), bias), 6, groups, kept, False, 1.0))
    assert all(len(set(row)) == 6 and set(row) <= set(range(12)) for row in indices.tolist())
    assert indices[1, 0] == 7 and weights.isnan().tolist() == [[True] * 6, [True] + [False] * 5, [False] * 6]


@pytest.mark.parametrize(("kind", "weight_kind"), [
    (kind, weight_kind) for kind in KINDS for weight_kind in KINDS
    if torch.float32 in (kind, weight_kind) or kind in KINDS_OF_PRODUCTS])
@pytest.mark.parametrize(("tokens", "dims", "experts"), [(1, 20, 5), (37, 128, 37), (5, 300, 12), (66, 64, 70),
                                                       (2, 4200, 16), pytest.param(66, 4200, 16, marks=on_gpu)])
def test_router_logits(tokens: int, dims: int, experts: int, kind: torch.dtype, weight_kind: torch.dtype) -> None:
    x, weight = normal(tokens, dims + 3).to(kind)[:, :dims], normal(experts, dims, seed=1).to(weight_kind)
    parts = decoding_cuda.router_logits(*there(x, weight))
    assert parts.dtype == torch.float32 and len(parts) == (4 if dims > 4096 and tokens <= 64 else 1)
    found = functools.reduce(torch.add, parts)
    torch.testing.assert_close(found.cpu().double(), x.double() @ weight.double().T, rtol=1e-5, atol=5e-5 + dims * 5e-8)
    if DEVICE == "cuda":  # NumPy's product of other shapes adds in another order
        assert functools.reduce(torch.add, decoding_cuda.router_logits(*there(x[-1:], weight))).equal(found[-1:])
