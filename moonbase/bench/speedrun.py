"""Time to loss: how many tokens and seconds MuonClip needs to come as far as tuned AdamW, on one corpus.

Published for Muon: about 52% of the training arithmetic of AdamW for the same loss (Liu et al. 2025, Moonlight). Here
AdamW, at the best rate of its own grid, trains for N steps; MuonClip, at the best rate of its grid, makes runs of
several lengths, and where its held-out loss passes AdamW's is what it needs (`speedrun_plan`). Everything else is the
same for both: first weights and order of the documents by seed, batch, warm-up, shape of the schedule, decay, clipping
of gradients, guard. Both clip attention logits over the recipe's threshold too, so that they compute the same; how
often that happened is in the result. Decay is not tuned: rate times decay times steps is a few hundredths here.

Seconds are tokens to the target times the median time of a step, with all that belongs to one; compilation, which both
need alike, and scoring are left out.

A comparison takes longer than one call may: every finished run is kept (`speedrun_log`), a call makes what is still
missing, and several processes share one folder, each on a GPU of its own (CUDA_VISIBLE_DEVICES). When all runs are
there neither GPU nor corpus is needed for the table and the picture:

    python -m moonbase.bench.speedrun --preset nano [--minutes 9] [--out FOLDER] [--json]
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moonbase.bench import machine_name
from moonbase.bench import speedrun_plan as planning
from moonbase.bench.networks import check_room, held_out_loss
from moonbase.bench.speedrun_log import RunLog, losses_of
from moonbase.bench.speedrun_plan import Plan, Run
from moonbase.bench.speedrun_result import findings, show
from moonbase.data import Corpus, PackedStream, installed_python_sources, prepare_corpus, validation_batches
from moonbase.data.stream import Batch
from moonbase.errors import TrainingStopped, UserError
from moonbase.model import Transformer
from moonbase.recipe import DataConfig, Recipe, load_recipe
from moonbase.report.console import Console
from moonbase.report.machine import git_commit, package_versions
from moonbase.report.words import compact, duration, plural
from moonbase.sizes import least_training_bytes
from moonbase.train.assembly import make_optimizer, make_trainer
from moonbase.train.parallel import World
from moonbase.train.precision import Masters
from moonbase.train.trainer import Trainer, memory_bytes

SEEDS = (0, 1, 2)
STEPS = {"cpu": 200, "cuda": 288}
"""N, unless told otherwise."""
FIELDS = {"cpu": (), "cuda": ("batch_size=32",)}
"""What differs from the preset: half of nano's batch, 65,536 tokens, makes twice the steps of the same tokens. Larger
batches favour Muon, smaller ones make its step a larger part of the time."""
SCHEDULE = ("schedule.kind=wsd", "schedule.warmup_steps=20", "schedule.decay_fraction=0.5",
            "schedule.final_lr_ratio=0.05")
CORPUS_BYTES = {"cpu": 8_000_000, "cuda": 140_000_000}
HELD_OUT_TOKENS = {"cpu": 1 << 17, "cuda": 1 << 19}
TOKENS_PER_SECOND = {"cpu": 6_000, "cuda": 150_000}
"""What a step is expected to take before one was timed: pico on two cores, packed documents of nano on an H200."""
SETUP_SECONDS = {"cpu": 10, "cuda": 20}
"""Of a run: drawing weights, scoring."""
COMPILE_SECONDS = {"cpu": 0, "cuda": 90}
"""Before the first run of a process."""
_UNTIMED_STEPS = 5
_IRRELEVANT = {"name", "init", "style", "data", "validate_every", "validation_batches", "sample_every",
               "sample_prompts", "checkpoint", "tensorboard"}
_POLL_SECONDS = 2.0


@dataclass
class Speedrun:
    """One comparison: what all runs share."""

    preset: str
    steps: int = 0
    """N; 0 takes the one of the device."""
    seeds: Sequence[int] = SEEDS
    rates: Sequence[float] = ()
    """Where both grids begin; the preset's rate with its half and its double unless given."""
    overrides: Sequence[str] = ()
    data: DataConfig | None = None
    kind: str = ""
    """cpu or cuda; empty takes what is here."""

    def __post_init__(self) -> None:
        kind = self.kind = self.kind or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(kind)
        steps = self.steps or STEPS[kind]
        self._fields = [*FIELDS[kind], *SCHEDULE, *self.overrides, "validate_every=1000000", "sample_every=null"]
        recipe = load_recipe(self.preset, [*self._fields, f"steps={steps}"])
        usual, self.least_bytes = recipe.optimizer.lr, least_training_bytes(recipe)
        self.tokens_per_step, self.vocab_size = recipe.tokens_per_step, recipe.model.vocab_size
        self.plan = Plan(steps, tuple(self.rates) or (usual / 2, usual, usual * 2), tuple(self.seeds))
        self._recipes: dict[Run, Recipe] = {}

    @property
    def name(self) -> str:
        return Path(self.preset).stem

    def recipe(self, run: Run) -> Recipe:
        if run not in self._recipes:
            self._recipes[run] = load_recipe(self.preset, [
                *self._fields, f"steps={run.steps}", f"seed={run.seed}", f"optimizer.name={run.optimizer}",
                f"optimizer.lr={run.rate!r}"])
        return self._recipes[run]

    def digest(self, run: Run) -> str:
        """Of all that determines a run beside corpus and code."""
        values = {"recipe": self.recipe(run).model_dump(mode="json", exclude=_IRRELEVANT), "device": self.kind,
                  "held_out_tokens": HELD_OUT_TOKENS[self.kind]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def seconds(self, run: Run, records: Sequence[dict[str, Any]] = ()) -> float:
        """How long a run will take, by the steps that its optimizer was seen to make, else as expected."""
        seen = [record["step_seconds"] for record in records if record["optimizer"] == run.optimizer]
        step = median(seen) if seen else self.tokens_per_step / TOKENS_PER_SECOND[self.kind]
        return run.steps * step + SETUP_SECONDS[self.kind]


def measure(preset: str, peer: str | None = None, *, out: str | Path | None = None, minutes: float | None = None,
            **settings: Any) -> dict[str, Any]:
    """Make the runs that are missing and return the table of what is there.

    `peer` is that of other benches and means nothing. out: folder of the runs, runs/speedrun/PRESET unless given;
    minutes: no run begins that would not end within them; settings: fields of `Speedrun`. Raises UserError.
    """
    from moonbase.evals.statistics import mean_interval

    mean_interval([0.0, 1.0])  # a package that is missing is missed now, not after training
    started = time.monotonic()
    speedrun = Speedrun(preset, **settings)
    log = RunLog(Path(out) if out else Path("runs") / "speedrun" / speedrun.name)
    with Console() as console:
        found = _finished(speedrun, log)
        if found is not None:
            speedrun, records = found
        else:
            check_room("speedrun", preset, speedrun.least_bytes, speedrun.kind == "cuda")
            _announce(speedrun, console)
            deadline = started + 60 * minutes if minutes is not None else math.inf
            records = Runner(speedrun, log, _open_corpus(speedrun, log, console), deadline, console).go_on()
        result = findings(speedrun.plan, records, speedrun.name, speedrun.tokens_per_step)
        console.note(result["verdict"])
    return result


def _announce(speedrun: Speedrun, console: Console) -> None:
    runs = planning.imagined(speedrun.plan)
    tokens = sum(run.steps for run in runs) * speedrun.tokens_per_step
    console.note(f"{speedrun.name}: about {plural(len(runs), 'run')} of {speedrun.tokens_per_step:,} tokens a step, "
                 f"{speedrun.plan.steps} steps for AdamW, {compact(tokens)} tokens in all: about "
                 f"{duration(sum(map(speedrun.seconds, runs)))} of one device, and a minute or two in every call")


def _finished(speedrun: Speedrun, log: RunLog) -> tuple[Speedrun, list[dict[str, Any]]] | None:
    """A comparison that is complete, of whichever corpus, and made on another kind of device where nothing was made on
    this one: its table and picture are wanted where there is no GPU, too."""
    corpora = log.corpora()
    for each in (speedrun, replace(speedrun, kind="cpu" if speedrun.kind == "cuda" else "cuda")):
        found = [records for corpus in corpora if (records := log.of(each.digest, corpus))]
        for records in found:
            if not planning.needed(each.plan, losses_of(records)):
                return each, records
        if found:
            break
    return None


def _open_corpus(speedrun: Speedrun, log: RunLog, console: Console) -> Corpus:
    """The corpus of the folder, fixed once it is there. Raises UserError where it is another network's."""
    folder = log.folder / "corpus"
    with log.alone("corpus"):
        if not (folder / "corpus.json").is_file():
            data = speedrun.data or DataConfig(sources=tuple(installed_python_sources()),
                                               max_bytes=CORPUS_BYTES[speedrun.kind])
            prepare_corpus(data, None, speedrun.vocab_size, folder, 0, progress=console)
        corpus = Corpus.open(folder)
    if corpus.vocab_size != speedrun.vocab_size:
        raise UserError(f"{folder}: a corpus of {corpus.vocab_size} ids, the network has {speedrun.vocab_size}; choose "
                        "another folder")
    longest = max(speedrun.plan.lengths) * speedrun.tokens_per_step
    if corpus.train.num_tokens < longest:
        console.note(f"the corpus has {compact(corpus.train.num_tokens)} tokens: the longest runs, of "
                     f"{compact(longest)}, read some of it twice")
    return corpus


def content_digest(corpus: Corpus) -> str:
    """Of the tokens themselves: the same on every machine that made the same corpus, whenever that was."""
    digest = hashlib.sha256()
    for entry in corpus.facts["shards"]:
        path = corpus.folder / entry["file"]
        for each in (path, path.with_suffix(".offsets.npy")):
            with open(each, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


class Runner:
    """Makes runs one after another, with one network that is filled anew for each, so that it is compiled once."""

    def __init__(self, speedrun: Speedrun, log: RunLog, corpus: Corpus, deadline: float, console: Console) -> None:
        """deadline: of time.monotonic."""
        self.speedrun, self.log, self.corpus, self.deadline, self.console = speedrun, log, corpus, deadline, console
        self.digest = content_digest(corpus)
        self.trainer: Trainer | None = None
        self._held_out: list[Batch] = []
        versions = package_versions()
        self._facts = {"machine": machine_name(), "commit": git_commit(),
                       "versions": {name: versions[name] for name in ("python", "torch", "triton") if name in versions}}

    def records(self) -> list[dict[str, Any]]:
        return self.log.of(self.speedrun.digest, self.digest)

    def go_on(self) -> list[dict[str, Any]]:
        """Until nothing is missing, or there is no time for any missing run, and nobody else is making one whose
        outcome could still be waited for. Returns the records of all finished runs."""
        others = len(self.log.records()) - len(self.records())
        if others:
            self.console.note(f"{self.log.path}: {plural(others, 'run')} of another corpus or recipe do not count here")
        while missing := planning.needed(self.speedrun.plan, losses_of(self.records())):
            made, busy = self._make_one(missing)
            if made:
                continue
            if not busy or time.monotonic() + _POLL_SECONDS > self.deadline:
                least = sum(self.speedrun.seconds(run, self.records()) for run in missing)
                self.console.note(f"no time for another run; at least {plural(len(missing), 'run')} are missing, "
                                  f"{duration(least)}: the same command goes on")
                break
            time.sleep(_POLL_SECONDS)
        return self.records()

    def _make_one(self, missing: Sequence[Run]) -> tuple[bool, bool]:
        """Make the first missing run that is free and fits. Returns whether there was one, and whether others are at
        work on any."""
        busy = False
        for run in missing:
            with self.log.claim(f"{self.digest}-{self.speedrun.digest(run)}") as mine:
                if not mine:
                    busy = True
                    continue
                records = self.records()
                if run in losses_of(records):
                    return True, busy  # finished by somebody else between looking and claiming
                compiling = 0 if self.trainer else COMPILE_SECONDS[self.speedrun.kind]
                if time.monotonic() + compiling + self.speedrun.seconds(run, records) > self.deadline:
                    continue
                record = self._train(run)
                if record is not None:
                    self.log.append(record)
                    return True, busy
        return False, busy

    def _begin(self, recipe: Recipe) -> Trainer:
        """A trainer before its first step, as `make_trainer` would give it."""
        stream = PackedStream(self.corpus, "train", recipe.sequence_length, recipe.batch_size, recipe.seed)
        world = World(0, 1, self.speedrun.device)
        if self.trainer is None:
            return make_trainer(recipe, world, stream)
        model, masters = self.trainer.model, self.trainer.masters
        self.trainer = None  # the optimizer's state goes before the next one's comes
        if self.speedrun.kind == "cuda":
            gc.collect()
        refill(model, masters, recipe.seed)
        return Trainer(recipe, model, masters, make_optimizer(recipe, masters), stream, world, [])

    def _train(self, run: Run) -> dict[str, Any] | None:
        """The record of one run; None where it would not end in time."""
        recipe, started, loss = self.speedrun.recipe(run), time.monotonic(), None
        trainer = self.trainer = self._begin(recipe)
        what = f"{run.optimizer}, rate {compact(run.rate)}, {run.steps} steps, seed {run.seed}"
        course = Course()
        try:
            for step in range(run.steps):
                course.add(trainer.train_step())
                self.console(what, step + 1, run.steps, f"loss {course.losses[-1]}")
                left = (run.steps - step - 1) * course.step_seconds
                if step >= 2 * _UNTIMED_STEPS and time.monotonic() + left > self.deadline:
                    self.console.note(f"{what}: left unfinished, it would not end in time")
                    return None
            loss = self._held_out_loss()
            self.console.note(f"{what}: {loss:.4f} nats a token held out, {course.step_seconds * 1e3:.0f} ms a step")
        except TrainingStopped as stopped:
            self.console.note(f"{what}: {stopped}")
        return {"optimizer": run.optimizer, "rate": run.rate, "steps": run.steps, "seed": run.seed,
                "loss": loss if loss is not None and math.isfinite(loss) else None,
                "recipe": self.speedrun.digest(run), "corpus": self.digest, "preset": self.speedrun.name,
                "tokens_per_step": recipe.tokens_per_step, "step_seconds": course.step_seconds,
                "seconds": time.monotonic() - started, "skipped_steps": course.skipped,
                "clipped_heads": course.clipped, "memory_bytes": memory_bytes(self.speedrun.device),
                "corpus_tokens": self.corpus.train.num_tokens, "losses": course.losses,
                **self._facts}

    def _held_out_loss(self) -> float:
        """The same tokens for everybody."""
        assert self.trainer is not None
        recipe = self.trainer.recipe
        if not self._held_out:
            batches = validation_batches(self.corpus, recipe.sequence_length, recipe.batch_size)
            wanted = -(-HELD_OUT_TOKENS[self.speedrun.kind] // recipe.tokens_per_step)
            self._held_out = list(itertools.islice(batches, wanted))
        return held_out_loss(self.trainer, self._held_out)


class Course:
    """What is kept of a run's steps: losses of its batches, times from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.losses: list[float | None] = []
        self.skipped = self.clipped = 0
        self._seconds: list[float] = []
        self._last = time.perf_counter()

    def add(self, record: dict[str, Any]) -> None:
        """The record of a step that ended just now."""
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        self.losses.append(round(record["loss"], 4) if math.isfinite(record["loss"]) else None)
        self.skipped += "skipped" in record
        self.clipped += sum(record["clipped_heads"])

    @property
    def step_seconds(self) -> float:
        """Median; the first steps, which compile, do not count."""
        return median(self._seconds[_UNTIMED_STEPS:] or self._seconds)


@torch.no_grad()
def refill(model: Transformer, masters: Masters, seed: int) -> None:
    """Make a trained network what a fresh one of this seed is, in the same memory."""
    for name, values in model.initial_values(seed):
        masters.named[name].copy_(values)
    for buffer in model.buffers():
        buffer.zero_()
    masters.zero_gradients()
    masters.publish(0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moonbase.bench.speedrun", description="Time to loss.")
    parser.add_argument("--preset", default="pico")
    parser.add_argument("--minutes", type=float, help="no run begins that would not end within them")
    parser.add_argument("--out", type=Path, help="folder of the runs; runs/speedrun/PRESET unless given")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    given = parser.parse_args(arguments)
    try:
        result = measure(given.preset, out=given.out, minutes=given.minutes)
    except UserError as error:
        sys.exit(f"error: {error}")
    if given.json:
        print(json.dumps(result, allow_nan=False))
        return
    show(result)


if __name__ == "__main__":
    main()
