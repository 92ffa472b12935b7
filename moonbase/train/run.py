"""One training run from a recipe: corpus, model, optimizer, callbacks, loop; all that it makes lies in one folder."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from moonbase import files
from moonbase.checkpoint import damaged_newest, latest_checkpoint, list_checkpoints, resolve_model_folder
from moonbase.data import (
    Corpus,
    DialogueCorpus,
    PackedStream,
    Tokenizer,
    load_tokenizer,
    prepare_corpus,
    prepare_dialogues,
    validation_batches,
)
from moonbase.errors import TrainingStopped, UserError
from moonbase.model import Transformer
from moonbase.recipe import Recipe, load_recipe
from moonbase.report import write_report
from moonbase.report.console import Console
from moonbase.report.machine import free_memory_bytes, git_commit, machine_facts, package_versions
from moonbase.sizes import least_training_bytes, sizes
from moonbase.train.assembly import check_processes, make_trainer
from moonbase.train.callbacks.checkpoints import Checkpoints, resume
from moonbase.train.callbacks.metrics import MetricsWriter, TensorBoardWriter
from moonbase.train.callbacks.progress import Progress
from moonbase.train.callbacks.sampling import Sampler, Sampling
from moonbase.train.callbacks.validation import Validation
from moonbase.train.parallel import World, announced, start_world, stop_world
from moonbase.train.run_folder import RunFolder, read_facts
from moonbase.train.sft import chat_style, renderer
from moonbase.train.trainer import Callback, Trainer

# A run's data position and optimizer state mean nothing under another value of these.
_FIXED_BY_A_RUN = ("name", "model", "stage", "init", "style", "data", "sequence_length", "batch_size", "seed",
                   "optimizer.name")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAME_SIGNAL_SECONDS = 1.0

MakeSampler = Callable[[Transformer, Tokenizer], Sampler]


def train(recipe: Recipe, folder: str | Path, *, resume: bool = False, console: Console | None = None,
          make_sampler: MakeSampler | None = None, on_ready: Callable[[Trainer], None] | None = None) -> dict[str, Any]:
    """Run a recipe in `folder` and return its results.

    With `resume` the folder's run goes on from its newest checkpoint; `recipe` is its config.yaml, perhaps with more
    steps or another schedule, but not with another model, data or batch. make_sampler gives the sampling callback
    something to sample with; on_ready sees the trainer before its first step. Raises UserError for what the user can
    mend, TrainingStopped when the guard gives up. Ctrl-C and SIGTERM save first. Of several processes only the first
    explains an error that all have; the others raise SystemExit.
    """
    console = console or Console()
    world = start_world()
    if not world.is_first:
        console = Console(quiet=True)
    path = Path(folder)
    run: RunFolder | None = None
    try:
        run = world.on_first(lambda: _enter(recipe, path, resume, world))
        corpus, tokenizer, recipe = _corpus(recipe, path, resume, world, console)
        world.on_first(lambda: _open_run(run, recipe, corpus, resume))
        with _recording(recipe, run, console) as facts:
            trainer, validation = _assemble(recipe, path, run, world, console, corpus, tokenizer, make_sampler)
            if resume:
                _continue(trainer, path, console)
            if run is not None:
                run.rewind(trainer.step)
            if on_ready is not None:
                on_ready(trainer)
            _run(trainer, validation, run, console, facts)
        return {"folder": str(path), "status": facts["status"], "reason": facts["reason"], "step": trainer.step,
                "tokens": trainer.tokens, "seconds": trainer.seconds, **facts["results"],
                "next_commands": facts["next_commands"]}
    except TrainingStopped as error:
        if world.is_first:
            raise
        raise SystemExit(error.exit_code) from None
    finally:
        console.close()
        if run is not None:
            run.discard_if_empty()
            run.close()
        stop_world(world)


def _enter(recipe: Recipe, path: Path, resume: bool, world: World) -> RunFolder:
    """Take possession of the run folder. Raises UserError for one that is taken or that the recipe cannot go on in."""
    if recipe.batch_size % world.size:
        raise UserError(f"batch_size={recipe.batch_size} cannot be shared evenly by {world.size} processes")
    check_processes(recipe, world)
    _check_room(recipe, world)
    if resume and not (path / "config.yaml").is_file():
        raise UserError(f"{path}: no run to resume here (no config.yaml)")
    run = RunFolder(path)
    try:
        saved = list_checkpoints(path)
        if resume:
            _check_unchanged(load_recipe(str(path / "config.yaml")), recipe, path)
            if saved and saved[-1][0] > recipe.steps:
                raise UserError(f"{path}: is at step {saved[-1][0]} already, past steps={recipe.steps}. "
                                "Give more steps to go on.")
        elif saved or damaged_newest(path):
            raise UserError(f"{path}: already holds a run. "
                            "Add --resume to go on with it, or choose another folder with --out.")
    except BaseException:
        run.discard_if_empty()
        run.close()
        raise
    return run


def _check_room(recipe: Recipe, world: World) -> None:
    """Raises UserError for a model that cannot be trained here whatever its batch: a machine that runs out of memory
    ends other people's processes."""
    if world.device.type == "cuda":
        place, room = "GPU memory", torch.cuda.get_device_properties(world.device).total_memory * world.size
    else:
        machines = world.size / announced("LOCAL_WORLD_SIZE", world.size)
        place, room = "free memory", (free_memory_bytes() or math.inf) * machines
    parameters, needed = sizes(recipe.model, recipe.sequence_length).parameters, least_training_bytes(recipe)
    if needed > room:
        raise UserError(f"model: {parameters / 1e9:,.1f}B parameters need at least {needed / 1e9:,.0f} GB to "
                        f"train, and there are {room / 1e9:,.0f} GB of {place}. Take a smaller model, pico for "
                        "example, or more machines with torchrun")


