"""Compilation and recomputation of blocks, from outside the model, and what the hardware could do at best."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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
    """Trade time for memory in the backward pass, block by block.

    `none` keeps what autograd keeps (on a CPU the expert layers make their gathered inputs and activations again, see
    `ops.experts`). `selective` keeps only matrix products and attention, and makes again what is cheap and wide: norms,
    SwiGLU, rotations, and the up-projections of MLA (what Kimi K2 recomputes, §2.4). `full` keeps only block inputs.
    """
    assert kind in ("none", "selective", "full"), kind
    if kind == "none":
        return
    policy = {"selective": _policy, "full": _keep_nothing}[kind]
    options = {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
    for block in model.blocks():
        inner = block.forward

        def recomputed(*args, _inner=inner, **kwargs):
            # Keeping nothing takes no policy, but without one the compiler of torch 2.11 overlooks what happens inside
            # autograd functions: attention's inputs and the experts' rows were kept, 1.9 of 2.5 GiB a layer.
            given = options if kind != "full" or torch.compiler.is_compiling() else {}
            return checkpoint(_inner, *args, use_reentrant=False, preserve_rng_state=False, **given, **kwargs)

        block.forward = recomputed


# Outputs that cost more to make than to keep.
_KEPT = frozenset({
    "aten::mm", "aten::mm.dtype", "aten::addmm", "aten::bmm", "aten::_grouped_mm",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "moonbase::packed_attention", "moonbase::exact_above", "moonbase::experts_gate_up", "moonbase::experts_product",
})
_WIDE = 4
"""A product whose output is this many times wider than its input is cheaper to make again than to keep: MLA's
up-projections, 512 → 3072 and 256 → 4096 in `nano`, and gate and up of its dense layer, 1024 → 4096."""


def _policy(ctx: object, operation: torch._ops.OpOverload, *args: object, **kwargs: object) -> CheckpointPolicy:
    name = operation.name()  # overloads that write into a given output have another name and are never kept
    if name not in _KEPT:
        return CheckpointPolicy.PREFER_RECOMPUTE
    if name == "aten::mm" and args[1].shape[1] >= _WIDE * args[1].shape[0]:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def _keep_nothing(ctx: object, operation: torch._ops.OpOverload, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


def compile_blocks(model: nn.Module) -> None:
    """torch.compile block by block: equal blocks share one graph, so compile time does not grow with depth."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for block in model.blocks():
        block.compile(dynamic=False)
