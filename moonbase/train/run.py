"""One training run from a recipe: corpus, model, optimizer, callbacks, loop; everything it produces lies in one folder."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moonbase import files
from moonbase.checkpoint import latest_checkpoint, load_weights, read_config, resolve_model_folder
from moonbase.data import Corpus, PackedStream, Tokenizer, load_tokenizer, prepare_corpus, validation_batches
from moonbase.errors import TrainingStopped, UserError
from moonbase.model import Transformer
from moonbase.optim import MuonClip, parameter_groups
from moonbase.recipe import OptimizerConfig, Recipe, load_recipe
from moonbase.report import write_report
from moonbase.report.console import Console
from moonbase.report.machine import git_commit, machine_facts, package_versions
from moonbase.sizes import sizes
from moonbase.train.callbacks.checkpoints import Checkpoints, resume
from moonbase.train.callbacks.metrics import MetricsWriter, TensorBoardWriter
from moonbase.train.callbacks.progress import Progress
from moonbase.train.callbacks.sampling import Sampler, Sampling
from moonbase.train.callbacks.validation import Validation
from moonbase.train.parallel import World, shard, start_world, stop_world
from moonbase.train.precision import Masters
from moonbase.train.run_folder import RunFolder
from moonbase.train.speed import compile_blocks, recompute_blocks
from moonbase.train.trainer import Callback, Trainer

# A run's data position and optimizer state mean nothing under another value of these.
_FIXED_BY_A_RUN = ("name", "model", "stage", "init", "data", "sequence_length", "batch_size", "seed")

MakeSampler = Callable[[Transformer, Tokenizer], Sampler]


def train(recipe: Recipe, folder: str | Path, *, resume: bool = False, console: Console | None = None,
          make_sampler: MakeSampler | None = None, on_ready: Callable[[Trainer], None] | None = None) -> dict[str, Any]:
    """Run a recipe in `folder` and return its results.

    With `resume` the folder's run goes on from its newest checkpoint; `recipe` is its config.yaml, perhaps with more steps
    or another schedule, but not with another model, data or batch. make_sampler gives the sampling callback something to sample with; on_ready sees the trainer before its first step. Raises
    UserError for what the user can mend, TrainingStopped when the guard gives up. Ctrl-C and SIGTERM save first.
    """
    console = console or Console()
    world = start_world()
    if not world.is_first:
        console = Console(quiet=True)
    run: RunFolder | None = None
    try:
        path = files.make_folder(folder)
        run = RunFolder(path) if world.is_first else None
        world.wait()
        recipe = _settle(recipe, path, resume, world)
        corpus, tokenizer, recipe = _corpus(recipe, path, world, console)
        if run is not None:
            _open_run(run, recipe, corpus, resume)
        trainer, checkpoints, validation = _assemble(recipe, path, run, world, console, corpus, tokenizer, make_sampler)
        if resume:
            _continue(trainer, path, run, console)
        if on_ready is not None:
            on_ready(trainer)
        return _run(trainer, checkpoints, validation, run, path, console)
    finally:
        console.close()
        if run is not None:
            run.close()
        stop_world(world)


def _settle(recipe: Recipe, path: Path, resume: bool, world: World) -> Recipe:
    """The recipe that this run follows. Raises UserError for a folder that is taken or cannot be resumed."""
    saved = path / "config.yaml"
    if resume:
        if not saved.exists():
            raise UserError(f"{path}: no run to resume here (no config.yaml)")
        stored = load_recipe(str(saved))
        changed = [name for name in _FIXED_BY_A_RUN if getattr(stored, name) != getattr(recipe, name)]
        if changed:
            raise UserError(f"{path}: a run cannot change {', '.join(changed)} when it resumes. Start a new one with --out, "
                            "from this run's weights with stage=continue init=RUN if you like.")
    elif latest_checkpoint(path) is not None:
        raise UserError(f"{path}: already holds a run. Add --resume to go on with it, or choose another folder with --out.")
    if recipe.batch_size % world.size:
        raise UserError(f"batch_size={recipe.batch_size} cannot be shared evenly by {world.size} processes")
    return recipe


def _corpus(recipe: Recipe, path: Path, world: World, console: Console) -> tuple[Corpus, Tokenizer, Recipe]:
    """Build or reopen the corpus (first process), open it (all), and fit the model's special ids to the tokenizer."""
    if not recipe.data.sources:
        raise UserError("data: nothing to train on. Name a folder or file, for example data=my/texts")
    tokenizer = load_tokenizer(recipe.data.tokenizer) if recipe.data.tokenizer else None
    if tokenizer is None and recipe.init is not None:
        tokenizer = load_tokenizer(resolve_model_folder(recipe.init))
    if tokenizer is not None and tokenizer.vocab_size > recipe.model.vocab_size:
        raise UserError(f"data.tokenizer: {tokenizer.vocab_size} entries, but model.vocab_size={recipe.model.vocab_size}")
    folder = path / "corpus"
    if world.is_first:
        prepare_corpus(recipe.data, tokenizer, recipe.model.vocab_size, folder, recipe.seed, progress=console)
    world.wait()
    corpus = Corpus.open(folder)
    tokenizer = corpus.tokenizer
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return corpus, tokenizer, recipe.model_copy(update={"model": recipe.model.model_copy(update=special)})