def _check_unchanged(stored: Recipe, recipe: Recipe, path: Path) -> None:
    def fixed(recipe: Recipe, name: str) -> Any:
        value = attrgetter(name)(recipe)
        if name == "model":  # the special ids were taken from the tokenizer
            return value.model_copy(update=dict.fromkeys(_SPECIAL_IDS))
        return value.model_copy(update={"workers": None}) if name == "data" else value

    changed = [name for name in _FIXED_BY_A_RUN if fixed(stored, name) != fixed(recipe, name)]
    if changed:
        raise UserError(f"{path}: a run cannot change {', '.join(changed)} when it resumes. Start a new one with "
                        "--out, from this run's weights with stage=continue init=RUN if you like.")


def _corpus(recipe: Recipe, path: Path, resume: bool, world: World,
            console: Console) -> tuple[Corpus, Tokenizer, Recipe]:
    """Build or reopen the corpus (first process), open it (all), and fit the model's special ids to the tokenizer."""
    folder = path / "corpus"
    world.on_first(lambda: _prepare(recipe, folder, resume, console))
    corpus = _corpus_kind(recipe).open(folder)
    tokenizer = corpus.tokenizer
    special = dict(zip(_SPECIAL_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True))
    fitted: dict[str, Any] = {"model": recipe.model.model_copy(update=special)}
    if recipe.stage == "sft":
        fitted["style"] = corpus.facts["style"]
    return corpus, tokenizer, recipe.model_copy(update=fitted)


def _corpus_kind(recipe: Recipe) -> type[Corpus]:
    return DialogueCorpus if recipe.stage == "sft" else Corpus


def _prepare(recipe: Recipe, folder: Path, resume: bool, console: Console) -> None:
    if not recipe.data.sources:
        example = "data=chats.jsonl" if recipe.stage == "sft" else "data=my/texts"
        raise UserError(f"data: nothing to train on. Name a folder or file, for example {example}")
    if not resume:
        _make_corpus(recipe, folder, console)
        return
    try:
        # The run's own corpus, whatever has become of the files that it was made of.
        corpus = _corpus_kind(recipe).open(folder)
        if corpus.tokenizer.digest == corpus.facts["tokenizer"]["digest"]:
            return
        reason = f"{folder / 'tokenizer'}: not the tokenizer that the corpus was made with"
    except UserError as error:
        reason = str(error)
    if folder.exists():
        console.note(f"moonbase: warning: the run's corpus is damaged ({reason}); making it again from its sources")
    again = files.partial_sibling(folder)
    try:
        made = _make_corpus(recipe, again, console)
        if latest_checkpoint(folder.parent) is not None:
            _check_same_corpus(folder, made)
        files.replace_folder(again, folder)
    except OSError as error:
        raise files.explain_os_error(error, folder) from None
    finally:
        shutil.rmtree(again, ignore_errors=True)


