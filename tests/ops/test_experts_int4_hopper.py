"""The INT4 kernel in CUDA C++ against products of the weights that the words stand for. Without a GPU it is compiled
for the CPU and run thread by thread (`cuda_on_cpu.h`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moonbase.checkpoint.formats import quantize_int4
from moonbase.ops import experts_int4_hopper
from moonbase.ops.experts_int4_hopper import fits
from moonbase.ops.int4_chunks import CHUNK_BYTES, pack_chunks, unpack_chunks
from tests.ops.cuda_on_cpu import fixtures
from tests.ops.int4_words import words_of

kernels, device = fixtures(experts_int4_hopper._KERNELS, processors=[2])


def stored(experts: int, rows: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales and the weights that they stand for, fp64."""
    numbers = torch.randint(-8, 8, (experts, rows, inputs))
    scales = (torch.rand(experts, rows, inputs // 32) + 0.5).bfloat16() / 8
    return words_of(numbers), scales, numbers.double() * scales.double().repeat_interleave(32, dim=-1)


def expected(x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.empty(*indices_NK.shape, x_ND.shape[1], dtype=torch.float64)
    for n in range(x_ND.shape[0]):
        for k in range(indices_NK.shape[1]):
            expert = int(indices_NK[n, k])
            gate, up = (gate_up[expert] @ x_ND[n].double()).chunk(2)
            hidden = (torch.nn.functional.silu(gate) * up).float().bfloat16().double()
            out[n, k] = weights_NK[n, k].double() * (down[expert] @ hidden)
    return out


def check(device: str, tokens: int, choices: int, experts: int, hidden: int, width: int,
          index_type: torch.dtype = torch.int64) -> None:
    torch.manual_seed(tokens)
    with torch.device(device):
        _check(device, tokens, choices, experts, hidden, width, index_type)


def _check(
    device: str, tokens: int, choices: int, experts: int, hidden: int, width: int, index_type: torch.dtype,
) -> None:
    gate_up, down = stored(experts, 2 * width, hidden), stored(experts, hidden, width)
    wide = torch.randn(tokens, hidden + 64).bfloat16()
    x_ND = wide[:, :hidden]  # rows further apart than they are long
    indices = torch.randint(0, experts, (tokens, choices)).to(index_type)
    weights = torch.rand(tokens, choices)
    chunks = pack_chunks(*gate_up[:2], gated=True), pack_chunks(*down[:2], gated=False)

    def run(count: int) -> Tensor:
        kernel = experts_int4_hopper.experts_int4_hopper
        return kernel(x_ND[:count], indices[:count], weights[:count], *chunks)

    out, right = run(tokens), expected(x_ND, indices, weights, gate_up[2], down[2])
    # Activations are rounded to bf16 after a sum in another order: here and there to the neighbour.
    assert (out - right).abs().max() < 4e-3 * right.abs().max()
    assert (out - right).norm() < 4e-4 * right.norm()
    assert torch.equal(out[:1], run(1)), "the same bits in any company"


@pytest.mark.parametrize(("tokens", "choices", "experts", "hidden", "width", "index_type"), [
    (2, 2, 4, 256, 128, torch.int64),   # experts that nobody chose
    (10, 2, 2, 128, 128, torch.int32),  # more than eight choices of an expert: two tiles of them
    (18, 2, 5, 128, 128, torch.int32),  # more choices than a warp groups
    (9, 1, 1, 1152, 128, torch.int64),        # the same; nine chunks among eight warps
    (17, 1, 1, 128, 256, torch.int64),        # more than sixteen: weights read once more
])
def test_it_multiplies_with_what_the_words_stand_for(
    device: str, tokens: int, choices: int, experts: int, hidden: int, width: int, index_type: torch.dtype,
) -> None:
    check(device, tokens, choices, experts, hidden, width, index_type)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("tokens", "experts", "hidden", "width"), [
    (1, 64, 2048, 1408), (64, 64, 2048, 1408), (100, 16, 7168, 2048), (256, 64, 1024, 512)])
def test_larger_layers(tokens: int, experts: int, hidden: int, width: int, kernels: None) -> None:
    check("cuda", tokens, 8, experts, hidden, width)


@pytest.mark.parametrize("gated", [True, False])
def test_chunks_hold_what_was_packed(gated: bool) -> None:
    words, scales, _ = stored(3, 256, 384)
    chunks = pack_chunks(words, scales, gated)
    assert chunks.shape == (3, 4, 3, CHUNK_BYTES)
    for given, back in zip((words, scales), unpack_chunks(chunks, gated), strict=True):
        assert torch.equal(given, back)


def test_the_checkpoints_own_words_are_those_that_are_packed() -> None:
    words, scales, values = stored(1, 64, 128)
    made, made_scales = quantize_int4(values[0].float())  # values on a grid keep their numbers
    mine, theirs = (torch.stack([w >> (4 * place) & 15 for place in range(8)], -1).flatten(-2).float() - 8
                    for w in (words[0], made))
    assert torch.equal(mine * scales[0].float().repeat_interleave(32, -1),
                       theirs * made_scales.float().repeat_interleave(32, -1))


def test_sizes_that_it_takes() -> None:
    assert fits(256 * 8, 384, 7168, 2048)
    assert fits(8, 64, 2048, 1408)
    assert not fits(8, 64, 2048, 1400) and not fits(257 * 8, 384, 7168, 2048)
