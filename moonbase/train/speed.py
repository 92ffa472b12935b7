"""Compilation and recomputation of blocks, from outside the model, and what the hardware could do at best."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Dense bf16 peaks of the datasheets, FLOP/s: what MFU is a share of.
_PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
          "RTX 4090": 165e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the GPU's datasheet, or None where it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)


def recompute_blocks(model: nn.Module, kind: str) -> None:
    """`full` recomputes whole blocks in the backward pass; `none` and `selective` leave them as they are.

    The expert layers always recompute their gathered inputs and activations (see `ops.experts`); `selective` adds
    nothing eager and lets the compiler drop what is cheap to make again.
    """
    if kind != "full":
        return
    for block in model.blocks():
        inner = block.forward

        def recomputed(*args, _inner=inner, **kwargs):
            return checkpoint(_inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        block.forward = recomputed


def compile_blocks(model: nn.Module) -> None:
    """torch.compile block by block: equal blocks share one graph, so compile time does not grow with depth."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for block in model.blocks():
        block.compile(dynamic=False)
