"""Experts in INT4 against the same layer over what compressed-tensors unpacks."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from moonbase.ops import experts_int4 as room
from moonbase.ops.experts import experts_reference
from moonbase.ops.experts_int4 import experts_int4, experts_int4_reference

EXPERTS, HIDDEN, WIDTH = 6, 64, 32


def stack(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, scales, and the weights that they mean."""
    numbers = torch.randint(-8, 8, (EXPERTS, rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(EXPERTS, rows, columns // 32, generator=generator) * 0.05).bfloat16()
    words = torch.stack([pack_to_int32(matrix, 4) for matrix in numbers])
    read = torch.stack([unpack_from_int32(matrix, 4, torch.Size((rows, columns))) for matrix in words])
    return words, scale, read * scale.double().repeat_interleave(32, -1)


@pytest.fixture
def layer() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Tokens and choices, the four packed tensors, and the two stacks in fp64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, HIDDEN, generator=generator)
    # Expert 3 is never chosen, and one token chooses an expert twice.
    indices = torch.tensor([[0, 5], [5, 1], [2, 2], [4, 0], [1, 5], [5, 4], [0, 1], [2, 5], [1, 0]])
    weights = torch.rand(9, 2, generator=generator)
    *gate_up, gate_up_floats = stack(2 * WIDTH, HIDDEN, generator)
    *down, down_floats = stack(HIDDEN, WIDTH, generator)
    return [x, indices, weights], [*gate_up, *down], [gate_up_floats, down_floats]


@pytest.mark.parametrize("float_bytes", [1 << 30, 1], ids=["together", "one by one"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_layer_that_the_stored_numbers_mean(
    layer, dtype: torch.dtype, tolerance: float, float_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, indices, weights), packed, floats = layer
    x = x.to(dtype)
    expected = experts_reference(x.double(), indices, weights.double(), *floats)
    monkeypatch.setattr(room, "FLOAT_BYTES", float_bytes)
    for function in (experts_int4, experts_int4_reference):
        found = function(x, indices, weights, *packed)
        assert found.dtype == dtype
        assert (found.double() - expected).norm() / expected.norm() < tolerance


def test_in_bf16_a_weight_is_the_product_rounded_once(layer) -> None:
    """The exact product is known in fp64."""
    words, scale, floats = stack(2 * WIDTH, HIDDEN, torch.Generator().manual_seed(1))
    found = room._floats((words, scale, words, scale), torch.tensor([4, 1]), torch.bfloat16)[0]
    assert torch.equal(found, floats[[4, 1]].bfloat16())


def test_gradients_reach_tokens_and_weights(layer, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, indices, weights), packed, floats = layer
    found = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    expected = [x.double().requires_grad_(), weights.double().requires_grad_()]
    experts_reference(expected[0], indices, expected[1], *floats).square().sum().backward()
    for float_bytes in (1 << 30, 1):
        monkeypatch.setattr(room, "FLOAT_BYTES", float_bytes)
        for tensor in found:
            tensor.grad = None
        experts_int4(found[0], indices, found[1], *packed).square().sum().backward()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)
