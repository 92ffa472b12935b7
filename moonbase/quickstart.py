"""The whole chain on this machine: real files → tokenizer → shards → training → measurement → report → a model.

Needs no download: the corpus is the Python code of the running interpreter and of the packages installed beside it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import lzma
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moonbase.checkpoint import latest_checkpoint
from moonbase.data import Corpus, Tokenizer, installed_python_sources
from moonbase.engine import Engine, Sampling
from moonbase.errors import UserError
from moonbase.model import Transformer
from moonbase.recipe import Recipe, load_recipe
from moonbase.report import write_report
from moonbase.report.console import Console, duration
from moonbase.sizes import train_flops_per_token
from moonbase.train.assembly import make_trainer
from moonbase.train.callbacks.validation import FINAL_BYTES
from moonbase.train.parallel import World
from moonbase.train.run import train
from moonbase.train.run_folder import RunFolder
from moonbase.train.trainer import RepeatedBatch

PROMPTS = ("def __init__(self, ", "import numpy as np\n", "class TestCase(unittest.", "for i in range(", "    return ",
           'raise ValueError("')
CORPUS_BYTES = 16_000_000
_NAME = "quickstart"
_MEASURED_SECONDS = 3.0
_CPU_FLOPS = 1e11
"""What a step of ours gets from a good CPU, FLOP/s."""


def quickstart(preset: str = "pico", folder: str | Path = "runs/quickstart", minutes: float = 3.0) -> dict[str, Any]:
    """Run the chain in `folder`, training for about `minutes`. Returns the results. Raises UserError.

    A folder that holds an interrupted quickstart of the same preset is resumed; a finished one is refused. Ctrl-C in
    training ends it at a saved checkpoint with status "stopped".
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("quickstart runs in one process. For several: torchrun ... -m moonbase train")
    started = time.monotonic()
    folder = Path(folder)
    with Console() as console:
        resume = _interrupted(folder)
        if resume:
            console.stage(f"{folder}: going on with the interrupted run")
            recipe = _resumed(preset, folder)
        else:
            recipe = _recipe(preset)
            console.stage(f"moonbase quickstart: {preset}, about {duration(60 * minutes)} of training on this machine")
            recipe = recipe.model_copy(update={"steps": _steps_for(recipe, minutes, console)})
        outcome = train(recipe, folder, resume=resume, console=console, make_sampler=make_sampler)
        if outcome["status"] != "finished":
            _say_stopped(console, folder, outcome, preset)
            return outcome
        return _finish(console, folder, outcome, time.monotonic() - started)


def make_sampler(model: Transformer, tokenizer: Tokenizer):
    """Greedy completions through the engine, as the sampling callback wants them."""
    engine = Engine(model, tokenizer)
    return lambda prompts: engine.generate(prompts, Sampling(max_tokens=48))


def _recipe(preset: str) -> Recipe:
    recipe = load_recipe(preset)
    scale = 1 if not torch.cuda.is_available() else 20
    sources = tuple(installed_python_sources())
    data = recipe.data.model_copy(update={"sources": sources, "max_bytes": scale * CORPUS_BYTES})
    return recipe.model_copy(update={"name": _NAME, "data": data, "sample_prompts": PROMPTS})


def _interrupted(folder: Path) -> bool:
    if not (folder / "config.yaml").exists():
        return False
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = {}
    if isinstance(facts, dict) and facts.get("status") == "finished":
        raise UserError(f"{folder}: a finished quickstart is here. Look at {folder}/report.html, "
                        "or add --out for a new one.")
    return True


def _resumed(preset: str, folder: Path) -> Recipe:
    """The recipe of the interrupted run. Raises UserError where that is no quickstart of this preset."""
    recipe, wanted = load_recipe(str(folder / "config.yaml")), load_recipe(preset).model
    special = ("bos_token_id", "eos_token_id", "pad_token_id")  # taken from the tokenizer
    different = [name for name, value in recipe.model if name not in special and value != getattr(wanted, name)]
    if recipe.name != _NAME or different:
        raise UserError(f"{folder}: an interrupted run is here that is no quickstart of {preset}. Go on with it "
                        f"(moonbase train {shlex.quote(str(folder))} --resume), or choose another folder with --out.")
    return recipe


