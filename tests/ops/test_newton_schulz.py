"""Newton-Schulz against its reference, the singular value decomposition and the scalar polynomials."""

from __future__ import annotations

import pytest
import torch

from moonbase.ops.newton_schulz import (
    compute_dtype,
    gram_pays,
    orthogonalize,
    orthogonalize_reference,
    step_coefficients,
)

SHAPES = [(1, 7, 7), (3, 8, 24), (5, 24, 8), (2, 1, 9), (2, 9, 1), (4, 16, 64), (3, 33, 17)]


def test_matrices_are_in_bf16_on_an_accelerator_and_in_fp32_on_a_processor() -> None:
    """On every processor, with bf16 units or without; and `orthogonalize` keeps to it."""
    assert [compute_dtype(device) for device in ("cuda", "cuda:1", torch.device("cpu"))] == [
        torch.bfloat16, torch.bfloat16, torch.float32]
    assert orthogonalize(torch.randn(2, 4, 6, dtype=torch.bfloat16)).dtype == torch.float32


def matrix_with_singular_values(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64))[0]
    return left @ torch.diag(values) @ right.mT


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("gram", [True, False, "auto"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fast_equals_reference(shape: tuple[int, int, int], gram: bool | str, coefficients: str) -> None:
    torch.manual_seed(sum(shape))
    matrices = torch.randn(shape, dtype=torch.float64)
    expected = torch.stack([orthogonalize_reference(matrix, 5, coefficients) for matrix in matrices])
    exact = orthogonalize(matrices, 5, coefficients, dtype=torch.float64, gram=gram)
    torch.testing.assert_close(exact, expected, atol=1e-10, rtol=0)
    single = orthogonalize(matrices.float(), 5, coefficients, gram=gram)
    assert single.dtype == torch.float32
    error = (single - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 1e-3  # square random matrices may have a singular value near zero


@pytest.mark.parametrize("gram", [True, False])
def test_bfloat16_stays_near_the_exact_result_on_ill_conditioned_matrices(gram: bool) -> None:
    torch.manual_seed(0)
    matrices = torch.stack([matrix_with_singular_values(torch.logspace(0, -2, 24, dtype=torch.float64), 24, 72)
                            for _ in range(2)])
    expected = torch.stack([orthogonalize_reference(matrix) for matrix in matrices])
    found = orthogonalize(matrices, dtype=torch.bfloat16, gram=gram)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("shape", [(12, 12), (10, 30), (30, 10)])
def test_polar_express_converges_to_the_polar_factor(shape: tuple[int, int], gram: bool) -> None:
    torch.manual_seed(1)
    rank = min(shape)
    matrix = matrix_with_singular_values(torch.logspace(0, -2, rank, dtype=torch.float64), *shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix[None], 8, "polar_express", dtype=torch.float64, gram=gram)[0]
    torch.testing.assert_close(found, left @ right, atol=1e-9, rtol=0)


def test_quintic_keeps_the_singular_vectors_and_brings_the_values_near_one() -> None:
    torch.manual_seed(2)
    values = torch.logspace(0, -1, 16, dtype=torch.float64)
    matrix = matrix_with_singular_values(values, 16, 40)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix[None], dtype=torch.float64)[0]
    inner = left.mT @ found @ right.mT
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-10, rtol=0)
    assert 0.68 < inner.diagonal().min() and inner.diagonal().max() < 1.14


@pytest.mark.parametrize(("coefficients", "steps", "low", "bounds"), [
    ("quintic", 5, 1e-2, (0.68, 1.14)),
    ("polar_express", 5, 1e-3, (0.84, 1.13)),
    ("polar_express", 6, 1e-3, (0.993, 1.002)),
    ("polar_express", 8, 1e-3, (1 - 1e-9, 1 + 1e-9)),
])
def test_scalar_polynomials_reach_the_stated_interval(coefficients: str, steps: int, low: float,
                                                      bounds: tuple[float, float]) -> None:
    x = torch.logspace(torch.tensor(low).log10().item(), 0, 20001, dtype=torch.float64)
    x = x / 1.01 if coefficients == "polar_express" else x
    for a, b, c in step_coefficients(steps, coefficients):
        x = a * x + b * x**3 + c * x**5
    assert bounds[0] < x.min() and x.max() < bounds[1]


def test_polar_express_continues_with_the_newton_schulz_polynomial() -> None:
    assert step_coefficients(10, "polar_express")[7:] == [(1.875, -1.25, 0.375)] * 3
    assert step_coefficients(3, "polar_express") == step_coefficients(10, "polar_express")[:3]
    with pytest.raises(ValueError, match="quintic"):
        step_coefficients(5, "cubic")


def test_zero_matrices_give_zeros_and_do_not_disturb_their_neighbours() -> None:
    torch.manual_seed(3)
    matrices = torch.randn(3, 6, 18)
    matrices[1] = 0
    found = orthogonalize(matrices)
    assert torch.equal(found[1], torch.zeros(6, 18))
    torch.testing.assert_close(found[2], orthogonalize_reference(matrices[2]), atol=1e-5, rtol=0)


def test_a_matrix_that_is_not_finite_stays_alone() -> None:
    torch.manual_seed(4)
    matrices = torch.randn(3, 6, 18)
    matrices[1, 2, 3] = torch.inf
    found = orthogonalize(matrices)
    assert found[1].isnan().any()
    assert found[0].isfinite().all() and found[2].isfinite().all()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_the_scale_of_the_input_does_not_matter(scale: float) -> None:
    torch.manual_seed(5)
    matrices = torch.randn(2, 6, 18)
    torch.testing.assert_close(orthogonalize(matrices * scale), orthogonalize(matrices), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(7, 8, 24), (7, 24, 8)])
def test_chunks_and_overwriting_change_nothing(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(6)
    matrices = torch.randn(shape)
    before = matrices.clone()
    whole = orthogonalize(matrices)
    assert torch.equal(matrices, before)
    torch.testing.assert_close(orthogonalize(matrices, workspace_bytes=6000), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(orthogonalize(matrices, workspace_bytes=6000, overwrite=True), whole, atol=1e-6, rtol=0)


def test_gram_form_is_taken_for_wide_matrices_only() -> None:
    assert not gram_pays(512, 512, 5, torch.float32)
    assert gram_pays(2048, 7168, 5, torch.bfloat16)
    assert gram_pays(7168, 2048, 5, torch.bfloat16)