def _check_same_corpus(folder: Path, made: Corpus) -> None:
    """Raises UserError where a corpus that was made again is not the one that the run has been trained on: its position
    in the data would mean other texts. A run.json that tells nothing of it is no reason to refuse."""
    before = read_facts(folder.parent).get("corpus")
    after = made.summary
    compared = ("documents", "bytes", "tokens", "train", "validation", "tokenizer")
    different = [name for name in compared if isinstance(before, dict) and before.get(name) != after[name]]
    if different:
        raise UserError(f"{folder}: damaged, and what its sources hold now is something else ({', '.join(different)} "
                        "differ), so the run cannot go on where it was. Start a new one with --out, from this run's "
                        "weights with stage=continue init=RUN if you like.")


def _make_corpus(recipe: Recipe, folder: Path, console: Console) -> Corpus:
    tokenizer = load_tokenizer(recipe.data.tokenizer) if recipe.data.tokenizer else None
    if tokenizer is None and recipe.init is not None:
        tokenizer = load_tokenizer(resolve_model_folder(recipe.init))
    if tokenizer is not None and tokenizer.vocab_size > recipe.model.vocab_size:
        raise UserError(f"data.tokenizer: {tokenizer.vocab_size} entries, "
                        f"but model.vocab_size={recipe.model.vocab_size}")
    if recipe.stage == "sft":
        assert tokenizer is not None, "sft starts from a model, which has one"
        style = chat_style(recipe, tokenizer)
        return prepare_dialogues(recipe.data, tokenizer, renderer(tokenizer, style), style, recipe.model.vocab_size,
                                 recipe.sequence_length, folder, progress=console)
    return prepare_corpus(recipe.data, tokenizer, recipe.model.vocab_size, folder, recipe.seed, progress=console)


def _open_run(run: RunFolder | None, recipe: Recipe, corpus: Corpus, resume: bool) -> None:
    assert run is not None
    run.write_config(recipe.to_yaml())
    size = sizes(recipe.model, recipe.sequence_length)
    facts: dict[str, Any] = {
        "name": recipe.name, "status": "running", "reason": None, "finished": None, "results": {},
        "command": _command(), "machine": machine_facts(), "versions": package_versions(),
        "commit": git_commit(), "parameters": size.parameters, "active_parameters": size.active_parameters,
        "corpus": corpus.summary, "next_commands": next_commands(run.path, "running"),
    }
    if not resume:
        facts["started"] = _now()
    run.update_facts(afresh=not resume, **facts)


