"""The experts' products in CUDA C++ against fp64, each with what stands at its end. Without a GPU they are compiled for
the CPU and run thread by thread (`cuda_on_cpu.h`)."""

from __future__ import annotations

import ctypes
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moonbase.ops import cuda_library, experts_hopper
from moonbase.ops.cuda_library import Launcher
from moonbase.ops.experts import experts, experts_reference
from moonbase.ops.grouped_mm import grouped_mm_reference, grouped_outer_reference

SMALL = ["-DMOONBASE_END_STEPS=2"]  # products of two steps and more
HEADERS = [Path(__file__).parent / name for name in ("experts_on_cpu.h", "cuda_on_cpu.h")]


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL | None:
    """None: the machine's own, on its GPU."""
    if torch.cuda.is_available():
        if not experts_hopper.available():
            pytest.skip("no nvcc, or not a Hopper GPU")
        return None
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-x", "c++", *SMALL, "-include", str(HEADERS[0])]
    return cuda_library.build("experts_hopper", command, headers=HEADERS)


@pytest.fixture
def device(kernels: ctypes.CDLL | None, monkeypatch: pytest.MonkeyPatch) -> str:
    if kernels is None:
        return "cuda"
    monkeypatch.setattr(experts_hopper, "LEAST_DEPTH", 64)
    blocks = itertools.cycle([2, 4])  # one or two clusters
    monkeypatch.setattr(experts_hopper._KERNELS, "on",
                        lambda device: Launcher("experts_hopper", kernels, next(blocks), 0))
    return "cpu"


def run(op: Callable[..., Any], *given: Tensor) -> Any:
    """Whatever the kernel leaves out is not a number."""
    torch.use_deterministic_algorithms(True)  # fills what is taken
    try:
        return op(*given)
    finally:
        torch.use_deterministic_algorithms(False)


def close(out: Tensor, right: Tensor, error: float) -> None:
    out = out.double()
    assert out.isfinite().all()
    assert (out - right).norm() <= error * right.norm()
    assert (out - right).abs().max() <= 2 * error * right.abs().max()


def ends_of(counts: list[int], device: str) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0).int()


def normal(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).bfloat16()


def check(device: str, counts: list[int], hidden: int, width: int) -> None:
    torch.manual_seed(hidden)
    rows, experts, ends = sum(counts), len(counts), ends_of(counts, device)
    x = normal(rows, hidden, device=device)
    gate_up = normal(experts, 2 * width, hidden, device=device, scale=hidden**-0.5)
    down = normal(experts, hidden, width, device=device, scale=width**-0.5)
    weight = torch.rand(rows, device=device)

    between, activation = run(experts_hopper.gate_up_product, x, gate_up, weight, ends)
    close(between, grouped_mm_reference(x.double(), gate_up.double().mT, ends), 3e-3)
    # From what was rounded: the kernel's own, against which a mistake in a hundredth of the numbers would show.
    gate, up = between.double().chunk(2, -1)
    close(activation, torch.nn.functional.silu(gate) * up * weight[:, None].double(), 3e-3)
    close(run(experts_hopper.product, activation, down, ends),
          grouped_mm_reference(activation.double(), down.double().mT, ends), 3e-3)

    grad, grad_between = (normal(rows, size, device=device) for size in (hidden, 2 * width))
    for given, weights in ((grad, down), (grad_between, gate_up)):
        close(run(experts_hopper.gradient, given, weights, ends),
              grouped_mm_reference(given.double(), weights.double(), ends), 3e-3)
    close(run(experts_hopper.weight_gradient, grad_between, x, ends),
          grouped_outer_reference(grad_between.double(), x.double(), ends), 3e-3)
    close(run(experts_hopper.weight_gradient, grad, activation, ends),
          grouped_outer_reference(grad.double(), activation.double(), ends), 3e-3)


def test_products_and_their_ends(device: str) -> None:
    """Experts that begin anywhere, one without rows; a tile of which every block has a part; columns that end within a
    tile."""
    check(device, [5, 0, 130], *((128, 192) if device == "cpu" else (1024, 576)))


def test_the_ring_goes_round(device: str) -> None:
    """Ten steps, two tiles of rows and two of columns, one after the other."""
    rows, weights, ends = normal(260, 640, device=device), normal(1, 320, 640, device=device), ends_of([260], device)
    close(run(experts_hopper.product, rows, weights, ends), rows.double() @ weights[0].double().T, 3e-3)


def test_no_rows(device: str) -> None:
    empty, ends = torch.empty(0, 64, dtype=torch.bfloat16, device=device), ends_of([0, 0], device)
    assert run(experts_hopper.product, empty, normal(2, 64, 64, device=device), ends).shape == (0, 64)
    assert not run(experts_hopper.weight_gradient, empty, empty, ends).any()


def test_shapes_for_the_compiler() -> None:
    """What it is told of results without their being made is what they are."""
    with FakeTensorMode():
        x, between = (torch.empty(7, size, dtype=torch.bfloat16) for size in (64, 640))
        gate_up = torch.empty(3, 640, 64, dtype=torch.bfloat16)
        weight, ends = torch.empty(7), torch.empty(3, dtype=torch.int32)
        made = [*experts_hopper.gate_up_product(x, gate_up, weight, ends), experts_hopper.product(x, gate_up, ends),
                experts_hopper.gradient(between, gate_up, ends), experts_hopper.weight_gradient(between, x, ends)]
    assert [tuple(each.shape) for each in made] == [(7, 640), (7, 320), (7, 640), (7, 64), (3, 640, 64)]
    assert all(each.dtype == torch.bfloat16 for each in made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("counts", "hidden", "width"), [
    ([4096] * 8, 1024, 512), ([1, 0, 7000, 128, 129, 64, 65, 300], 1024, 512), ([100, 3000], 2048, 1408)])
def test_larger_layers(counts: list[int], hidden: int, width: int, kernels: None) -> None:
    check("cuda", counts, hidden, width)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_in_a_cuda_graph(kernels: None) -> None:
    """The graph follows new rows and other ends."""
    torch.manual_seed(0)
    weights = normal(4, 512, 1024, device="cuda")
    cases = [(normal(900, 1024, device="cuda"), ends_of(counts, "cuda"))
             for counts in ([100, 300, 0, 500], [899, 0, 0, 1])]
    held = [each.clone() for each in cases[0]]
    right = [experts_hopper.product(rows, weights, ends) for rows, ends in cases]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts_hopper.product(held[0], weights, held[1])
    for case, expected in zip(cases[::-1], right[::-1], strict=True):
        for each, new in zip(held, case, strict=True):
            each.copy_(new)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_layer_of_experts(kernels: None) -> None:
    """Forward and backward, in whatever form the layer takes on this GPU."""
    torch.manual_seed(0)
    x, gate_up, down = (normal(*shape, device="cuda", scale=scale).requires_grad_() for shape, scale in (
        ((600, 1024), 1.0), ((8, 1024, 1024), 1 / 32), ((8, 1024, 512), 1 / 22)))
    weights, indices = torch.rand(600, 8, device="cuda").topk(3)
    inputs = x, weights.requires_grad_(), gate_up, down
    grad = normal(600, 1024, device="cuda")
    gradients = torch.autograd.grad(experts(x, indices, *inputs[1:]), inputs, grad)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    right = torch.autograd.grad(experts_reference(exact[0], indices, *exact[1:]), exact, grad.double())
    for mine, theirs in zip(gradients, right, strict=True):
        close(mine, theirs, 1e-2)
