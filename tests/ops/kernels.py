"""The Triton kernels against plain PyTorch. `test_cuda_kernels` runs this file in a process of its own: in Triton's
interpreter on any machine that has triton, and on the GPU where there is one."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F

from moonbase.ops import attention_cuda, cross_entropy_cuda, experts_cuda, latent_attention_cuda
from moonbase.ops.attention import Documents, attention_reference
from moonbase.ops.experts import swiglu, swiglu_backward
from moonbase.ops.latent_attention import latent_attention_reference
from tests.ops.paged import paged

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# A GPU multiplies fp32 matrices in TF32; bf16 values are exact in both, sums of their products nearly so.
EXACT = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab", [1, 37, 64, 9001])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_loss_and_gradient(vocab: int, size: float) -> None:
    logits = (normal(6, vocab + 3) * size)[:, :vocab]  # rows further apart than they are long
    targets = torch.tensor([0, -100, vocab - 1, vocab // 2, -100, 0])
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole, targets, ignore_index=-100, reduction="sum")
    expected.backward()
    there = logits.to(DEVICE)
    loss = cross_entropy_cuda.loss_and_gradient_(there, targets.to(DEVICE))
    torch.testing.assert_close(loss.cpu(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(there.cpu(), whole.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("tokens", "choices", "dims"), [(1, 1, 1), (5, 3, 20), (4, 8, 1300)])
def test_sum_choices(tokens: int, choices: int, dims: int) -> None:
    rows = normal(tokens * choices, dims)
    inverse = torch.randperm(tokens * choices, generator=torch.Generator().manual_seed(1))
    found = experts_cuda.sum_choices(rows.to(DEVICE), inverse.to(DEVICE), choices)
    torch.testing.assert_close(found.cpu(), rows[inverse].view(tokens, choices, dims).sum(1))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 20), (3, 1500)])
def test_swiglu_and_its_backward(rows: int, width: int) -> None:
    gate_up, weight, grad = normal(rows, 2 * width), normal(rows, 1, seed=1), normal(rows, width, seed=2)
    there = [x.to(DEVICE) for x in (grad, gate_up, weight)]
    torch.testing.assert_close(experts_cuda.swiglu(*there[1:]).cpu(), swiglu(gate_up, weight))
    found = experts_cuda.swiglu_backward(*there)
    for one, other in zip(found, swiglu_backward(grad, gate_up, weight)[:2], strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("time", "dims"), [(1, 32), (7, 5), (40, 16), (63, 24), (65, 20), (130, 192), (64, 64)])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_exact_above(time: int, dims: int, packed: bool) -> None:
    query, key = (normal(2, time, 3, dims, seed=seed).to(EXACT) for seed in (1, 2))
    ids = (normal(2, time) > 1).cumsum(1).to(torch.int32) if packed else None
    documents = None if ids is None else Documents(ids)
    _, exact = attention_reference(query, key, key, 0.3, documents)
    there = None if ids is None else ids.to(DEVICE)
    bound = exact + 1.0
    for threshold in (-math.inf, bound.median().item(), math.inf):
        found = attention_cuda.exact_above_cuda(
            query.to(DEVICE), key.to(DEVICE), bound.to(DEVICE), 0.3, threshold, there)
        torch.testing.assert_close(found.cpu(), torch.where(bound > threshold, exact, bound), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dims", "capability", "taken"), [
    (128, (8, 0), True), (192, (8, 0), False), (192, (8, 9), False), (192, (9, 0), True), (192, (10, 0), True),
    (192, (12, 0), False), (64, (12, 0), True),
])
def test_where_cudnn_takes_wide_heads(dims: int, capability: tuple, taken: bool, monkeypatch) -> None:
    """Decided while a graph is traced, in one piece."""
    monkeypatch.setattr(attention_cuda, "_capability", lambda index: capability)

    def branch(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if attention_cuda.cudnn_takes(max(x.shape[-1], 8), 0) else x - 1

    assert attention_cuda.cudnn_takes(dims, 0) == taken
    torch.compiler.reset()
    compiled = torch.compile(branch, fullgraph=True, dynamic=False, backend="eager")
    assert compiled(torch.zeros(dims)).eq(1 if taken else -1).all()


@pytest.mark.skipif(DEVICE != "cuda", reason="the fused kernels behind it exist on a GPU only")
@pytest.mark.parametrize("capability", [None, (8, 0)], ids=["this GPU", "a GPU whose cuDNN has no wide heads"])
@pytest.mark.parametrize("chance", [0.0, 0.01, 0.7], ids=["one document", "packed", "more documents than usual"])
def test_fused_attention_forward_and_backward(chance: float, capability: tuple | None, monkeypatch) -> None:
    from moonbase.ops.attention import attention

    if capability is not None:
        monkeypatch.setattr(attention_cuda, "_capability", lambda index: capability)
    tensors = [normal(2, 256, 4, dims, seed=seed).cuda().bfloat16().requires_grad_()
               for seed, dims in enumerate((192, 192, 128))]
    ids = (torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) < chance).cumsum(1).to(torch.int32)
    documents = Documents.from_ids(ids, torch.device("cuda"))
    output, largest = attention(*tensors, 0.0722, documents, -math.inf)
    wide = [x.detach().float().requires_grad_() for x in tensors]
    expected, exact = attention_reference(*wide, 0.0722, documents)
    direction = normal(*output.shape, seed=9).cuda()
    torch.testing.assert_close(output.float(), expected, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(largest, exact, rtol=1e-3, atol=1e-3)
    found = torch.autograd.grad((output.float() * direction).sum(), tensors)
    for one, other in zip(found, torch.autograd.grad((expected * direction).sum(), wide), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=5e-2, atol=1e-1)


@pytest.mark.skipif(DEVICE != "cuda", reason="on a CPU it is a product of fp32 copies, which test_attention looks at")
def test_wide_product() -> None:
    from moonbase.ops.attention import wide_product

    a, b = (normal(2, *shape, seed=seed).bfloat16() for seed, shape in enumerate([(5, 64), (64, 9)]))
    found = wide_product(a.cuda(), b.cuda())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), a.float() @ b.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("heads", "rank", "rope", "longest"), [(1, 16, 16, 5), (4, 48, 16, 40), (20, 20, 6, 150)])
def test_latent_attention(heads: int, rank: int, rope: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_attention_cuda, "STRETCHES", 2)  # contexts of one, two and three shortest stretches
    monkeypatch.setattr(latent_attention_cuda, "SHORTEST", 32)
    case = paged(heads, rank, rope, [longest, 1, longest // 2], new_tokens=[3, 1, 2], seed=heads)
    query, store = case[0].to(EXACT), case[1].to(EXACT)
    expected = latent_attention_reference(query.float(), store.float(), *case[2:], 0.3, rank)
    found = latent_attention_cuda.latent_attention_cuda(
        query.to(DEVICE), store.to(DEVICE), *(tensor.to(DEVICE) for tensor in case[2:]), 0.3, rank)
    # On a GPU the softmax weights are rounded to bf16 for their product.
    tolerance = dict(rtol=2e-2, atol=2e-2) if DEVICE == "cuda" else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.float().cpu(), expected, **tolerance)
