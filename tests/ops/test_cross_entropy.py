"""Chunked cross-entropy against PyTorch's on the whole logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops import cross_entropy as room
from moonbase.ops.cross_entropy import cross_entropy, cross_entropy_reference


def inputs(tokens: int, dims: int, vocab: int, seed: int = 0, ignored: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dims, generator=generator).requires_grad_()
    head = torch.randn(vocab, dims, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, head, targets


@given(
    tokens=st.integers(0, 40), dims=st.integers(1, 16), vocab=st.integers(1, 50),
    chunk=st.sampled_from([1, 3, 7, 40, None]), ignored=st.sampled_from([0.0, 0.3, 1.0]),
    upstream=st.sampled_from([1.0, -0.37]), seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_fast_equals_reference(tokens, dims, vocab, chunk, ignored, upstream, seed) -> None:
    hidden, head, targets = inputs(tokens, dims, vocab, seed, ignored)
    loss = cross_entropy(hidden, head, targets, chunk)
    expected = cross_entropy_reference(hidden, head, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(loss * upstream, (hidden, head))
    plain = torch.autograd.grad(expected * upstream, (hidden, head))
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    hidden, head, targets = inputs(9, 4, 11)
    for wanted, frozen in ((hidden, head), (head, hidden)):
        frozen.requires_grad_(False)
        cross_entropy(hidden, head, targets, 4).backward()
        assert wanted.grad is not None and frozen.grad is None
        (expected,) = torch.autograd.grad(cross_entropy_reference(hidden, head, targets), wanted)
        torch.testing.assert_close(wanted.grad, expected)
        wanted.grad = None
        frozen.requires_grad_(True)


def test_huge_logits_stay_finite_and_right() -> None:
    hidden, head, targets = inputs(12, 6, 20)
    big = (hidden.detach() * 1e4).requires_grad_()
    loss = cross_entropy(big, head, targets, 5)
    loss.backward()
    expected = F.cross_entropy((big @ head.T).double(), targets, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert big.grad.isfinite().all() and head.grad.isfinite().all()


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    hidden, head, targets = inputs(12, 6, 20, ignored=1.0)
    loss = cross_entropy(hidden, head, targets, 5)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not head.grad.any()


def test_evaluation_makes_no_gradients(monkeypatch) -> None:
    hidden, head, targets = inputs(12, 6, 20)
    asked = []
    chunk = room._chunk
    monkeypatch.setattr(room, "_chunk", lambda *arguments: asked.append(arguments[3]) or chunk(*arguments))
    with torch.no_grad():
        quiet = cross_entropy(hidden, head, targets, 5)
    assert not quiet.requires_grad and asked == [False] * 3
    torch.testing.assert_close(quiet, cross_entropy(hidden, head, targets, 5).detach())


def test_bfloat16_follows_fp32() -> None:
    hidden, head, targets = (t.detach().bfloat16() if t.is_floating_point() else t for t in inputs(30, 16, 40))
    hidden.requires_grad_(), head.requires_grad_()
    loss = cross_entropy(hidden, head, targets, 8)
    loss.backward()
    wide = [t.detach().float().requires_grad_() for t in (hidden, head)]
    expected = cross_entropy_reference(*wide, targets)
    expected.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == head.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(hidden.grad.float(), wide[0].grad, rtol=3e-2, atol=5e-2)
    torch.testing.assert_close(head.grad.float(), wide[1].grad, rtol=3e-2, atol=5e-2)


def test_the_same_input_twice_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        hidden, head, targets = inputs(50, 16, 70, seed=2)
        loss = cross_entropy(hidden, head, targets, 16)
        loss.backward()
        results.append([loss, hidden.grad, head.grad])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
