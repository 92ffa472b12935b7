"""The CPU kernel of the head's cross-entropy against PyTorch's on the whole logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops import native
from moonbase.ops.cross_entropy import cross_entropy, cross_entropy_reference

pytestmark = pytest.mark.skipif(not native.available(), reason="no CPU kernels here (no C compiler)")


def inputs(tokens: int, dims: int, vocab: int, seed: int = 0, ignored: float = 0.3, size: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (size * torch.randn(tokens, dims, generator=generator)).requires_grad_()
    head = torch.randn(vocab, dims, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, head, targets


@given(
    tokens=st.integers(1, 240), dims=st.sampled_from([16, 48, 128]), vocab=st.sampled_from([16, 48, 320, 2048]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]), upstream=st.sampled_from([1.0, -0.37]), seed=st.integers(0, 999),
)
@settings(max_examples=30, deadline=None)
def test_equals_the_reference(tokens, dims, vocab, ignored, upstream, seed) -> None:
    hidden, head, targets = inputs(tokens, dims, vocab, seed, ignored)
    loss, expected = cross_entropy(hidden, head, targets), cross_entropy_reference(hidden, head, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    found = torch.autograd.grad(loss * upstream, (hidden, head))
    for one, other in zip(found, torch.autograd.grad(expected * upstream, (hidden, head)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


def test_several_chunks() -> None:
    hidden, head, targets = inputs(230, 16, 16384)
    loss, expected = cross_entropy(hidden, head, targets), cross_entropy_reference(hidden, head, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for one, other in zip(torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(expected, (hidden, head)),
                          strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    hidden, head, targets = inputs(60, 16, 48)
    expected = torch.autograd.grad(cross_entropy_reference(hidden, head, targets), (hidden, head))
    for wanted, frozen, gradient in ((hidden, head, expected[0]), (head, hidden, expected[1])):
        frozen.requires_grad_(False)
        cross_entropy(hidden, head, targets).backward()
        torch.testing.assert_close(wanted.grad, gradient, rtol=1e-4, atol=1e-4)
        assert frozen.grad is None
        wanted.grad = None
        frozen.requires_grad_(True)
    with torch.no_grad():
        loss = cross_entropy(hidden, head, targets)
    assert torch.equal(loss, cross_entropy(hidden, head, targets)) and not loss.requires_grad


def test_huge_logits_stay_finite_and_right() -> None:
    hidden, head, targets = inputs(50, 16, 48, size=1e4)
    loss = cross_entropy(hidden, head, targets)
    loss.backward()
    expected = cross_entropy_reference(hidden.double(), head.double(), targets)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)
    assert hidden.grad.isfinite().all() and head.grad.isfinite().all()


def test_a_number_that_is_not_finite_is_seen() -> None:
    hidden, head, targets = inputs(50, 16, 48, ignored=0.0)
    hidden.data[7, 3] = torch.nan
    assert cross_entropy(hidden, head, targets).isnan()


def test_a_target_beyond_the_vocabulary() -> None:
    hidden, head, targets = inputs(50, 16, 48)
    targets[4] = 48
    with pytest.raises(IndexError, match="target 48, but the vocabulary has 48 entries"):
        cross_entropy(hidden, head, targets)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    hidden, head, targets = inputs(230, 32, 320)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        loss = cross_entropy(hidden, head, targets)
        results.append([loss, *torch.autograd.grad(loss, (hidden, head))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
