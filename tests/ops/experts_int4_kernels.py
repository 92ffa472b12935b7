"""The Triton kernels of INT4 experts against products of the weights that the words stand for. Run by
`test_cuda_kernels`, as `kernels.py` is."""

from __future__ import annotations

import os

import pytest
import torch

from moonbase.ops import experts_int4_cuda as kernels
from moonbase.ops.experts_int4_cuda import experts_int4_cuda
from moonbase.ops.int4_chunks import pack_chunks
from moonbase.ops.int4_packed import pack_int4
from tests.ops.experts_kernels import SHORT, assert_near, layer, rows_of_choices

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


@pytest.mark.parametrize("summed", [False, True], ids=["rows", "sums"])
@pytest.mark.parametrize("decoding", [0, 2, 5])
def test_rows_that_decode_and_prompts(decoding: int, summed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of rows keep their order and their sums, whatever the kernels give back."""
    rows = torch.randn(5, 3, 4)
    monkeypatch.setattr(kernels, "experts_int4_for_few", lambda x, *_: rows[x[:, 0].long()])
    monkeypatch.setattr(kernels, "experts_int4_for_prompts",
                        lambda x, *_: rows[x[:, 0].long()].sum(1, keepdim=True) if summed else rows[x[:, 0].long()])
    x = torch.arange(5.0)[:, None]
    found = kernels.experts_int4_for_both(decoding, x, x, x, x, x)
    torch.testing.assert_close(found.sum(1), rows.sum(1))
