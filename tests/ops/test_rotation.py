"""The CPU kernel of rotary positions against the definition in `model.rope`, both its directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.model import rope
from moonbase.ops import native, rotation

pytestmark = pytest.mark.skipif(not native.available(), reason="no CPU kernels here (no C compiler)")


@given(
    batch=st.integers(1, 3), time=st.integers(1, 140), heads=st.integers(1, 3), dims=st.sampled_from([16, 64]),
    sliced=st.booleans(), own_positions=st.booleans(), flat=st.booleans(), seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_definition(batch, time, heads, dims, sliced, own_positions, flat, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(batch, time, heads, dims + 16, generator=generator)
    x = (whole[..., 16:] if sliced else whole[..., 16:].contiguous()).requires_grad_()
    angles = torch.randn(*((batch,) if own_positions else ()), time, dims // 2, generator=generator)
    if flat:  # decoding: [N, H, R]
        x, angles = x.detach()[0].requires_grad_(), angles[0] if own_positions else angles
    cos, sin = angles.cos(), angles.sin()
    assert rotation.takes(x, cos)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "takes", lambda *_: False)
        expected = rope.rotate(x, cos, sin)
    found = rope.rotate(x, cos, sin)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    direction = torch.randn(x.shape, generator=generator)
    (slope,), (plain,) = (torch.autograd.grad((y * direction).sum(), x) for y in (found, expected))
    torch.testing.assert_close(slope, plain, rtol=1e-6, atol=1e-6)
