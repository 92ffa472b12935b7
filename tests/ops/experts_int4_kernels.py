"""The Triton kernels of INT4 experts against products of the weights that the words stand for. Run by
`test_cuda_kernels`, as `kernels.py` is."""

from __future__ import annotations

import os

import pytest
import torch

from moonbase.ops.experts_int4_cuda import experts_int4_cuda, experts_int4_for_prompts
from moonbase.ops.int4_chunks import pack_chunks
from moonbase.ops.int4_packed import pack_int4
from tests.ops.experts_kernels import SHORT, assert_near, layer, on_a_gpu, rows_of_choices

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def stored(rows: int, inputs: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, scales, and the weights that they stand for. Scales are powers of two: no dtype rounds a weight."""
    numbers = torch.randint(-8, 8, (experts, rows, inputs))
    scales = torch.exp2(torch.randint(-4, 0, (experts, rows, inputs // 32)) - inputs.bit_length() / 2 // 1).bfloat16()
    return pack_int4(numbers), scales, numbers.float() * scales.float().repeat_interleave(32, -1)


@pytest.mark.parametrize("dtype", [torch.float32, SHORT], ids=["fp32", "16 bits"])
@pytest.mark.parametrize(("tokens", "choices", "experts"), [(19, 2, 2)])
def test_every_choice(tokens: int, choices: int, experts: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    hidden, width = 256 if DEVICE == "cuda" else 128, 128
    x, indices, weights, *_ = layer(tokens, choices, hidden, width, experts, dtype)
    gate_up, down = stored(2 * width, hidden, experts), stored(hidden, width, experts)
    chunks = pack_chunks(*gate_up[:2], gated=True), pack_chunks(*down[:2], gated=False)
    found = experts_int4_cuda(*(each.to(DEVICE) for each in (x, indices, weights, *chunks)))
    assert_near(found, rows_of_choices(x, indices, weights, gate_up[2], down[2]), dtype)


@on_a_gpu
def test_rows_of_prompts() -> None:
    """Whatever kernel the machine has for them: the same sums."""
    torch.manual_seed(0)
    hidden, width, experts = 512, 256, 5
    x, indices, weights, *_ = layer(200, 3, hidden, width, experts, torch.bfloat16)
    gate_up, down = stored(2 * width, hidden, experts), stored(hidden, width, experts)
    chunks = pack_chunks(*gate_up[:2], gated=True), pack_chunks(*down[:2], gated=False)
    found = experts_int4_for_prompts(*(each.to(DEVICE) for each in (x, indices, weights, *chunks))).sum(1).cpu()
    right = rows_of_choices(x, indices, weights, gate_up[2], down[2]).sum(1)
    assert (found - right).norm() < 4e-3 * right.norm()  # a choice's row may be rounded to bf16
