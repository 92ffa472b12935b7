"""The kernels around routed experts, in training and in inference, against plain PyTorch. `test_cuda_kernels` runs this
file as it does `kernels.py`: in Triton's interpreter on any machine that has triton, and on the GPU where there is one.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F

from moonbase.ops import experts_cuda, routing_cuda
from moonbase.ops.accumulate_cuda import accumulate_cuda_
from moonbase.ops.experts import experts_reference, sort_by_expert
from moonbase.ops.experts_decoding_cuda import experts_for_inference, group_by_expert

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter has neither tensor cores nor CUDA graphs")
# The interpreter cuts fp32 off where bf16 should be rounded, and multiplies bf16 matrices as if they were integers.
SHORT = torch.bfloat16 if DEVICE == "cuda" else torch.float16
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, SHORT], ids=["fp32", "16 bits"])


def layer(
    tokens: int, choices: int, hidden: int, width: int, experts: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """x, indices (the choices of a token are distinct), routing weights, gate_up, down; values of order one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    indices = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :choices].contiguous()
    weights = torch.rand(tokens, choices, generator=generator)
    gate_up = (torch.randn(experts, 2 * width, hidden, generator=generator) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, width, generator=generator) / width**0.5).to(dtype)
    return x, indices, weights, gate_up, down


def there(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def rows_of_choices(x, indices, weights, gate_up, down) -> torch.Tensor:
    """Every choice by itself, in fp64 but for the activation's one rounding."""
    gate, up = torch.einsum("nd,nkfd->nkf", x.double(), gate_up[indices].double()).chunk(2, -1)
    activation = (F.silu(gate) * up).to(x.dtype).double()
    return torch.einsum("nki,nkdi->nkd", activation, down[indices].double()) * weights[..., None]


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    # An activation on the edge between two bf16 values may go either way.
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.double().cpu(), expected.double(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "choices", "experts"), [
    (1, 1, 1), (1, 8, 64), (37, 2, 5), (300, 8, 7), (2100, 2, 9)])
def test_group_by_expert(tokens: int, choices: int, experts: int, dtype: torch.dtype) -> None:
    indices = torch.randint(experts, (tokens, choices), generator=torch.Generator().manual_seed(0), dtype=dtype)
    order, offsets, counts = group_by_expert(indices.to(DEVICE), experts)
    assert torch.equal(order.cpu().long(), indices.flatten().argsort(stable=True))
    expected = torch.bincount(indices.flatten(), minlength=experts)
    assert torch.equal(counts.cpu().long(), expected)
    assert torch.equal(offsets.cpu().long(), expected.cumsum(0) - expected)