def _steps_for(recipe: Recipe, minutes: float, console: Console) -> int:
    """How many steps fit, measured on a throw-away model; rounded, so that it reads well. The median over a few
    seconds: a busy moment must not decide the length of the run. Raises UserError where not even one would fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = train_flops_per_token(recipe.model, recipe.sequence_length) * recipe.tokens_per_step
    if device.type == "cpu" and flops / _CPU_FLOPS > 60 * max(minutes, 1.0):
        raise UserError(f"one step of this preset would take about {duration(flops / _CPU_FLOPS)} on a CPU: "
                        "it needs a GPU; use --preset pico")
    shape = (recipe.batch_size, recipe.sequence_length + 1)
    tokens = torch.randint(0, recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(recipe.batch_size, recipe.sequence_length, dtype=torch.int32)
    documents[:, recipe.sequence_length // 2:] = 1
    trainer = make_trainer(recipe, World(0, 1, device), RepeatedBatch(tokens, documents))
    times: list[float] = []
    for _ in range(2):
        trainer.train_step()
    while len(times) < 4 or sum(times) < _MEASURED_SECONDS:
        console("measuring this machine", len(times))
        began = time.perf_counter()
        trainer.train_step()
        times.append(time.perf_counter() - began)
    del trainer
    gc.collect()  # compiled blocks refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return max(20, round(60 * minutes / statistics.median(times) / 10) * 10)


def _finish(console: Console, folder: Path, outcome: dict[str, Any], seconds: float) -> dict[str, Any]:
    console.stage("comparing with xz -9 on the same held-out bytes")
    corpus = Corpus.open(folder / "corpus")
    held_out = corpus.validation_text(FINAL_BYTES)
    xz = 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)
    ours = outcome["validation_bits_per_byte"]
    with contextlib.closing(RunFolder(folder)) as run:
        run.update_facts(results={"validation_loss": outcome["validation_loss"], "validation_bits_per_byte": ours,
                                  "xz_bits_per_byte": xz})
    report = write_report(folder)
    print(f"\nheld out, never seen: {len(held_out):,} bytes of Python")
    print(f"  this model   {ours:.3f} bits per byte")
    print(f"  xz -9        {xz:.3f} bits per byte")
    samples = _last_samples(folder)
    if samples:
        print("\nsome completions (greedy):")
    for prompt, text in samples:
        print(f"  {prompt!r} → {text!r}")
    print(f"\nreport: {report}   ({duration(seconds)} in all)")
    print("next:")
    for command in [*outcome["next_commands"], "moonbase train pico data=YOUR/TEXTS"]:
        print(f"  {command}")
    return {**outcome, "xz_bits_per_byte": xz, "held_out_bytes": len(held_out), "report": str(report),
            "seconds_in_all": seconds}


def _last_samples(folder: Path) -> list[tuple[str, str]]:
    """(prompt, continuation) of the newest samples; none where none could be drawn."""
    path = folder / "samples.txt"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("=== ")[-1].splitlines()[1:]
    values = [json.loads(line[4:]) for line in lines if line[:4] in (">>> ", "... ")]
    return list(zip(values[::2], values[1::2], strict=True))


def _say_stopped(console: Console, folder: Path, outcome: dict[str, Any], preset: str) -> None:
    saved = f"; a checkpoint is saved in {folder}/checkpoints" if latest_checkpoint(folder) else ""
    console.note(f"{outcome['reason']} at step {outcome['step']}{saved}.")
    again = ["moonbase", "quickstart"]
    again += ["--preset", preset] if preset != "pico" else []
    again += ["--out", str(folder)] if folder != Path("runs/quickstart") else []
    print(f"to go on: {shlex.join(again)}", file=sys.stderr)