def _open_run(run: RunFolder, recipe: Recipe, corpus: Corpus, resume: bool) -> None:
    run.write_config(recipe.to_yaml())
    size = sizes(recipe.model, recipe.sequence_length)
    facts: dict[str, Any] = {
        "name": recipe.name, "status": "running", "reason": None, "command": shlex.join(["moonbase", *sys.argv[1:]]),
        "machine": machine_facts(), "versions": package_versions(), "commit": git_commit(),
        "parameters": size.parameters, "active_parameters": size.active_parameters, "corpus": corpus.summary,
    }
    if not resume:
        facts["started"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run.update_facts(**facts)


def _assemble(recipe: Recipe, path: Path, run: RunFolder | None, world: World, console: Console, corpus: Corpus,
              tokenizer: Tokenizer, make_sampler: MakeSampler | None) -> tuple[Trainer, Checkpoints, Validation]:
    on_gpu = world.device.type == "cuda"
    compute_dtype = torch.bfloat16 if recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpu) else torch.float32
    model = build_model(recipe, world)
    recompute_blocks(model, recipe.recompute)
    if recipe.compile == "blocks" or (recipe.compile == "auto" and on_gpu):
        compile_blocks(model)
    if world.size > 1:
        shard(model, world, compute_dtype)
    masters = Masters(model, torch.float32 if world.size > 1 else compute_dtype)
    optimizer = make_optimizer(recipe, masters)
    stream = PackedStream(corpus, "train", recipe.sequence_length, recipe.batch_size, recipe.seed, world.rank, world.size)
    rows = (recipe.micro_batch_size or max(1, recipe.batch_size // world.size)) * world.size
    validation = Validation(lambda: validation_batches(corpus, recipe.sequence_length, rows, world.rank, world.size),
                            torch.from_numpy(tokenizer.byte_lengths(recipe.model.vocab_size).astype("int64")))
    callbacks: list[Callback] = [validation]
    tokenizer_files = {file.name: file for file in (path / "corpus" / "tokenizer").iterdir() if file.is_file()}
    checkpoints = Checkpoints(run, path, tokenizer_files)
    if run is not None:
        if make_sampler is not None:
            callbacks.append(Sampling(run, lambda trainer: make_sampler(trainer.model, tokenizer)))
        callbacks.append(MetricsWriter(run))
        if recipe.tensorboard:
            callbacks.append(TensorBoardWriter(run))
    callbacks += [Progress(console), checkpoints]
    return Trainer(recipe, model, masters, optimizer, stream, world, callbacks), checkpoints, validation


def build_model(recipe: Recipe, world: World) -> Transformer:
    """Freshly initialised, or from `recipe.init`; fp32, on the device. Raises UserError where the two do not fit."""
    model = Transformer(recipe.model)
    if recipe.init is None:
        return model.initialize(recipe.seed).to(world.device)
    folder = resolve_model_folder(recipe.init)
    stored = read_config(folder)
    ignored = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rope_scaling", "model_type"}
    different = [name for name, value in stored if name not in ignored and value != getattr(recipe.model, name)]
    if different:
        raise UserError(f"init={recipe.init}: its {', '.join(different)} differ from the recipe's model")
    load_weights(model, folder, recipe.model, dtype=torch.float32)
    return model.to(world.device)


def make_optimizer(recipe: Recipe, masters: Masters) -> MuonClip:
    """MuonClip (or its all-AdamW baseline) over the masters."""
    config: OptimizerConfig = recipe.optimizer
    return MuonClip(
        parameter_groups(masters.named.items(), recipe.model, config), lr=config.lr, weight_decay=config.weight_decay,
        momentum=config.momentum, nesterov=config.nesterov, update_rms=config.update_rms, ns_steps=config.ns_steps,
        ns_coefficients=config.ns_coefficients, adam_betas=config.adam_betas, adam_eps=config.adam_eps,
        adam_lr_ratio=config.adam_lr_ratio)


def _continue(trainer: Trainer, path: Path, run: RunFolder | None, console: Console) -> None:
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        console.note(f"{path}: no checkpoint yet, starting from the first step")
    else:
        resume(trainer, checkpoint)
        console.note(f"resuming {path} at step {trainer.step}")
    if run is not None:
        run.rewind_metrics(trainer.step)


def _run(trainer: Trainer, checkpoints: Checkpoints, validation: Validation, run: RunFolder | None, path: Path,
         console: Console) -> dict[str, Any]:
    status, reason = "failed", None
    started = time.monotonic()
    results: dict[str, Any] = {}
    try:
        with stopping_on_signals(trainer, console):
            trainer.run()
            finished = trainer.step >= trainer.recipe.steps
            status, reason = ("finished", None) if finished else ("stopped", trainer.stop_reason)
            if finished:
                console.stage("measuring the held-out documents")
                loss, bits = validation.measure(trainer, None)
                results = {"validation_loss": loss, "validation_bits_per_byte": bits}
    except TrainingStopped as error:
        reason = str(error)
        raise
    except (OSError, UserError, RuntimeError) as error:
        reason = str(error)
        raise
    finally:
        if run is not None:
            with contextlib.suppress(UserError):  # the first trouble is the one to report
                facts = run.update_facts(
                    status=status, reason=reason, seconds=round(time.monotonic() - started, 1), results=results,
                    finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), next_commands=next_commands(path, status))
                write_report(run.path)
                results = {**results, "next_commands": facts["next_commands"]}
    return {"folder": str(path), "status": status, "reason": reason, "step": trainer.step, "tokens": trainer.tokens,
            "seconds": trainer.seconds, **results}


def next_commands(path: Path, status: str) -> list[str]:
    """What one may type next."""
    if status != "finished":
        return [shlex.join(["moonbase", "train", str(path), "--resume"])]
    exported = f"{path}-hf"
    return [shlex.join(["moonbase", *words]) for words in (
        ("chat", str(path)), ("info", str(path)), ("convert", str(path), exported, "--format", "hf"))]


@contextlib.contextmanager
def stopping_on_signals(trainer: Trainer, console: Console) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step in hand, with a checkpoint; a second Ctrl-C ends it at once."""

    def stop(number: int, _: Any) -> None:
        if trainer.stop_reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stop(f"stopped by {signal.Signals(number).name}")
        console.note("stopping after this step; the checkpoint comes first (Ctrl-C again stops at once)")

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def default_run_folder(recipe: Recipe) -> Path:
    """`runs/NAME`, or `$MOONBASE_RUNS/NAME`."""
    return Path(os.environ.get("MOONBASE_RUNS", "runs")) / recipe.name
