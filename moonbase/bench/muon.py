"""Newton-Schulz orthogonalisation in TFLOP/s beside torch.optim.Muon's own, and what a whole optimizer step costs.

Ours takes all matrices of a shape at once, in the form that `ops.newton_schulz` chooses, as MuonClip calls it; torch
takes one matrix after the other. Both start from fp32, and on a GPU both are recorded, so that the host is no part of
it: the rows of whole steps are as one trains, host included. Both sides are timed in turns, in short runs, because a
GPU at its power limit slows. Before anything is timed, results are compared with fp64.

TFLOP/s are of the definition's arithmetic (the plain form) on both sides, so their ratio is that of times. The roof
counts what was really done: the Gram form needs less.

Shapes: N matrices, m the smaller and n the larger of a matrix's two dimensions.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from moonbase.bench.picture import duration
from moonbase.bench.rows import findings, kernel_row, note, plain_row, say
from moonbase.bench.timing import (
    Cost,
    Roofs,
    Work,
    alternating_seconds,
    kernel_seconds,
    measured_roofs,
    recorded,
    seconds,
)
from moonbase.model import Transformer
from moonbase.ops.newton_schulz import (
    GRAM_STEPS,
    compute_dtype,
    gram_pays,
    orthogonalize,
    orthogonalize_reference,
)
from moonbase.optim import attention_weights, qk_clip_
from moonbase.optim.groups import parameter_groups, parameter_kind
from moonbase.recipe import Recipe, load_recipe
from moonbase.report.machine import free_memory_bytes
from moonbase.train.assembly import make_optimizer, make_trainer
from moonbase.train.parallel import World
from moonbase.train.precision import Masters
from moonbase.train.trainer import RepeatedBatch

Shape = tuple[int, int, int]
"""N, rows, columns."""
_GPU_SHAPES: tuple[Shape, ...] = ((48, 7168, 2048), (64, 2048, 1408), (64, 1024, 512))
"""Experts of Kimi K2, Moonlight and nano."""
_OF_PRESET, _AT_ONCE = 3, 64
"""How many of the preset's shapes, those with the most arithmetic, and matrices of each at most."""
_SPREAD, _MOST_SETS = {"cuda": 2**28, "cpu": 2**24}, 8
"""Bytes of all inputs together, which take turns; tiny matrices make less, and are no matter of memory."""
_STEPS, _QUINTIC = 5, (3.4445, -4.7750, 2.0315)
_STEP_TOKENS = 2**19
_MICRO_BATCH = {"cuda": (16, 2048), "cpu": (8, 512)}
_BYTES_EACH = 36
"""Memory per parameter: weight, gradient and momentum in fp32, of both sides, and scratch."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
_METHOD = ("Matrices x rows x columns, their orthogonalisation; then whole updates. Medians, ours and the peer in "
           "turns, in short runs (sustained load slows a GPU at its power limit); inputs take turns; results checked "
           "against fp64 before timing. TFLOP/s of the plain form on both sides; the share of the roof counts the "
           "products really made.")
_METHOD_CPU = " The roof is that of fp32; a processor with bf16 units lets the peer, which computes in bf16, above it."


def measure(preset: str, peer: str | None) -> dict[str, Any]:
    """Rows for the orthogonalisation by shape, then for whole steps where the network fits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe, roofs = load_recipe(preset), measured_roofs()
    shapes = [*_preset_shapes(recipe), *(_GPU_SHAPES if device.type == "cuda" else ())]
    rows = []
    for shape in dict.fromkeys(shapes):
        rows.append(_orthogonalisation(shape, device, peer, roofs))
        say(rows[-1])
    rows += _whole_steps(preset, peer, device)
    return findings("Muon: orthogonalisation and a whole step", rows, roofs,
                    _METHOD + ("" if device.type == "cuda" else _METHOD_CPU))


