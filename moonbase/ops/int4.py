"""INT4 in groups, as Kimi K2-Thinking and K2.5 hold their routed experts: the scale of a group, and fake quantisation.

A group is 32 neighbours along a matrix's input; they share a bf16 scale s and are whole multiples q·s with q in -8..7.
Fake quantisation writes those products back as floats, so that a model trains with what an INT4 engine will read
(quantisation-aware training; K2-Thinking's is weight-only, on the routed experts alone). Its gradient is the identity
(straight-through): whoever calls it gives the gradient of the products to the weights that they were made of.

**A group that is on a grid stays on it, bit for bit.** Weights that were read from an INT4 checkpoint are such whole
multiples in fp32, but the rules below would give some of them another scale (a group of absmax/7.5 whose largest
magnitude became 8·s, for one). So every group is first looked at for a scale that explains it exactly. An INT4 release
is thereby a valid start of fine-tuning, and quantising twice is quantising once.

`int4_cuda.py` is the fast twin of `fake_quantize_`: the same values, but for the sign of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moonbase.layout import INT4_GROUP, Int4Rule

INT4_RULES: dict[str, tuple[float, ...]] = {
    "absmax/7": (7.0,), "absmax/7.5": (7.5,), "least-error": (7.0, 7.5, 8.0)}
"""Divisors of a group's largest magnitude; of several the one with the least squared error, of equals the first.
Numbers are held within -8..7; absmax/7 never leaves ±7.

absmax/7 is the rule of the public quantisation-aware training code, absmax/7.5 that of compressed-tensors; which one
the published weights were trained with is not known. least-error moves little where training goes on from either.
"""
INT4_SCALE_FLOOR = 1e-5
"""What the public quantisation-aware training code uses; keeps all-zero groups finite."""
_SMALLEST = torch.finfo(torch.bfloat16).tiny
"""Scale of a grid: compressed-tensors has no such floor."""
_CHUNK = 1 << 22
"""Weights looked at at once: the reference needs several times their memory."""


def int4_scales(groups: Tensor, rule: Int4Rule) -> Tensor:
    """Groups fp32 [..., group] -> bf16 scales [...]."""
    largest = groups.abs().amax(dim=-1)
    best = least = None
    for divisor in INT4_RULES[rule]:
        scale = (largest / divisor).clamp_min(INT4_SCALE_FLOOR).bfloat16().float()
        error = (int4_numbers(groups, scale).mul_(scale.unsqueeze(-1)) - groups).square_().sum(-1)
        # The first whatever its error: of a group that holds infinity or NaN it makes NaN, which a guard can see.
        best = scale if best is None else torch.where(error < least, scale, best)
        least = error if least is None else torch.minimum(error, least)
    assert best is not None
    grid = _grid(groups, largest)
    return torch.where(grid > 0, grid, best).bfloat16()


def int4_numbers(groups: Tensor, scales: Tensor) -> Tensor:
    """Groups fp32 [..., group] over their *stored* scales, rounded half to even: whole numbers as fp32."""
    return (groups / scales.float().unsqueeze(-1)).round_().clamp_(-8, 7)


def _grid(groups: Tensor, largest: Tensor) -> Tensor:
    """The scale of which all of a group are multiples within -8..7, exactly, as fp32; 0 where there is none."""
    found = torch.zeros_like(largest)
    for steps in range(1, 9):
        scale = largest / steps
        # Scales are bf16: of weights that training has moved hardly a group comes so far.
        possible = ((scale.bfloat16().float() == scale) & (scale >= _SMALLEST)).nonzero(as_tuple=True)
        scale, weights = scale[possible], groups[possible]
        numbers = (weights / scale.unsqueeze(-1)).round_()
        explained = (numbers * scale.unsqueeze(-1) == weights).all(-1) & (numbers.amax(-1) <= 7)
        found[possible] = torch.where(explained, scale, found[possible])
    return found


@torch.no_grad()
def fake_quantize_(out: Tensor, weight: Tensor, rule: Int4Rule = "absmax/7", group: int = INT4_GROUP) -> Tensor:
    """`out` becomes what INT4 makes of `weight` [..., input], any float dtypes; returns `out`. Both are contiguous, the
    input a multiple of `group`."""
    if weight.is_cuda:
        from moonbase.ops.int4_cuda import fake_quantize_cuda_

        return fake_quantize_cuda_(out, weight, rule, group)
    for into, part in zip(out.view(-1, group).split(_CHUNK // group), weight.view(-1, group).split(_CHUNK // group),
                          strict=True):
        groups = part.float()
        scales = int4_scales(groups, rule)
        into.copy_(int4_numbers(groups, scales).mul_(scales.float().unsqueeze(-1)))
    return out
