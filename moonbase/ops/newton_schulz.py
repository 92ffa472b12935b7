"""Newton-Schulz orthogonalisation: the polar factor U Vᵀ of a matrix by matrix products alone (Muon, Jordan 2024).

An odd quintic p(x) = a x + b x³ + c x⁵ is applied to all singular values at once, X ← a X + (b A + c A²) X with A = X
Xᵀ, after a division by the Frobenius norm has brought them into [0, 1]. Two families of coefficients:

- `quintic`: (3.4445, -4.7750, 2.0315) in every step (Jordan 2024; Moonlight §2.1, Kimi K2 §2.1). Its slope at zero is
  what counts; it does not converge: after 5 steps singular values between 0.01 and 1 lie in [0.68, 1.14].
- `polar_express`: another polynomial in each step, each the best for the interval its predecessors left (Amsel et al.
  2025, Algorithm 1). It converges: singular values from 1e-3 up lie in [0.84, 1.13] after 5 steps, in [0.993, 1.002]
  after 6.

Gram form: every step multiplies X from the left by a polynomial of A, so the steps can run on A (m × m) alone and the
accumulated product be applied to X once. Five steps cost 10 m²n + 5 m³ multiply-adds in the plain form and 2 m²n + 17
m³ in the Gram form, which wins from n = 1.5 m. Squaring loses digits: see `GRAM_STEPS`.

Shapes: N matrices, m the smaller and n the larger of a matrix's two dimensions.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from moonbase.ops import muon_cpu

Coefficients = Literal["quintic", "polar_express"]

_QUINTIC = (3.4445, -4.7750, 2.0315)

# Amsel et al. 2025, Algorithm 1. Every further step is the last line, the Newton-Schulz polynomial of degree 5.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Rounding may push a singular value beyond the interval a polynomial was made for, where it grows; the paper evaluates
# all but the converged polynomial at x / 1.01 and divides by 1.01 times the norm.
_POLAR_EXPRESS_SAFETY = 1.01

# Norms below this count as zero: the matrix is returned scaled down instead of as amplified rounding noise, and an
# all-zero matrix (an expert that saw no token) stays zero. fp32 squares of smaller numbers would underflow anyway.
SMALLEST_NORM = 1e-18


def step_coefficients(steps: int, coefficients: Coefficients) -> list[tuple[float, float, float]]:
    """The (a, b, c) of each step. Raises ValueError for an unknown family."""
    if coefficients == "quintic":
        return [_QUINTIC] * steps
    if coefficients == "polar_express":
        last, safety = len(_POLAR_EXPRESS) - 1, _POLAR_EXPRESS_SAFETY
        safe = [(a / safety, b / safety**3, c / safety**5) for a, b, c in _POLAR_EXPRESS[:last]]
        return (safe + [_POLAR_EXPRESS[last]] * max(0, steps - last))[:steps]
    raise ValueError(f"ns_coefficients={coefficients!r}: 'quintic' or 'polar_express' expected")


def orthogonalize_reference(matrix: Tensor, steps: int = 5, coefficients: Coefficients = "quintic") -> Tensor:
    """Orthogonalise one matrix [rows, columns] in its own dtype: the definition that `orthogonalize` is held to."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    safety = _POLAR_EXPRESS_SAFETY if coefficients == "polar_express" else 1.0
    x = x / (safety * x.norm()).clamp_min(SMALLEST_NORM)
    for a, b, c in step_coefficients(steps, coefficients):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