def _preset_shapes(recipe: Recipe) -> list[Shape]:
    """Of the network's matrices as MuonClip takes them."""
    with torch.device("meta"):
        model = Transformer(recipe.model)
    counts: Counter[tuple[int, int]] = Counter()
    for group in parameter_groups(model.named_parameters(), recipe.model, recipe.optimizer):
        for parameter in group["params"] if group["kind"] == "muon" else ():
            rows = parameter.shape[-2] // group["splits"]
            counts[rows, parameter.shape[-1]] += parameter.numel() // (rows * parameter.shape[-1])
    work = sorted(counts, key=lambda size: counts[size] * _plain_cost(*size).flops, reverse=True)
    return [(min(counts[size], _AT_ONCE), *size) for size in work[:_OF_PRESET]]


def _orthogonalisation(shape: Shape, device: torch.device, peer: str | None, roofs: Roofs) -> dict[str, Any]:
    count, *size = shape
    dtype, (rows, columns) = compute_dtype(device), size
    num_sets = min(_MOST_SETS, math.ceil(_SPREAD[device.type] / (4 * math.prod(shape))))
    sets = [torch.randn(shape, device=device) * 1e-3 for _ in range(num_sets)]
    sides = {"ours": functools.partial(_ours, dtype=dtype)} | ({"peer": _torch} if peer else {})
    right = orthogonalize_reference(sets[0][0].double(), _STEPS)
    for side, work in sides.items():
        tolerance = _TOLERANCE[dtype if side == "ours" else torch.bfloat16]
        error = ((work(sets[0])[0].double() - right).norm() / right.norm()).item()
        assert error < tolerance, f"{side}, {rows} x {columns}: relative error {error:.2e} against fp64"
    works: dict[str, Work] = {}
    for side, work in sides.items():
        if device.type == "cuda":
            works[side] = recorded([functools.partial(work, one) for one in sets], True)
        else:
            turns = itertools.cycle(sets)
            works[side] = lambda work=work, turns=turns: work(next(turns))
    calls = len(sets) if device.type == "cuda" else 1
    times = {side: value / calls for side, value in kernel_seconds(works, rounds=7, warmup=2).items()}
    gram = gram_pays(rows, columns, _STEPS, dtype)
    plain = _plain_cost(rows, columns)
    done = _gram_cost(rows, columns, dtype) if gram else plain
    return kernel_row(
        f"{count} x {rows} x {columns}", f"{count} x {rows} x {columns}", _times(done, count, dtype.itemsize), times,
        roofs, ours_name="Gram form" if gram else "plain form", unit="TFLOP/s", amount=count * plain.flops / 1e12,
        peer_name="torch.optim.Muon, bf16", peer_cost=_times(plain, count, 2))


