"""One layer of routed experts in INT4 while decoding, beside the same layer with bf16 (on a CPU fp32) weights.

The time is that of reading the weights of the experts hit, so that is the roof: their bytes at the measured rate of
reading. Every call of a round has experts of its own, drawn anew, so that no cache holds them; both sides are measured
in turns. Before anything is timed, results are compared with fp64 products of the numbers that the words stand for.

Shapes: N tokens, K choices per token, E experts, D hidden, I width of an expert.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moonbase.bench.timing import alternating_seconds, read_ceiling
from moonbase.config import ModelConfig
from moonbase.errors import UserError
from moonbase.layout import INT4_GROUP
from moonbase.ops.int4_chunks import divides, pack_chunks
from moonbase.ops.int4_packed import dequantize_int4
from moonbase.recipe import load_recipe

_BATCHES_GPU, _BATCHES_CPU = (1, 16, 64, 256), (1, 16)
_CALLS = 8
"""Calls of a round, each with other experts."""
_INT4_BYTES = 0.5 + 2 / INT4_GROUP
"""A weight with its part of a bf16 scale."""


class _Layer(NamedTuple):
    """Words int32 [E, rows, inputs / 8] and scales bf16 [E, rows, inputs / 32]."""

    gate_up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


class _Call(NamedTuple):
    x_ND: Tensor
    indices_NK: Tensor
    weights_NK: Tensor


def measure(preset: str, peer: str | None) -> list[dict[str, Any]]:
    """A row for each batch."""
    config = load_recipe(preset).model
    if not config.n_routed_experts:
        raise UserError(f"bench moe: {preset} has no routed experts; take a preset of a sparse model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = _random_layer(config, device)
    ours, theirs, ceiling = _ours(layer, config), _torch(layer) if peer else None, read_ceiling()
    rows = []
    for batch in _BATCHES_GPU if device.type == "cuda" else _BATCHES_CPU:
        calls = [_random_call(config, batch, device) for _ in range(_CALLS)]
        _check(ours, layer, calls[0])
        works = {"ours": _round(ours, calls)} | ({"peer": _round(theirs, calls)} if theirs else {})
        times = {name: value / _CALLS for name, value in alternating_seconds(works, rounds=15, warmup=3).items()}
        weights_each = 3 * config.hidden_size * config.moe_intermediate_size
        hit = sum(len(call.indices_NK.unique()) for call in calls) / _CALLS
        rows.append({
            "shape": f"{batch} x {config.num_experts_per_tok} of {config.n_routed_experts} experts "
                     f"{config.hidden_size} x {config.moe_intermediate_size}, {hit:.1f} hit",
            "unit": "layers/s", "ours": 1 / times["ours"], "peer": 1 / times["peer"] if peer else None,
            "peer_name": _peer_name(device) if peer else None,
            "ratio": times["peer"] / times["ours"] if peer else None,
            "roof_share": hit * weights_each * _INT4_BYTES / times["ours"] / ceiling,
        })
        print(f"{rows[-1]['shape']}: {times['ours'] * 1e6:,.0f} us, {rows[-1]['roof_share']:.0%} of the rate of reading"
              + (f"; {rows[-1]['peer_name']} {times['peer'] * 1e6:,.0f} us" if peer else ""),
              file=sys.stderr, flush=True)
    return rows


def _peer_name(device: torch.device) -> str:
    return "torch F.grouped_mm, bf16 (vllm's INT4 kernels: not installed)" if device.type == "cuda" else "torch, fp32"


def _random_layer(config: ModelConfig, device: torch.device) -> _Layer:
    experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size

    def stack(rows: int, inputs: int) -> tuple[Tensor, Tensor]:
        words = torch.randint(-(2**31), 2**31 - 1, (experts, rows, inputs // 8), dtype=torch.int32, device=device)
        scales = (torch.rand(experts, rows, inputs // INT4_GROUP, device=device) + 0.5) / (4 * inputs**0.5)
        return words, scales.bfloat16()

    return _Layer(stack(2 * width, hidden), stack(hidden, width))


def _random_call(config: ModelConfig, batch: int, device: torch.device) -> _Call:
    scores_NE = torch.rand(batch, config.n_routed_experts, device=device)
    weights_NK, indices_NK = scores_NE.topk(config.num_experts_per_tok)
    x_ND = torch.randn(batch, config.hidden_size, device=device)
    return _Call(x_ND.to(torch.bfloat16 if device.type == "cuda" else torch.float32), indices_NK.contiguous(),
                 weights_NK / weights_NK.sum(-1, keepdim=True))


def _ours(layer: _Layer, config: ModelConfig) -> Callable[[_Call], Tensor]:
    """The layer's output [N, D], with the kernels that the engine takes."""
    if layer.down[0].is_cuda and divides(config.hidden_size, config.moe_intermediate_size):
        from moonbase.ops.experts_int4_cuda import experts_int4_for_few

        gate_up, down = pack_chunks(*layer.gate_up, gated=True), pack_chunks(*layer.down, gated=False)
        return lambda call: experts_int4_for_few(*call, gate_up, down).sum(1)
    from moonbase.ops.experts_int4 import experts_int4

    return lambda call: experts_int4(*call, *layer.gate_up, *layer.down)


def _torch(layer: _Layer) -> Callable[[_Call], Tensor]:
    """Sorted, multiplied by grouped products and summed, with weights in x's precision."""
    dtype = torch.bfloat16 if layer.down[0].is_cuda else torch.float32
    gate_up_EFD, down_EDI = (
        torch.stack([dequantize_int4(words, scales, dtype=dtype) for words, scales in zip(*stack, strict=True)])
        for stack in layer)

    def run(call: _Call) -> Tensor:
        num_tokens, num_choices = call.indices_NK.shape
        chosen, order = call.indices_NK.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(gate_up_EFD.shape[0], device=chosen.device), right=True,
                                  out_int32=True)
        gate, up = F.grouped_mm(call.x_ND[order // num_choices], gate_up_EFD.mT, offs=ends).chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, down_EDI.mT, offs=ends)
        rows = torch.empty_like(out).index_copy_(0, order, out)
        return (rows.view(num_tokens, num_choices, -1) * call.weights_NK.unsqueeze(-1).to(out.dtype)).sum(1)

    return run


def _round(work: Callable[[_Call], Tensor], calls: Sequence[_Call]) -> Callable[[], object]:
    """All calls one after the other; on a GPU recorded, so that the host is no part of it."""

    def run() -> None:
        for call in calls:
            work(call)

    if not calls[0].x_ND.is_cuda:
        return run
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _check(work: Callable[[_Call], Tensor], layer: _Layer, call: _Call) -> None:
    """The first tokens' outputs against fp64. Raises AssertionError."""
    out_ND = work(call).double()
    for token in range(min(2, out_ND.shape[0])):
        right = torch.zeros_like(out_ND[token])
        for expert, weight in zip(call.indices_NK[token].tolist(), call.weights_NK[token].double(), strict=True):
            gate_up, down = (dequantize_int4(words[expert], scales[expert]).double() for words, scales in layer)
            gate, up = (gate_up @ call.x_ND[token].double()).chunk(2)
            right += weight * (down @ (F.silu(gate) * up))
        error = ((out_ND[token] - right).norm() / right.norm()).item()
        assert error < 1e-2, f"token {token} of {out_ND.shape[0]}: relative error {error:.2e} against fp64"