# How many steps the Gram form may run before X is rebuilt and squared afresh. Rounding A = X Xᵀ to relative precision u
# leaves eigenvalue errors of u, negative ones too, which every step multiplies by its squared slope at zero. Measured
# against fp64 on matrices whose singular values span five decades, 5 steps, relative error in the Frobenius norm:
#   fp32: plain 1e-5, Gram in runs of 5 6e-4, of 3 2e-5
#   bf16: plain 1e-1, Gram in runs of 5 diverges, of 3 2e-1, of 2 1e-1
GRAM_STEPS = {torch.float64: 5, torch.float32: 3, torch.bfloat16: 2}


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on an accelerator, fp32 on every CPU.

    Five contracting steps forgive bf16's 8 digits, as the published runs did. Processors without bf16 units emulate
    the products 16 to 54 times slower than fp32. Those that have them keep fp32 too: the kernels in C work in it and
    are faster at the sizes one trains on a CPU (docs/log.md), and a run takes the same course when another processor
    takes it up. `MuonClip(ns_dtype=torch.bfloat16)` chooses otherwise.
    """
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def default_workspace_bytes(device: torch.device | str) -> int:
    """Scratch memory of one chunk: enough to fill a GPU; little enough on a CPU to stay in its caches (1.5× faster)."""
    return 4 << 20 if torch.device(device).type == "cpu" else 1 << 30


def gram_pays(rows: int, columns: int, steps: int, dtype: torch.dtype) -> bool:
    """Whether the Gram form is worth it: a tenth fewer operations, its restarts included.

    In bf16 its small products must also fill the device. Measured on an H200, plain against Gram: 48 of 2048 × 7168 57
    and 45 ms, 128 of 512 × 1024 2.5 and 2.5 ms, 12 of 4096 × 256 0.5 and 0.9 ms.
    """
    m, n = min(rows, columns), max(rows, columns)
    if dtype == torch.bfloat16 and m < 512:
        return False
    runs = -(-steps // GRAM_STEPS.get(dtype, 1))
    plain = steps * (4 * m * m * n + 2 * m**3)
    # Per run: 2 m²n to square and 2 m²n to apply; 8 m³ a step, less the first step's product and the last one's square.
    gram = runs * 4 * m * m * n + (8 * steps - 6 * runs) * m**3
    return gram < 0.9 * plain


def iteration_on_cpu(rows: int, columns: int, steps: int, coefficients: Coefficients) -> muon_cpu.Iteration:
    """What `orthogonalize` would do with fp32 matrices, for the CPU kernel."""
    return _iteration(steps, coefficients, gram_pays(rows, columns, steps, torch.float32))


@functools.cache
def _iteration(steps: int, coefficients: Coefficients, gram: bool) -> muon_cpu.Iteration:
    return muon_cpu.Iteration(
        step_coefficients(steps, coefficients), GRAM_STEPS[torch.float32] if gram else 1,
        _POLAR_EXPRESS_SAFETY if coefficients == "polar_express" else 1.0, SMALLEST_NORM)


def matrices_per_chunk(rows: int, columns: int, dtype: torch.dtype, workspace_bytes: int) -> int:
    """How many matrices may be orthogonalised at once: per matrix two copies of X and at most five m × m products."""
    m, n = min(rows, columns), max(rows, columns)
    return max(1, workspace_bytes // ((2 * m * n + 5 * m * m) * dtype.itemsize))


@torch.no_grad()
def orthogonalize(
    matrices: Tensor,
    steps: int = 5,
    coefficients: Coefficients = "quintic",
    dtype: torch.dtype | None = None,
    gram: bool | Literal["auto"] = "auto",
    workspace_bytes: int | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Orthogonalise every matrix of a stack as if it were alone.

    matrices: [N, rows, columns], any floating dtype. The result has the same shape and the compute dtype (`dtype`; by
    default `compute_dtype` of the device). All-zero matrices give zeros. `gram` forces or forbids the Gram form.
    `workspace_bytes` bounds the scratch memory beside input and result; `overwrite` allows the input to be used as
    scratch where it already has the compute dtype. Nothing waits for the device.
    """
    assert matrices.ndim == 3, f"a stack [N, rows, columns] expected, found {tuple(matrices.shape)}"
    dtype = dtype or compute_dtype(matrices.device)
    rows, columns = matrices.shape[1:]
    if gram == "auto":
        gram = gram_pays(rows, columns, steps, dtype)
    if dtype == torch.float32 and muon_cpu.takes(matrices):
        out = matrices if overwrite else torch.empty_like(matrices)
        return muon_cpu.orthogonalize_cpu(matrices, _iteration(steps, coefficients, gram), out)
    polynomials = step_coefficients(steps, coefficients)
    safety = _POLAR_EXPRESS_SAFETY if coefficients == "polar_express" else 1.0
    count = matrices_per_chunk(rows, columns, dtype, workspace_bytes or default_workspace_bytes(matrices.device))
    scratch = matrices if overwrite and matrices.dtype == dtype else None
    if count >= len(matrices):
        return _orthogonalize_chunk(matrices, dtype, polynomials, safety, gram, scratch)
    result = torch.empty(matrices.shape, dtype=dtype, device=matrices.device) if scratch is None else scratch
    for start in range(0, len(matrices), count):
        part = slice(start, start + count)
        in_place = None if scratch is None else scratch[part]
        result[part] = _orthogonalize_chunk(matrices[part], dtype, polynomials, safety, gram, in_place)
    return result


