"""What INT4 costs in loss: one network trained plain, trained for INT4, and plain but rounded to INT4 afterwards.

All see the same batches of the same corpus, the Python code that is installed here, and are scored on the same held-out
documents. For every seed (of the first weights and of the order of the batches) two runs are made: a plain one, whose
experts are rounded when it is done, and one that computes with INT4 experts from half of its steps on,
quantisation-aware training as Kimi K2-Thinking has it. Until then the two are the same run. Rounding is done by the
rule that the other run is trained with, and by the one of least error, which is the best that rounding can do here.

Every row holds the losses of all seeds, their mean and Student's 95% interval. A seed moves all of them alike, so the
rows of differences, paired by seed, are the ones to read. Nothing is timed: `ours` is a loss or a difference in nats
per token, less is better, and the peer is the plain run.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moonbase.bench.networks import check_room, held_out_loss
from moonbase.bench.rows import plain_row
from moonbase.data import Corpus, PackedStream, installed_python_sources, prepare_corpus, validation_batches
from moonbase.layout import Int4Rule
from moonbase.ops.int4 import fake_quantize_
from moonbase.recipe import DataConfig, Recipe, load_recipe
from moonbase.report.console import Console
from moonbase.sizes import least_training_bytes
from moonbase.train.assembly import make_trainer
from moonbase.train.parallel import World
from moonbase.train.precision import is_routed_expert
from moonbase.train.trainer import Trainer

PLAIN, TRAINED = "plain", "trained in INT4"
ROUNDED: dict[str, Int4Rule] = {"rounded afterwards": "absmax/7", "rounded afterwards, least error": "least-error"}
"""Arms that are made of the plain run's weights, and by which rule."""
SEEDS = (0, 1, 2)
STEPS = {"cpu": 100, "cuda": 100}
"""Of a run, unless told otherwise: about two minutes a seed for pico on two cores and for nano on one H200."""
CORPUS_BYTES = {"cpu": 8_000_000, "cuda": 80_000_000}
"""More than the steps of the preset read: no text comes twice."""
HELD_OUT_BATCHES = 16
METHOD = ("Losses on held-out documents, less is better: means over seeds with Student's 95% interval. A seed moves "
          "all arms alike, so read the rows of differences, which are paired by seed. All arms see the same batches; "
          "trained in INT4: from half of the steps on.")


def measure(
    preset: str, peer: str | None = None, *, steps: int | None = None, seeds: Sequence[int] = SEEDS,
    overrides: Sequence[str] = (), data: DataConfig | None = None,
) -> list[dict[str, Any]]:
    """A row of held-out loss per arm, then a row per difference between two of them.

    `peer` is that of other benches and means nothing; `overrides`: recipe fields, as `moonbase train` takes them;
    `data`: another corpus. Raises UserError.
    """
    from moonbase.evals.statistics import mean_interval

    mean_interval([0.0, 1.0])  # a package that is missing is missed now, not after training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = steps or STEPS[device.type]
    fields = [f"steps={steps}", f"validate_every={steps}", *overrides]
    plain = load_recipe(preset, fields)
    for_int4 = load_recipe(preset, [*fields, f"qat.start_step={steps // 2}"])
    check_room("int4", preset, least_training_bytes(for_int4), device.type == "cuda")
    data = data or DataConfig(sources=tuple(installed_python_sources()), max_bytes=CORPUS_BYTES[device.type])
    losses: dict[str, list[float]] = {arm: [] for arm in (PLAIN, TRAINED, *ROUNDED)}
    with tempfile.TemporaryDirectory(prefix="moonbase-int4-") as folder, Console() as console:
        prepare_corpus(data, None, plain.model.vocab_size, Path(folder), 0, progress=console)
        corpus = Corpus.open(Path(folder))
        for seed in seeds:
            trainer = _train(plain, seed, corpus, device, console)
            losses[PLAIN].append(_held_out_loss(trainer, corpus))
            masters = {name: trainer.masters.named[name].detach().clone() for name in _experts(trainer)}
            for arm, rule in ROUNDED.items():
                for name, parameter in _experts(trainer).items():
                    fake_quantize_(parameter.data, masters[name], rule)
                losses[arm].append(_held_out_loss(trainer, corpus))
            del trainer, masters
            losses[TRAINED].append(_held_out_loss(_train(for_int4, seed, corpus, device, console), corpus))
            console.note(f"seed {seed}: " + "; ".join(f"{arm} {values[-1]:.4f}" for arm, values in losses.items()))
    return rows_of(f"{preset}, {steps} steps of {plain.tokens_per_step} tokens", losses)


def _train(recipe: Recipe, seed: int, corpus: Corpus, device: torch.device, console: Console) -> Trainer:
    """A trainer after its last step; its model's parameters are what it computes with."""
    if device.type == "cuda":
        gc.collect()  # compiled blocks refer to themselves
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    recipe = recipe.model_copy(update={"seed": seed})
    stream = PackedStream(corpus, "train", recipe.sequence_length, recipe.batch_size, seed)
    trainer = make_trainer(recipe, World(0, 1, device), stream)
    for step in range(recipe.steps):
        record = trainer.train_step()
        console(f"seed {seed}, {'for INT4' if recipe.qat else 'plain'}", step + 1, recipe.steps,
                f"loss {record['loss']:.3f}")
    return trainer


def _experts(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in trainer.model.named_parameters() if is_routed_expert(name)}


def _held_out_loss(trainer: Trainer, corpus: Corpus) -> float:
    """The same tokens for everybody."""
    batches = validation_batches(corpus, trainer.recipe.sequence_length, trainer.recipe.batch_size)
    return held_out_loss(trainer, itertools.islice(batches, HELD_OUT_BATCHES))


def rows_of(shape: str, losses: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The table of the losses of every arm, seed by seed; they may come from several calls."""
    rows = [_row(f"{shape}: {arm}", values, None if arm == PLAIN else losses[PLAIN]) for arm, values in losses.items()]
    pairs = [(TRAINED, PLAIN), *((arm, PLAIN) for arm in ROUNDED), *((TRAINED, arm) for arm in ROUNDED)]
    return rows + [_row(f"{shape}: {one} - {other}",
                        [a - b for a, b in zip(losses[one], losses[other], strict=True)], None)
                   for one, other in pairs]


def _row(shape: str, values: list[float], plain: list[float] | None) -> dict[str, Any]:
    from moonbase.evals.statistics import mean_interval

    interval = mean_interval(values)
    peer = None if plain is None else sum(plain) / len(plain)
    return plain_row(shape, "nats per token", interval.value, peer, PLAIN, less_is_better=True, low=interval.low,
                     high=interval.high, n=interval.n, values=values)
