"""The INT4 kernels for prompts in CUDA C++ against products of the weights that the words stand for. Without a GPU they
are compiled for the CPU and run thread by thread (`cuda_on_cpu.h`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moonbase.ops import experts_int4_prompt_hopper
from moonbase.ops.experts_int4_prompt_hopper import fits
from moonbase.ops.int4_chunks import pack_chunks
from tests.ops.cuda_on_cpu import fixtures
from tests.ops.int4_words import words_of

SMALL = ["-DMOST_EIGHTS=2"]  # tiles of at most 16 tokens
# In company all by one, one tile after the other.
kernels, device = fixtures(experts_int4_prompt_hopper._KERNELS, *SMALL, processors=[1, 2])


def stored(experts: int, rows: int, inputs: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales and the weights that they stand for: products rounded to bf16, as fp64."""
    numbers = torch.randint(-8, 8, (experts, rows, inputs), device=device)
    scales = ((torch.rand(experts, rows, inputs // 32, device=device) + 0.5) / (4 * inputs**0.5)).bfloat16()
    weights = numbers.float() * scales.float().repeat_interleave(32, dim=-1)
    return words_of(numbers), scales, weights.bfloat16().double()


def expected(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros(x_ND.shape, dtype=torch.float64, device=x_ND.device)
    for expert in range(gate_up.shape[0]):
        tokens, choices = torch.where(indices_NK == expert)
        gate, up = (x_ND[tokens].double() @ gate_up[expert].T).chunk(2, -1)
        hidden = (torch.nn.functional.silu(gate) * up).float().bfloat16().double()
        rows = weights_NK[tokens, choices, None].double() * (hidden @ down[expert].T)
        out.index_put_((tokens,), rows, accumulate=True)
    return out


def check(device: str, tokens: int, choices: int, experts: int, hidden: int, width: int,
          index_type: torch.dtype = torch.int64, crowd: int = 0, alone: int = 1) -> None:
    """`crowd`: tokens that all choose the last expert."""
    torch.manual_seed(tokens)
    gate_up, down = stored(experts, 2 * width, hidden, device), stored(experts, hidden, width, device)
    wide = torch.randn(tokens, hidden + 64, device=device).bfloat16()
    x_ND = wide[:, :hidden]  # rows further apart than they are long
    indices = torch.rand(tokens, experts, device=device).argsort(1)[:, :choices].contiguous()
    indices[:crowd, 0] = experts - 1
    weights = torch.rand(tokens, choices, device=device)
    chunks = pack_chunks(*gate_up[:2], gated=True), pack_chunks(*down[:2], gated=False)

    def run(part: slice) -> Tensor:
        return experts_int4_prompt_hopper.experts_int4_prompt_hopper(
            x_ND[part], indices[part].to(index_type), weights[part], *chunks)

    out, right = run(slice(None)), expected(x_ND, indices, weights, gate_up[2], down[2])
    assert out.isfinite().all()
    # Activations and rows of choices are rounded to bf16, activations now and then to the other neighbour.
    assert (out - right).norm() < 3e-3 * right.norm()
    assert (out - right).abs().max() < 1e-2 * right.abs().max()
    assert torch.equal(out[-alone:], run(slice(tokens - alone, tokens))), "the same bits in any company"


@pytest.mark.parametrize(("tokens", "choices", "experts", "hidden", "width", "index_type", "crowd"), [
    (21, 2, 3, 256, 128, torch.int64, 0),   # two chunks of inputs, then one; one tile of an expert and more
    (10, 1, 2, 512, 256, torch.int32, 10),  # an expert without tokens; one block of rows after the other
    (3, 1, 1, 1280, 128, torch.int64, 0),   # ten chunks of inputs: the ring is filled again and again
])
def test_it_multiplies_with_what_the_words_stand_for(
    device: str, tokens: int, choices: int, experts: int, hidden: int, width: int, index_type: torch.dtype, crowd: int
) -> None:
    check(device, tokens, choices, experts, hidden, width, index_type, crowd)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("tokens", "choices", "experts", "hidden", "width", "crowd"), [
    (1, 8, 64, 2048, 1408, 0), (300, 8, 64, 2048, 1408, 250), (900, 2, 4, 7168, 2048, 0),
    (3000, 8, 64, 1024, 512, 1000), (700, 1, 512, 256, 128, 0)])
def test_larger_layers(
    tokens: int, choices: int, experts: int, hidden: int, width: int, crowd: int, kernels: None
) -> None:
    check("cuda", tokens, choices, experts, hidden, width, crowd=crowd)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_in_a_cuda_graph(kernels: None) -> None:
    """The graph follows new tokens and new choices."""
    torch.manual_seed(0)
    chunks = [pack_chunks(*stored(16, *size, "cuda")[:2], gated=gated)
              for size, gated in (((1024, 1024), True), ((1024, 512), False))]
    cases = [(torch.randn(200, 1024, device="cuda").bfloat16(),
              torch.rand(200, 16, device="cuda").argsort(1)[:, :4].contiguous(), torch.rand(200, 4, device="cuda"))
             for _ in range(2)]
    held = [each.clone() for each in cases[0]]
    run = experts_int4_prompt_hopper.experts_int4_prompt_hopper
    right = [run(*case, *chunks) for case in cases]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*held, *chunks)
    for case, expected_out in zip(cases[::-1], right[::-1], strict=True):
        for each, new in zip(held, case, strict=True):
            each.copy_(new)
        graph.replay()
        assert torch.equal(out, expected_out)


def test_sizes_that_it_takes() -> None:
    assert fits(384, 7168, 2048) and fits(64, 2048, 1408) and fits(64, 1024, 512)
    assert not fits(64, 1152, 512) and not fits(64, 2048, 1400) and not fits(513, 1024, 512)
