"""Clipping that would change nothing is left out, and only that."""

from __future__ import annotations

import math

import torch

from moonbase.optim.gradients import clip_gradients_, grad_norm, may_clip


def test_clipping_is_left_out_only_where_it_changes_no_bit() -> None:
    generator, left_out = torch.Generator().manual_seed(0), 0
    for spread in (0.5, 1e-2, 1e-4, 1e-5, 3e-6, 1e-6, 1e-7, 0.0) * 4:
        parameter = torch.zeros(40, requires_grad=True)
        gradient = torch.randn(40, generator=generator)
        parameter.grad = gradient * (3.0 * (1 - spread) / gradient.norm())
        before, norm = parameter.grad.clone(), grad_norm([parameter])
        if not may_clip(3.0, norm.item()):
            left_out += 1
            clip_gradients_([parameter], 3.0, norm)
            assert torch.equal(parameter.grad, before)
    assert 12 <= left_out < 32
    assert may_clip(1.0, 1.5) and may_clip(1.0, math.nan) and may_clip(1.0, math.inf) and not may_clip(1.0, 0.0)