@each_dtype
@pytest.mark.parametrize(("tokens", "choices", "hidden", "width", "experts"), [
    (1, 1, 20, 12, 5),
    (1, 2, 20, 12, 5),  # experts without rows
    (37, 2, 20, 12, 5),
    (37, 1, 40, 70, 1),  # more than one tile of rows, more than one block of columns
    (70, 3, 20, 12, 3),
    (3, 2, 150, 260, 3),  # more than one step through either depth, the last of them in part
    (2, 2, 256, 128, 4),  # nothing to mask but rows
])
def test_experts_for_inference(
    tokens: int, choices: int, hidden: int, width: int, experts: int, dtype: torch.dtype
) -> None:
    case = layer(tokens, choices, hidden, width, experts, dtype)
    found = experts_for_inference(*there(case))
    assert found.dtype == torch.float32 and found.shape == (tokens, choices, hidden)
    assert_near(found, rows_of_choices(*case), dtype)
    wide = [tensor.float() if tensor.is_floating_point() else tensor for tensor in case]
    assert_near(found.sum(1), experts_reference(*wide), dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("choices", [1, 2], ids=["once", "twice by every token"])
def test_all_tokens_choose_one_expert(choices: int, index_dtype: torch.dtype) -> None:
    """Far more rows than the mean: each program goes through several tiles."""
    x, indices, *others = layer(37, choices, 20, 12, 5, torch.float32)
    case = (x, torch.full_like(indices, 3), *others)
    found = experts_for_inference(*there((x, case[1].to(index_dtype), *others)))
    assert_near(found, rows_of_choices(*case), torch.float32)


def test_x_may_be_columns_of_something_wider() -> None:
    x, *others = layer(3, 2, 20, 12, 5, torch.float32)
    wider = torch.cat([x, torch.full_like(x, torch.nan)], 1)
    found = experts_for_inference(wider.to(DEVICE)[:, :20], *there(tuple(others)))
    assert_near(found, rows_of_choices(x, *others), torch.float32)


@pytest.mark.parametrize(("tokens", "choices", "experts"), [
    (1, 1, 1), (37, 2, 5), (40, 8, 64), (5, 8, 130), (20, 3, 1)])
def test_sort_by_expert(tokens: int, choices: int, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_cuda, "_ROWS", 16)  # several parts, and several steps through them
    monkeypatch.setattr(routing_cuda, "_STEP", 16)
    indices = torch.randint(experts, (tokens, choices), generator=torch.Generator().manual_seed(0))
    found = routing_cuda.sort_by_expert(indices.to(DEVICE), experts)
    for one, other in zip(found, sort_by_expert(indices, experts), strict=True):
        assert one.dtype == other.dtype and torch.equal(one.cpu(), other)


@pytest.mark.parametrize(("rows", "count", "choices"), [
    (1, 1, 1), (37, 64, 8), (33, 48, 5), (5, 384, 8), (3, 1000, 32)])
@pytest.mark.parametrize("levels", [2, 10**6], ids=["ties", "distinct"])
def test_top_k(rows: int, count: int, choices: int, levels: int) -> None:
    values = torch.randint(-levels, levels, (rows, 1, count), generator=torch.Generator().manual_seed(0)) / 7
    values[..., ::5] *= -math.inf  # 0 * inf is not a number
    found = routing_cuda.top_k(values.to(DEVICE), choices).cpu()
    assert found.dtype == torch.int64 and found.shape == (rows, 1, choices)
    assert (found.sort(-1).values.diff(dim=-1) > 0).all(), "a place is taken once"
    expected = values.sort(-1, descending=True).values[..., :choices]
    torch.testing.assert_close(values.gather(-1, found), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("extreme", [math.nan, -math.nan, math.inf, -math.inf])
def test_top_k_of_rows_of_one_value(extreme: float) -> None:
    values = torch.full((3, 20), extreme, device=DEVICE)
    assert routing_cuda.top_k(values, 20).sort(-1).values.tolist() == [list(range(20))] * 3
    values[:, 7] = 0.0
    assert (routing_cuda.top_k(values, 1) == 7).all().item() == (extreme == -math.inf)


@pytest.mark.parametrize(("tokens", "choices", "dims"), [(1, 1, 1), (5, 3, 20), (4, 8, 1300)])
def test_repeat_tokens(tokens: int, choices: int, dims: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, inverse = torch.randn(tokens, dims, generator=generator), torch.randperm(tokens * choices, generator=generator)
    found = experts_cuda.repeat_tokens(x.to(DEVICE), inverse.to(DEVICE))
    expected = torch.empty(tokens * choices, dims)
    expected[inverse] = x.repeat_interleave(choices, 0)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("count", [1, 4096, 10000])
def test_accumulate(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    total, addend = torch.randn(count, generator=generator), torch.randn(count, generator=generator).bfloat16()
    found = total.to(DEVICE, copy=True)
    accumulate_cuda_(found, addend.to(DEVICE))
    assert torch.equal(found.cpu(), total + addend.float())


@on_a_gpu
@each_dtype
@pytest.mark.parametrize(("hidden", "width"), [(256, 128), (1024, 512), (2048, 2048)])
def test_a_row_does_not_depend_on_its_company(hidden: int, width: int, dtype: torch.dtype) -> None:
    x, indices, weights, *matrices = there(layer(2100, 2, hidden, width, 5, dtype))
    together = experts_for_inference(x, indices, weights, *matrices)  # sorted, tiles of 128 rows
    for first, last in ((0, 1), (7, 8), (20, 52), (40, 110), (100, 1000)):  # tiles of 16, 16, 32, 64, 64
        few = slice(first, last)
        found = experts_for_inference(x[few], indices[few], weights[few], *matrices)
        assert torch.equal(found, together[few])


@on_a_gpu
def test_recorded_in_a_cuda_graph() -> None:
    """The graph follows new tokens and new choices: nothing of the first run is frozen into it but the shapes."""
    first, second = (layer(5, 2, 64, 48, 6, torch.bfloat16, seed) for seed in (0, 1))
    case = there((*first[:3], *second[3:]))

    def step() -> torch.Tensor:
        return (experts_for_inference(*case).sum(1) + case[0]).bfloat16()

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for held, new in zip(case[:3], second[:3], strict=True):
        held.copy_(new)
    graph.replay()
    assert_near(out, rows_of_choices(*second).sum(1) + second[0], torch.bfloat16)