def _command() -> str:
    """What was typed, torchrun's part of it as its environment tells."""
    size = announced("WORLD_SIZE", 1)
    if size == 1:
        return shlex.join(["moonbase", *sys.argv[1:]])
    here = announced("LOCAL_WORLD_SIZE", size)
    nodes = ["--nnodes", str(size // here)] if size > here else []
    return shlex.join(["torchrun", *nodes, "--nproc-per-node", str(here), "-m", "moonbase", *sys.argv[1:]])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _assemble(recipe: Recipe, path: Path, run: RunFolder | None, world: World, console: Console, corpus: Corpus,
              tokenizer: Tokenizer, make_sampler: MakeSampler | None) -> tuple[Trainer, Validation]:
    stream = PackedStream(corpus, "train", recipe.sequence_length, recipe.batch_size, recipe.seed, world.rank,
                          world.size)
    # Batches of the recipe's size: what is measured depends neither on the number of processes nor on micro-batches.
    validation = Validation(
        lambda max_bytes: validation_batches(corpus, recipe.sequence_length, recipe.batch_size, world.rank, world.size,
                                             max_bytes),
        torch.from_numpy(tokenizer.byte_lengths(recipe.model.vocab_size).astype("int64")))
    callbacks: list[Callback] = [validation]
    tokenizer_files = {file.name: file for file in (path / "corpus" / "tokenizer").iterdir() if file.is_file()}
    if run is not None:
        if make_sampler is not None:
            callbacks.append(Sampling(run, lambda trainer: make_sampler(trainer.model, tokenizer), console.note))
        callbacks.append(MetricsWriter(run))
        if recipe.tensorboard:
            callbacks.append(TensorBoardWriter(run))
    callbacks += [Progress(console), Checkpoints(run, path, tokenizer_files)]
    return make_trainer(recipe, world, stream, callbacks), validation


def _continue(trainer: Trainer, path: Path, console: Console) -> None:
    checkpoint = latest_checkpoint(path)
    for folder, reason in damaged_newest(path):
        console.note(f"moonbase: warning: {folder} is damaged ({reason}) and is passed over")
    if checkpoint is None:
        console.note(f"{path}: no checkpoint yet, starting from the first step")
        return
    resume(trainer, checkpoint)
    done = trainer.step >= trainer.recipe.steps
    console.note(f"{path}: all {trainer.step} steps are done; measuring again" if done else
                 f"resuming {path} at step {trainer.step}")


def _run(trainer: Trainer, validation: Validation, run: RunFolder | None, console: Console,
         facts: dict[str, Any]) -> None:
    """The loop, and the held-out text after its last checkpoint; fills the facts' status, reason, seconds, results."""
    with stopping_on_signals(trainer, console), _explaining(trainer):
        try:
            trainer.run()
        finally:
            facts["seconds"] = round(trainer.seconds, 1)
        measured = None
        if trainer.step >= trainer.recipe.steps:
            measured = validation.measure_final(trainer, console)
    if measured is None:
        facts |= {"status": "stopped", "reason": trainer.stop_reason}
        return
    results = {"validation_loss": measured[0], "validation_bits_per_byte": measured[1]}
    if run is not None:
        run.amend_metrics(trainer.step, **results)
    facts |= {"status": "finished", "results": results}


@contextlib.contextmanager
def _explaining(trainer: Trainer) -> Iterator[None]:
    """What a recipe can mend in the middle of a step: full memory, and a compiler that is missing or fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        less = {"none": " or set recompute=selective", "selective": " or set recompute=full", "full": ""}
        raise UserError(f"GPU memory is full: lower micro_batch_size (now {trainer.micro_batch_size})"
                        f"{less[trainer.recipe.recompute]}") from None
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"compile={trainer.recipe.compile}: torch cannot compile the model here ({reason}). "
                        "Set compile=off.") from error


@contextlib.contextmanager
def _recording(recipe: Recipe, run: RunFolder | None, console: Console) -> Iterator[dict[str, Any]]:
    """Yield the facts of how a run ends; they reach run.json and the report however it does, by SIGTERM too."""
    facts: dict[str, Any] = {"status": "failed", "reason": None, "results": {}, "next_commands": []}

    def record() -> None:
        facts["finished"] = _now()
        if run is not None:
            facts["next_commands"] = next_commands(run.path, facts["status"], "hf-int4" if recipe.qat else "hf")
            run.update_facts(**facts)
            write_report(run.path)

    try:
        with sigterm_as_ctrl_c():
            yield facts
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            facts["status"] = "stopped"
        facts["reason"] = "interrupted" if facts["status"] == "stopped" else str(error) or type(error).__name__
        try:
            record()
        except Exception as second:  # the first trouble is the one to raise
            console.note(f"the end of the run could not be recorded: {second}")
        raise
    record()


def next_commands(path: Path, status: str, fmt: str = "hf") -> list[str]:
    """What one may type next; `fmt`: of an exported checkpoint."""
    if status != "finished":
        return [shlex.join(["moonbase", "train", str(path), "--resume"])]
    exported = f"{path}-{fmt}"
    return [shlex.join(["moonbase", *words]) for words in (
        ("chat", str(path)), ("info", str(path)), ("convert", str(path), exported, "--format", fmt))]


@contextlib.contextmanager
def stopping_on_signals(trainer: Trainer, console: Console) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step in hand, with a checkpoint; a second Ctrl-C ends it at once.

    torchrun repeats the terminal's Ctrl-C to its processes: what follows within a second is the same request.
    """
    first: float | None = None

    def stop(number: int, _: Any) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            trainer.stop(f"stopped by {signal.Signals(number).name}")
            with contextlib.suppress(RuntimeError):  # the signal may have come in the middle of a print
                done = trainer.step >= trainer.recipe.steps
                console.note("stopping (Ctrl-C again stops at once)" if done else
                             "stopping after this step; the checkpoint comes first (Ctrl-C again stops at once)")
        elif number == signal.SIGINT and time.monotonic() - first > _SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    with _handling({signal.SIGINT: stop, signal.SIGTERM: stop}):
        yield


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Where there is no step to finish: what was written aside goes away, and the last words are said."""
    with _handling({signal.SIGTERM: _interrupt}):
        yield


@contextlib.contextmanager
def _handling(handlers: dict[signal.Signals, Callable[[int, Any], None]]) -> Iterator[None]:
    """Other handlers for a while. Outside the main thread Python allows none, and signals keep their meaning."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def default_run_folder(recipe: Recipe) -> Path:
    """`runs/NAME`, or `$MOONBASE_RUNS/NAME`."""
    return Path(os.environ.get("MOONBASE_RUNS", "runs")) / recipe.name
