"""One layer of routed experts in INT4 beside the same layer with bf16 (on a CPU fp32) weights, decoding and prompts.

For few tokens the time is that of reading the weights of the experts hit, at thousands that of the arithmetic: the
roof is whichever takes longer at the rates measured in the same run. Every call of a round has experts of its own,
drawn anew, so that no cache holds them; both sides are recorded and measured in turns, in short runs, because a GPU at
its power limit slows (this layer by up to 5%). Before anything is timed, both sides' results are compared with fp64
products of the numbers that the words stand for.

Shapes: N tokens, K choices per token, E experts, D hidden, I width of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moonbase.bench.networks import check_experts, check_room
from moonbase.bench.rows import absent_peers, findings, kernel_row, say
from moonbase.bench.timing import Cost, kernel_seconds, measured_roofs, recorded
from moonbase.config import ModelConfig
from moonbase.layout import INT4_GROUP
from moonbase.ops.int4_chunks import divides, pack_chunks
from moonbase.ops.int4_packed import dequantize_int4
from moonbase.recipe import load_recipe
from moonbase.report.words import plural

_BATCHES_GPU, _BATCHES_CPU = (1, 16, 64, 256, 4096, 16384), (1, 16)
_DECODES = 256
"""Rows that decode together at most; more are prompts, for which the engine has another kernel."""
_ABSENT = {"vllm": "vllm's INT4 kernels (Marlin, humming)"}
_METHOD = ("Medians of 15 runs, ours and the peer in turns, each of a few milliseconds from rest (sustained load slows "
           "a GPU at its power limit: this layer by 0 to 5%); every call has choices of its own, so no cache holds its "
           "experts; outputs checked against fp64 before timing.")
_METHOD_PEER = " The peer's weights take {times:.1f} times as many bytes, and its points lie where that puts them."
INT4_BYTES = 0.5 + 2 / INT4_GROUP
"""A weight with its part of a bf16 scale."""
_TOLERANCE = {"ours": 1e-2, "peer": 2e-2}
"""Relative error against fp64; the peer rounds more often to bf16."""
_PEER_NAMES = {"cuda": "torch F.grouped_mm, bf16", "cpu": "torch F.grouped_mm, fp32"}


class _Layer(NamedTuple):
    """Words int32 [E, rows, inputs / 8] and scales bf16 [E, rows, inputs / 32]."""

    gate_up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


class _Call(NamedTuple):
    x_ND: Tensor
    indices_NK: Tensor
    weights_NK: Tensor


def measure(preset: str, peer: str | None) -> dict[str, Any]:
    """A row for each batch."""
    config = load_recipe(preset).model
    check_experts("moe", preset, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    theirs = torch.finfo(_peer_dtype(device)).bits // 8
    on_gpu = device.type == "cuda"  # where ours are held in either order for a moment
    check_room("moe", preset, _cost(config, 1, config.n_routed_experts, INT4_BYTES * (2 if on_gpu else 1) + (
        theirs if peer else 0)).bytes, on_gpu)
    layer, roofs = _random_layer(config, device), measured_roofs()
    name, ours = _ours(layer, config)
    sides = {"ours": ours} | ({"peer": _torch(layer)} if peer else {})
    rows = []
    for batch in _BATCHES_GPU if on_gpu else _BATCHES_CPU:
        calls = [_random_call(config, batch, device) for _ in range(min(32, max(2, 256 // batch)))]
        for side, work in sides.items():
            _check(work, layer, calls[0], _TOLERANCE[side])
        works = {side: recorded([functools.partial(work, call) for call in calls], on_gpu)
                 for side, work in sides.items()}
        times = {side: value / len(calls) for side, value in kernel_seconds(works, rounds=15, warmup=3).items()}
        hit = sum(len(call.indices_NK.unique()) for call in calls) / len(calls)
        label = plural(batch, "token")
        shape = (f"{label} x {config.num_experts_per_tok} of {config.n_routed_experts} experts, "
                 f"{config.hidden_size} x {config.moe_intermediate_size}, {hit:.1f} hit")
        rows.append(kernel_row(
            shape, label, _cost(config, batch, hit, INT4_BYTES), times, roofs, ours_name=name(batch),
            peer_name=_PEER_NAMES[device.type], peer_cost=_cost(config, batch, hit, theirs)))
        say(rows[-1])
        del works
    method = _METHOD + (_METHOD_PEER.format(times=theirs / INT4_BYTES) if peer else "")
    return findings("Routed experts in INT4", rows, roofs, method, absent_peers(_ABSENT))


def _peer_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _cost(config: ModelConfig, batch: int, hit: float, bytes_each: float) -> Cost:
    """Three products for every choice; the weights of the experts hit, read once."""
    weights_each = 3 * config.hidden_size * config.moe_intermediate_size
    return Cost(2.0 * batch * config.num_experts_per_tok * weights_each, hit * weights_each * bytes_each)


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
    return _Call(x_ND.to(_peer_dtype(device)), indices_NK.contiguous(), weights_NK / weights_NK.sum(-1, keepdim=True))


def _ours(layer: _Layer, config: ModelConfig) -> tuple[Callable[[int], str], Callable[[_Call], Tensor]]:
    """Which kernel the engine takes for a batch, and the layer's output [N, D] by that."""
    if layer.down[0].is_cuda and divides(config.hidden_size, config.moe_intermediate_size):
        from moonbase.ops import experts_int4_hopper, experts_int4_prompt_hopper
        from moonbase.ops.experts_int4_cuda import experts_int4_for_few, experts_int4_for_prompts

        gate_up, down = pack_chunks(*layer.gate_up, gated=True), pack_chunks(*layer.down, gated=False)
        sizes = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        few = experts_int4_hopper.fits(config.num_experts_per_tok, *sizes) and experts_int4_hopper.available()
        many = experts_int4_prompt_hopper.fits(*sizes) and experts_int4_prompt_hopper.available()

        def run(call: _Call) -> Tensor:
            work = experts_int4_for_few if call.x_ND.shape[0] <= _DECODES else experts_int4_for_prompts
            return work(*call, gate_up, down).sum(1)

        names = [f"{what} in {'CUDA C++' if hopper else 'Triton'}"
                 for what, hopper in (("decoding", few), ("prompts", many))]
        return (lambda batch: names[batch > _DECODES]), run
    from moonbase.ops.experts_int4 import experts_int4

    return (lambda batch: "C kernel or torch, CPU" if not layer.down[0].is_cuda else "torch"), (
        lambda call: experts_int4(*call, *layer.gate_up, *layer.down))


def _torch(layer: _Layer) -> Callable[[_Call], Tensor]:
    """Sorted, multiplied by grouped products and summed, with weights in x's precision."""
    dtype = _peer_dtype(layer.down[0].device)
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


def _check(work: Callable[[_Call], Tensor], layer: _Layer, call: _Call, tolerance: float) -> None:
    """The first tokens' outputs against fp64. Raises AssertionError."""
    out_ND = work(call).double()
    for token in range(min(2, out_ND.shape[0])):
        right = torch.zeros_like(out_ND[token])
        for expert, weight in zip(call.indices_NK[token].tolist(), call.weights_NK[token].double(), strict=True):
            gate_up, down = (dequantize_int4(words[expert], scales[expert]).double() for words, scales in layer)
            gate, up = (gate_up @ call.x_ND[token].double()).chunk(2)
            right += weight * (down @ (F.silu(gate) * up))
        error = ((out_ND[token] - right).norm() / right.norm()).item()
        assert error < tolerance, f"token {token} of {out_ND.shape[0]}: relative error {error:.2e} against fp64"
