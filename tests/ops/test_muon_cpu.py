"""The CPU kernel behind Newton-Schulz and Muon's update against the one-matrix references in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moonbase.ops import muon_cpu, native
from moonbase.ops.newton_schulz import orthogonalize, orthogonalize_reference
from moonbase.optim import MuonClip
from moonbase.optim.muonclip import muon_reference

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler")
SHAPES = [(3, 16, 16), (5, 32, 128), (5, 128, 32), (2, 48, 192), (1, 64, 48), (2, 128, 384), (1, 384, 128)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_equals_the_reference(shape: tuple[int, int, int], gram: bool, coefficients: str) -> None:
    matrices = normal(*shape) * torch.tensor([1e-6, 1.0, 1e6])[torch.arange(shape[0]) % 3, None, None]
    assert muon_cpu.takes(matrices)
    for steps in (1, 5, 6):
        found = orthogonalize(matrices, steps, coefficients, gram=gram)
        for one, matrix in zip(found, matrices, strict=True):
            assert distance(one.double(), orthogonalize_reference(matrix.double(), steps, coefficients)) < 2e-4


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_optimizer_equals_the_reference_matrix_by_matrix(nesterov: bool) -> None:
    stacks = [nn.Parameter(normal(*shape, seed=seed)) for seed, shape in enumerate(SHAPES)]
    weights = [[matrix.detach().double() for matrix in stack] for stack in stacks]
    momenta = [[torch.zeros_like(matrix) for matrix in matrices] for matrices in weights]
    optimizer = MuonClip(stacks, lr=0.05, weight_decay=0.2, momentum=0.9, nesterov=nesterov)
    for step in range(3):
        for number, stack in enumerate(stacks):
            stack.grad = normal(*stack.shape, seed=100 * step + number)
        optimizer.step(measure_update=True)
        squares = elements = 0.0
        for number, stack in enumerate(stacks):
            for i, gradient in enumerate(stack.grad.double()):
                before = weights[number][i]
                weights[number][i], momenta[number][i] = muon_reference(
                    before, gradient, momenta[number][i], 0.05, mu=0.9, weight_decay=0.2, nesterov=nesterov)
                update = (before * (1 - 0.05 * 0.2) - weights[number][i]) / 0.05
                squares, elements = squares + update.square().sum().item(), elements + update.numel()
        assert optimizer.update_rms().item() == pytest.approx((squares / elements) ** 0.5, rel=1e-4)
    for number, stack in enumerate(stacks):
        assert distance(stack.detach().double(), torch.stack(weights[number])) < 1e-4
        assert distance(optimizer.state[stack]["momentum"].double(), torch.stack(momenta[number])) < 1e-5


def test_bits_depend_neither_on_threads_nor_on_other_matrices() -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(orthogonalize(normal(7, 32, 64)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(orthogonalize(normal(7, 32, 64)[3:5]), results[0][3:5])


def test_what_the_kernel_leaves_to_pytorch() -> None:
    assert not muon_cpu.takes(normal(2, 20, 32))
    assert not muon_cpu.takes(normal(2, 32, 32).double())
    assert not muon_cpu.takes(normal(1, 512, 512))
    assert not muon_cpu.takes(normal(2, 32, 64).mT)
