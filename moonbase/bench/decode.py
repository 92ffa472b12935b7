"""Decoding speed and time to the first token, moonbase's engine beside transformers' `generate`: same weights, same
prompts, greedy, no stop.

A run of one token is the prompt's time; what a longer run takes beyond that is decoding. The floor is what memory
allows: the weights that the batch touches and the latents that it reads, every step, at the measured rate of reading.

Shapes: B sequences, S prompt tokens, N new tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moonbase.bench.networks import NoText, check_room, transformers_model
from moonbase.bench.rows import note, plain_row
from moonbase.bench.timing import alternating_seconds, read_ceiling, seconds
from moonbase.config import ModelConfig
from moonbase.engine import Engine, Sampling
from moonbase.layout import checkpoint_layout
from moonbase.loading import cast
from moonbase.model import Transformer
from moonbase.ops import native
from moonbase.recipe import load_recipe
from moonbase.sizes import kv_bytes_per_token, sizes

METHOD = ("Sequences x (prompt + new tokens), greedy, the same weights and prompts on both sides. A run of one token "
          "is the time to the first; what a longer run takes beyond it is decoding. Medians. The roof: the weights "
          "that a step is expected to touch, and its latents, at the measured rate of reading.")
_PEER_EXPERTS = ("grouped_mm", "eager")


class Shape(NamedTuple):
    """B sequences with S prompt tokens and N new ones each."""

    batch: int
    prompt: int
    new: int


# Contexts as people have them: up to 4k on a CPU, 1k and 32k on a GPU.
_CPU_SHAPES = (Shape(1, 3968, 128), Shape(16, 3968, 128), Shape(1, 256, 128), Shape(16, 256, 128))
_GPU_SHAPES = (Shape(1, 1024, 256), Shape(64, 1024, 256), Shape(256, 1024, 256), Shape(1, 32512, 128),
               Shape(16, 32512, 128))


def measure(preset: str, peer: str | None, shapes: tuple[Shape, ...] | None = None) -> list[dict[str, Any]]:
    """Two rows per shape: decoded tokens/s, and the time to the first token of the whole batch."""
    on_gpu = torch.cuda.is_available()
    shapes = shapes or (_GPU_SHAPES if on_gpu else _CPU_SHAPES)
    config = load_recipe(preset).model
    longest = max(shape.prompt + shape.new for shape in shapes)
    config = config.model_copy(update={"max_position_embeddings": max(config.max_position_embeddings, longest)})
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    copies, parameters = 2 if peer else 1, sizes(config).parameters
    check_room("decode", preset, (1 if on_gpu else copies) * 4 * parameters, False)  # drawn on the CPU, in fp32
    if on_gpu:
        check_room("decode", preset, copies * dtype.itemsize * parameters, True)
    model = cast(Transformer(config).initialize(), dtype).to(device).eval()
    ceiling = read_ceiling()
    native.available()  # a first use compiles; that is not what is measured
    rows = []
    for shape in shapes:
        rows += _rows(preset, model, shape, peer, ceiling)
        note("\n".join(map(_line, rows[-2:])))
    return rows


def _line(row: dict[str, Any]) -> str:
    """What is known so far: the longest shapes take a peer minutes."""
    peer = "" if row["peer"] is None else f", {row['peer_name']} {row['peer']:,.1f} ({row['ratio']:.1f}x)"
    share = "" if row["roof_share"] is None else f", {row['roof_share']:.0%} of the floor's rate"
    return f"{row['shape']}: {row['ours']:,.1f} {row['unit']}{share}{peer}"


def _rows(
    preset: str, model: Transformer, shape: Shape, peer: str | None, ceiling: float
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (shape.batch, shape.prompt), generator=generator)
    works = _works("ours", _ours(model, prompts, shape), shape)
    peer_name = None
    if peer:
        name, generate = _peer(model, prompts)
        works |= _works("peer", generate, shape)
        peer_name = f"transformers, {name}"
    rounds = 1 if shape.batch * shape.prompt > 100_000 else 3
    if torch.cuda.is_available():
        # Ours records graphs when it first runs; a peer that takes seconds is warm from the shapes before.
        times = {name: seconds(work, rounds, warmup=1) if name.startswith("ours") else
                 seconds(work, min(rounds, 2), warmup=int(shape.prompt < 10_000)) for name, work in works.items()}
    else:
        # A short run's decoding is a small difference of two times that a busy neighbour moves.
        rounds = 9 if shape.batch * shape.prompt < 10_000 else rounds
        times = alternating_seconds(works, rounds=rounds, warmup=1 if shape.prompt < 1000 else 0)
    label = f"{preset} {shape.batch}x({shape.prompt}+{shape.new})"
    step = step_bytes(model.config, shape.batch, shape.prompt + shape.new // 2, next(model.parameters()).dtype.itemsize)
    rows = []
    for unit in ("tokens/s", "ms to the first token"):
        values = {}
        for side in ("ours", "peer") if peer else ("ours",):
            first, whole = times[f"{side} first"], times[f"{side} whole"]
            decoding = max(whole - first, 1e-9)
            values[side] = shape.batch * (shape.new - 1) / decoding if unit == "tokens/s" else 1000 * first
        ours, theirs = values["ours"], values.get("peer")
        share = ours / shape.batch * step / ceiling if unit == "tokens/s" else None
        rows.append(plain_row(label, unit, ours, theirs, peer_name, less_is_better=unit != "tokens/s",
                              roof_share=share))
    del works
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def _ours(model: Transformer, prompts: torch.Tensor, shape: Shape) -> Callable[[int], object]:
    engine = Engine(model, NoText(), max_running=shape.batch, prefix_cache=False,
                    cache_tokens=shape.batch * (shape.prompt + shape.new + 32))
    return lambda new: engine.generate_ids(prompts.tolist(), Sampling(max_tokens=new, ignore_eos=True))


def _works(side: str, generate: Callable[[int], object], shape: Shape) -> dict[str, Callable[[], object]]:
    return {f"{side} first": lambda: generate(1), f"{side} whole": lambda: generate(shape.new)}


def step_bytes(config: ModelConfig, batch: int, context: int, itemsize: int) -> float:
    """Bytes that one decoding step has to read: every weight outside the experts, the experts that `batch` tokens are
    expected to hit when all are equally likely, and the latents of `context` tokens for each sequence."""
    chance = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    weights = 0.0
    for tensor in checkpoint_layout(config, mtp=False):
        if tensor.kind == "embedding":
            continue
        weights += tensor.numel * (chance if tensor.kind == "expert" else 1.0)
    return weights * itemsize + batch * context * kv_bytes_per_token(config, itemsize)


def _peer(model: Transformer, prompts: torch.Tensor) -> tuple[str, Callable[[int], object]]:
    """transformers with the same weights and the faster of its expert implementations for this batch."""
    parameter = next(model.parameters())
    theirs = transformers_model(model.config, parameter.device, parameter.dtype).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    theirs.load_state_dict(state)
    there = prompts.to(parameter.device)

    def generate(new: int, ids: torch.Tensor = there) -> object:
        with torch.no_grad():
            return theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                                   do_sample=False, eos_token_id=None, pad_token_id=0)

    trials = {}
    for name in _PEER_EXPERTS:
        theirs.set_experts_implementation(name)
        trials[name] = seconds(lambda: generate(16, there[:, :64]), rounds=1, warmup=1)
    best = min(trials, key=trials.__getitem__)
    theirs.set_experts_implementation(best)
    return best, generate
