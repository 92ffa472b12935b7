"""The codecs against compressed-tensors and brute force."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from moonbase.checkpoint.formats import dequantize_fp8, quantize_fp8, quantize_int4
from moonbase.ops.int4_packed import dequantize_int4, pack_int4, unpack_int4

GROUP = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_packing_is_that_of_compressed_tensors() -> None:
    numbers = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack_int4(numbers)
    assert torch.equal(packed, pack_to_int32(numbers, 4))
    assert torch.equal(unpack_int4(packed), numbers)
    assert torch.equal(unpack_int4(packed), unpack_from_int32(packed, 4, torch.Size((6, 64))))


def test_packing_bit_by_bit() -> None:
    numbers = torch.randint(-8, 8, (2, 16), generator=torch.Generator().manual_seed(1))
    packed = pack_int4(numbers)
    for row in range(2):
        for column in range(16):
            word = packed[row, column // 8].item() & 0xFFFFFFFF
            assert (word >> (4 * (column % 8)) & 15) - 8 == numbers[row, column]


def test_int4_minmax_rule_is_that_of_compressed_tensors() -> None:
    weight = random(8, 96).bfloat16()
    groups = weight.unflatten(1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), GROUP)
    numbers = quantize(weight.float(), scale.float(), zero, GROUP, dtype=torch.int8)
    packed, ours = quantize_int4(weight, "absmax/7.5")
    assert torch.equal(ours, scale)
    assert torch.equal(unpack_int4(packed), numbers)


@pytest.mark.parametrize("rule", ["absmax/7", "absmax/7.5"])
def test_int4_brute_force(rule: str) -> None:
    weight = random(3, 64) * torch.tensor([[1e-3], [1.0], [100.0]])
    weight[1, 32:] = 0
    packed, scale = quantize_int4(weight, rule)
    numbers = unpack_int4(packed)
    lowest, divisor = (-7, 7.0) if rule == "absmax/7" else (-8, 7.5)
    for row in range(3):
        for group in range(2):
            part = weight[row, 32 * group : 32 * group + 32]
            expected = torch.tensor(max(part.abs().max().item() / divisor, 1e-5)).bfloat16()
            assert scale[row, group] == expected
            for column, value in enumerate(part.tolist()):
                number = min(max(round(torch.tensor(value).div(expected.float()).item()), lowest), 7)
                assert numbers[row, 32 * group + column] == number
    assert torch.equal(dequantize_int4(packed, scale), numbers.float() * scale.float().repeat_interleave(32, 1))
    error = (dequantize_int4(packed, scale) - weight).abs()
    assert (error <= 0.6 * scale.float().repeat_interleave(32, 1)).all()


def test_int4_dequantises_like_compressed_tensors() -> None:
    packed, scale = quantize_int4(random(4, 64))
    theirs = dequantize(unpack_int4(packed), scale, None, GROUP)
    assert torch.equal(dequantize_int4(packed, scale, dtype=torch.bfloat16), theirs)


def test_int4_again_changes_nothing() -> None:
    """Weights that came from INT4 with a full group survive a second pass."""
    packed, scale = quantize_int4(random(16, 256))
    again, scale_again = quantize_int4(dequantize_int4(packed, scale))
    assert torch.equal(packed, again) and torch.equal(scale, scale_again)


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (5, 7), (129, 1)])
def test_fp8_brute_force(shape: tuple[int, int]) -> None:
    weight = random(*shape) * 3
    stored, scale = quantize_fp8(weight)
    assert stored.dtype == torch.float8_e4m3fn and stored.shape == shape
    assert scale.dtype == torch.float32 and scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    whole = dequantize_fp8(stored, scale)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            assert scale[i, j] == weight[block].abs().max() / 448
            assert torch.equal(stored[block].float(), (weight[block] / scale[i, j]).to(torch.float8_e4m3fn).float())
            assert torch.equal(whole[block], stored[block].float() * scale[i, j])
    # e4m3 has 3 bits of mantissa: half a step is 1/16 of the value, or half the smallest step near zero.
    assert ((whole - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-10).all()


def test_fp8_of_zeros_and_of_tiny_values_is_finite() -> None:
    for weight in (torch.zeros(130, 130), torch.full((4, 4), 1e-44), torch.full((4, 4), 3e38)):
        stored, scale = quantize_fp8(weight)
        assert stored.float().isfinite().all() and scale.isfinite().all() and (scale > 0).all()
        assert dequantize_fp8(stored, scale).isfinite().all()