def _orthogonalize_chunk(matrices: Tensor, dtype: torch.dtype, polynomials: list[tuple[float, float, float]],
                         safety: float, gram: bool, scratch: Tensor | None) -> Tensor:
    wide = torch.promote_types(matrices.dtype, torch.float32)
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=wide)
    norm.mul_(safety).clamp_min_(SMALLEST_NORM)
    x = scratch if scratch is not None else torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    if x.is_cuda and matrices.is_contiguous() and wide == torch.float32:
        from moonbase.ops import muon_cuda

        muon_cuda.divide(matrices, norm, x)
    else:
        torch.div(matrices, norm, out=x)
    spare = torch.empty_like(x)
    run = GRAM_STEPS.get(dtype, 1) if gram else 1
    for start in range(0, len(polynomials), run):
        if gram:
            _gram_steps(x, spare, polynomials[start:start + run])
        else:
            a, b, c = polynomials[start]
            square = _square(x)
            # The linear term is added inside the product's epilogue. Putting a on the diagonal instead would quadruple
            # bf16's error, 0.6 % to 2.5 %.
            _apply(_symmetric(square, square, square, beta=b, alpha=c), x, a, out=spare)
        x, spare = spare, x
    return x


def _gram_steps(x: Tensor, out: Tensor, polynomials: list[tuple[float, float, float]]) -> None:
    """Several steps on A = X Xᵀ; their product applied to X goes to `out`."""
    square, product = _square(x), None
    for index, (a, b, c) in enumerate(polynomials):
        bend = _symmetric(square, square, square, beta=b, alpha=c)  # the step is a I + bend
        last = index + 1 == len(polynomials)
        if last and product is None:
            _apply(bend, x, a, out=out)
            return
        if not last:
            # All these matrices are polynomials of one symmetric matrix: they commute, the next square is step² · A.
            half = _symmetric(square, bend, square, beta=a)
            square = _symmetric(half, bend, half, beta=a, out=square)
        if product is None:
            product = bend
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = _symmetric(product, bend, product, beta=a)
    if x.shape[1] <= x.shape[2]:
        torch.bmm(product, x, out=out)
    else:
        torch.bmm(x, product, out=out)


def _square(x: Tensor) -> Tensor:
    """The smaller Gram matrix [N, m, m]: X Xᵀ of wide matrices, Xᵀ X of tall ones."""
    left, right = (x, x.mT) if x.shape[1] <= x.shape[2] else (x.mT, x)
    if _has_kernels(x):
        return _products().product(left, right, symmetric=True)
    return torch.bmm(left, right)


def _symmetric(added: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float = 1.0,
               out: Tensor | None = None) -> Tensor:
    """beta · added + alpha · left · right, of matrices [N, m, m] that are polynomials of one symmetric matrix."""
    if _has_kernels(left):
        return _products().product(left, right, added, alpha, beta, out, symmetric=True)
    return torch.baddbmm(added, left, right, beta=beta, alpha=alpha, out=out)


def _apply(bend: Tensor, x: Tensor, a: float, out: Tensor) -> None:
    """out = (a I + bend) X, from the side that `_square` contracts (tall matrices are never transposed in memory)."""
    left, right = (bend, x) if x.shape[1] <= x.shape[2] else (x, bend)
    if _has_kernels(x):
        _products().product(left, right, x, 1.0, a, out)
    else:
        torch.baddbmm(x, left, right, beta=a, out=out)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and _products().takes(x)


def _products() -> ModuleType:
    from moonbase.ops import symmetric_cuda  # loaded only on a GPU

    return symmetric_cuda
