"""Training throughput and peak memory, moonbase with MuonClip beside transformers with AdamW: same shape, same batch.

On a CPU both train in fp32 in turns, and the peer gets the fastest of its expert implementations. On a GPU both train
in bf16 (ours with fp32 masters), compiled, one after the other so that peak memory is each one's own; both sum sixteen
micro-batches per optimizer step.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from moonbase.bench.networks import check_room, transformers_model
from moonbase.bench.picture import duration
from moonbase.bench.rows import note, plain_row
from moonbase.bench.timing import alternating_seconds, matmul_ceiling, seconds
from moonbase.recipe import Recipe, load_recipe
from moonbase.sizes import least_training_bytes, train_flops_per_token
from moonbase.train.assembly import make_trainer
from moonbase.train.parallel import World
from moonbase.train.trainer import RepeatedBatch

EXPERT_IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
_GPU_MICRO_BATCHES = 16
METHOD = ("Sequences x tokens of an optimizer step, on a GPU its micro-batches in front; the same network and batch "
          "on both sides. Ours is the whole step of `moonbase train`, MuonClip and metrics included; the peer has "
          "fused AdamW and clips no gradients. Medians, on a CPU in turns. The roof is the measured rate of a large "
          "matrix product.")


def measure(preset: str, peer: str | None) -> list[dict[str, Any]]:
    """Rows for throughput and, on a GPU, peak memory."""
    on_gpu = torch.cuda.is_available()
    own = load_recipe(preset)
    if on_gpu and own.masters != "fp32":
        # Its batch is part of what makes it fit.
        micro, time, overrides = own.micro_batch_size or own.batch_size, own.sequence_length, []
    elif on_gpu:
        micro, time = 16, 2048
        overrides = [f"sequence_length={time}", f"batch_size={micro * _GPU_MICRO_BATCHES}", f"micro_batch_size={micro}"]
    else:
        micro, time = 8, 512
        overrides = [f"sequence_length={time}", f"batch_size={micro}"]
    recipe = load_recipe(preset, [*overrides, "guard.spike_factor=null"])
    check_room("train", preset, least_training_bytes(recipe), on_gpu)
    tokens = torch.randint(0, recipe.model.vocab_size, (recipe.batch_size, time + 1),
                           generator=torch.Generator().manual_seed(0))
    shape = f"{preset} {recipe.batch_size // micro}x{micro}x{time}" if on_gpu else f"{preset} {micro}x{time}"
    flops = train_flops_per_token(recipe.model, time)
    ceiling = matmul_ceiling()
    if on_gpu:
        ours, our_memory = _on_gpu(lambda: _our_step(recipe, tokens), rounds=4)
        theirs = their_memory = None
        if peer:
            theirs, their_memory = _on_gpu(
                lambda: _peer_step(recipe, tokens, micro, "grouped_mm", compiled=True), rounds=2)
        name = "transformers, grouped_mm, compiled" if peer else None
        num_tokens = tokens.shape[0] * time
        return [plain_row(shape, "tokens/s", num_tokens / ours, theirs and num_tokens / theirs, name,
                          roof_share=num_tokens / ours * flops / ceiling),
                plain_row(shape, "GiB peak", our_memory / 2**30, their_memory and their_memory / 2**30, name,
                          less_is_better=True)]
    works: dict[str, Callable[[], object]] = {"ours": _our_step(recipe, tokens)}
    if peer:
        works |= {name: _peer_step(recipe, tokens, micro, name, compiled=False) for name in EXPERT_IMPLEMENTATIONS}
    times = {}
    for name, work in works.items():
        times[name] = seconds(work, rounds=1, warmup=1)
        note(f"{'ours' if name == 'ours' else f'transformers, {name}'}: {duration(times[name])} a step, measured once")
    # What is hopeless is timed once; the rest runs in turns.
    close = {name: work for name, work in works.items() if name == "ours" or times[name] < 3 * min(times.values())}
    times |= alternating_seconds(close, rounds=9)
    rate = {name: tokens.shape[0] * time / value for name, value in times.items()}
    rows = [plain_row(shape, "tokens/s", rate["ours"], rate.get(name), f"transformers, {name}",
                      roof_share=rate["ours"] * flops / ceiling)
            for name in [name for name in works if name != "ours"] or [None]]
    return sorted(rows, key=lambda row: row["ratio"] or 0)


def _on_gpu(make: Callable[[], Callable[[], object]], rounds: int) -> tuple[float, int]:
    """Median seconds of a step and its peak memory; everything is freed afterwards."""
    work = make()
    work()
    torch.cuda.reset_peak_memory_stats()
    elapsed = seconds(work, rounds=rounds, warmup=1)
    memory = torch.cuda.max_memory_allocated()
    del work
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return elapsed, memory


def _our_step(recipe: Recipe, tokens: torch.Tensor) -> Callable[[], object]:
    """A whole optimizer step as `moonbase train` makes it, QK-Clip, router biases and metrics included. Every row is
    one document, so that both sides attend to the same pairs."""
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return make_trainer(recipe, world, RepeatedBatch(tokens)).train_step


def _peer_step(recipe: Recipe, tokens: torch.Tensor, micro: int, experts: str, compiled: bool) -> Callable[[], object]:
    """The same network in transformers with fused AdamW, its own loss, gradient clipping left out in its favour."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = transformers_model(recipe.model, device, dtype, experts_implementation=experts)
    model.train()
    model.config.use_cache = False
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    parts = [part.to(device) for part in tokens[:, :-1].split(micro)]

    def step() -> None:
        for part in parts:
            (run(input_ids=part, labels=part).loss / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