def _ours(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """As MuonClip calls it: what is orthogonalised is made anew for every step, and may be overwritten."""
    return orthogonalize(matrices.to(dtype, copy=True), _STEPS, dtype=dtype, overwrite=True)


def _torch(matrices: Tensor) -> list[Tensor]:
    from torch.optim._muon import _zeropower_via_newtonschulz

    return [_zeropower_via_newtonschulz(matrix, _QUINTIC, _STEPS, 1e-7) for matrix in matrices]


def _times(cost: Cost, count: int, itemsize: int) -> Cost:
    return Cost(cost.flops * count, cost.bytes * count * itemsize)


def _plain_cost(rows: int, columns: int) -> Cost:
    """Of one matrix; `bytes` are numbers here. A step squares X, squares that, and applies the sum to X: every product
    reads its operands and writes its result, since a batch of them is more than the caches hold."""
    m, n = min(rows, columns), max(rows, columns)
    return Cost(_STEPS * (4.0 * m * m * n + 2.0 * m**3), _STEPS * (3.0 * m * n + 4.0 * m * m))


def _gram_cost(rows: int, columns: int, dtype: torch.dtype) -> Cost:
    """The same for the Gram form: a run of steps squares X, works on the square, and applies the product to X once."""
    m, n = min(rows, columns), max(rows, columns)
    most = GRAM_STEPS[dtype]
    flops = numbers = 0.0
    for first in range(0, _STEPS, most):
        length = min(most, _STEPS - first)
        flops += 4.0 * m * m * n + 2.0 * m**3 * (length + 3 * (length - 1))
        numbers += 3.0 * m * n + (2 + 2 * length + 9 * (length - 1)) * m * m
    return Cost(flops, numbers)


def _whole_steps(preset: str, peer: str | None, device: torch.device) -> list[dict[str, Any]]:
    """MuonClip over all parameters beside torch's Muon and AdamW, and QK-Clip of every head: updates/s, and how much of
    a training step of 0.5M tokens one is."""
    recipe = load_recipe(preset, ["guard.spike_factor=null"])
    with torch.device("meta"):
        numel = sum(parameter.numel() for parameter in Transformer(recipe.model).parameters())
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else free_memory_bytes() or math.inf
    if recipe.masters != "fp32" or _BYTES_EACH * numel > free:
        note(f"whole steps of {preset} are not measured: they need fp32 masters and "
             f"{_BYTES_EACH * numel / 2**30:,.0f} GiB; {free / 2**30:,.0f} are free")
        return []
    masters = _masters(recipe, device)
    optimizer = make_optimizer(recipe, masters)
    works: dict[str, Work] = {"ours": optimizer.step} | ({"peer": _torch_muon(masters)} if peer else {})
    times = alternating_seconds(works, rounds=5, warmup=2)
    clip = _clip_seconds(masters, recipe, device)
    del masters, optimizer, works
    gc.collect()
    whole = _half_a_million_tokens(recipe, device)
    return [_step_row(f"{preset}, all parameters", times["ours"], whole, times.get("peer")),
            _step_row(f"{preset}, QK-Clip of every head", clip, whole, None)]


def _step_row(name: str, ours: float, whole: float, peer: float | None) -> dict[str, Any]:
    share = f"{100 * ours / whole:.2g}% of a training step of 0.5M tokens, {duration(whole)}"
    row = plain_row(f"{name} ({share})", "updates/s", 1 / ours, peer and 1 / peer, "torch.optim.Muon + AdamW",
                    label=name, seconds=ours, share_of_step=ours / whole)
    note(f"{row['shape']}: {duration(ours)}" + (f"; {row['peer_name']}: {duration(peer)}" if peer else ""))
    return row | ({"peer_seconds": peer} if peer else {})


def _clip_seconds(masters: Masters, recipe: Recipe, device: torch.device) -> float:
    weights = attention_weights(masters.named, recipe.model)
    largest = torch.full((len(weights), recipe.model.num_attention_heads), 120.0, device=device)
    return seconds(lambda: qk_clip_(weights, largest, 100.0, recipe.model), rounds=20, warmup=3)


def _masters(recipe: Recipe, device: torch.device) -> Masters:
    """Of random weights, with random gradients."""
    with device:
        model = Transformer(recipe.model)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.02
    masters = Masters(model, torch.float32)
    for master in masters.named.values():
        master.grad = torch.randn_like(master) * 1e-3
    return masters


def _torch_muon(masters: Masters) -> Work:
    """torch.optim.Muon takes single matrices only, so every expert is a parameter of its own; the rest gets fused
    AdamW."""
    matrices, rest = [], []
    for name, master in masters.named.items():
        if parameter_kind(name, master) == "adamw":
            rest.append(master.detach().clone().requires_grad_())
            rest[-1].grad = master.grad.clone()
            continue
        for matrix, gradient in zip(master.unbind() if master.ndim == 3 else [master],
                                    master.grad.unbind() if master.ndim == 3 else [master.grad], strict=True):
            single = matrix.detach().clone().requires_grad_()
            single.grad = gradient.clone()
            matrices.append(single)
    muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-3, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def _half_a_million_tokens(recipe: Recipe, device: torch.device) -> float:
    """Seconds of a whole training step of 2^19 tokens: one with one micro-batch, and what further ones add to it."""
    micro, time = _MICRO_BATCH[device.type]
    recipe = recipe.model_copy(update={"sequence_length": time, "batch_size": micro, "micro_batch_size": micro})
    tokens = torch.randint(0, recipe.model.vocab_size, (3 * micro, time + 1))
    trainer = make_trainer(recipe, World(0, 1, device), RepeatedBatch(tokens[:micro]))
    few = seconds(trainer.train_step, rounds=3, warmup=1)
    trainer.stream = RepeatedBatch(tokens)
    more = seconds(trainer.train_step, rounds=2, warmup=0)
    return few + (_STEP_TOKENS / (micro * time) - 1) * (more - few) / 2
