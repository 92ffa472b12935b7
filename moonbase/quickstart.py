"""The whole chain on this machine: real files → tokenizer → training → fine-tuning on dialogues → measurement → report.

Needs no download: the corpus is the Python code of the running interpreter and of the packages installed beside it, the
dialogues are made from a seed. Two runs lie in one folder: `pretrain/`, and on top of it the fine-tuned model, which is
what `moonbase chat FOLDER` talks to. Any of them may be interrupted and goes on where it was.
"""

from __future__ import annotations

import contextlib
import gc
import json
import lzma
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moonbase import files
from moonbase.chat import encode, render_parts
from moonbase.checkpoint import latest_checkpoint
from moonbase.data import Corpus, Tokenizer, installed_python_sources
from moonbase.engine import Engine, Sampling
from moonbase.errors import UserError
from moonbase.loading import load, load_tokenizer_of
from moonbase.model import Transformer
from moonbase.recipe import DataConfig, Recipe, Source, load_recipe, style_of
from moonbase.report import write_report
from moonbase.report.console import Console, duration
from moonbase.sizes import train_flops_per_token
from moonbase.synth import Evaluation, evaluate, held_out_tasks, make_dialogues, write_dialogues
from moonbase.synth.evaluation import Complete, Prompt
from moonbase.train.assembly import make_trainer
from moonbase.train.callbacks.validation import FINAL_BYTES
from moonbase.train.parallel import World, announced
from moonbase.train.run import sigterm_as_ctrl_c, train
from moonbase.train.run_folder import RunFolder
from moonbase.train.trainer import RepeatedBatch

PROMPTS = ("def __init__(self, ", "import numpy as np\n", "class TestCase(unittest.", "for i in range(", "    return ",
           'raise ValueError("')
CHAT_PROMPTS = ("Hello!", "Who are you?", "What does len do in Python?")
CORPUS_BYTES = 16_000_000
MINUTES = 2.75
"""Of pretraining, unless told otherwise."""
CHAT_TOKENS = 1_400_000
"""What fine-tuning sees on a CPU, less only where `minutes` are fewer: a small model begins to copy what it is asked
about after about a million tokens, all at once, whatever the time that takes."""
DIALOGUES = 16_000
QUESTIONS = 200
EXAMPLES = 8
_VOCABULARY_DIALOGUES = 1000
_DIALOGUE_SEED = 1
_VOCABULARY_SEED = 2
_CHAT_LR = 0.75
"""Of pretraining's rate."""
_NAME = "quickstart"
_BASE = "pretrain"
_REPLY_TOKENS = 96
_CACHE_TOKENS = 32_768
_MEASURED_SECONDS = 3.0
_AROUND_STEPS = 1.2
"""A run takes longer than its steps: reading, validation, samples, checkpoints, the live line."""
_CPU_FLOPS = 1e11
"""What a step of ours gets from a good CPU, FLOP/s."""


def quickstart(preset: str = "pico", folder: str | Path = "runs/quickstart",
               minutes: float = MINUTES) -> dict[str, Any]:
    """Run the chain in `folder`, pretraining for about `minutes`. Returns the results. Raises UserError.

    A folder that holds an interrupted quickstart of the same preset is resumed; a finished one is refused. Ctrl-C in
    training ends it at a saved checkpoint with status "stopped".
    """
    if announced("WORLD_SIZE", 1) > 1:
        raise UserError("quickstart runs in one process. For several: torchrun ... -m moonbase train")
    if not 0 < minutes < math.inf:
        raise UserError(f"minutes={minutes}: a number of minutes is needed, 3 for example")
    started = time.monotonic()
    folder = Path(folder)
    with Console() as console, _saying_how_to_go_on(folder, preset):
        _check_folder(folder, preset)
        for run, stage in ((folder / _BASE, _pretrain), (folder, _fine_tune)):
            outcome: dict[str, Any] = {}
            if _facts(run).get("status") != "finished":
                outcome = stage(preset, folder, minutes, (run / "config.yaml").exists(), console)
                if outcome["status"] != "finished":
                    _say_stopped(console, folder, run, outcome, preset)
                    return outcome
        return _finish(console, folder, outcome, started)


def _check_folder(folder: Path, preset: str) -> None:
    """Raises UserError where the folder holds a finished quickstart, or runs that are none of this preset."""
    facts = _facts(folder)
    if facts.get("status") == "finished" and ("tool_questions" in facts["results"] or not (folder / _BASE).is_dir()):
        raise UserError(f"{folder}: a finished quickstart is here. Look at {folder}/report.html, "
                        "or add --out for a new one.")
    special = ("bos_token_id", "eos_token_id", "pad_token_id")  # taken from the tokenizer
    for run, stage in ((folder / _BASE, "pretrain"), (folder, "sft")):
        if not (run / "config.yaml").exists():
            continue
        recipe, wanted = load_recipe(str(run / "config.yaml")), load_recipe(preset).model
        different = [name for name, value in recipe.model if name not in special and value != getattr(wanted, name)]
        if (recipe.name, recipe.stage) != (_NAME, stage) or different:
            raise UserError(f"{run}: an interrupted run is here that is no quickstart of {preset}. Go on with it "
                            f"(moonbase train {shlex.quote(str(run))} --resume), or choose another folder with --out.")


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {"results": {}}
    return facts if isinstance(facts, dict) and isinstance(facts.get("results"), dict) else {"results": {}}


# --- pretraining ------------------------------------------------------------------------------------------------------


def _pretrain(preset: str, folder: Path, minutes: float, resume: bool, console: Console) -> dict[str, Any]:
    folder = folder / _BASE
    if resume:
        console.stage(f"{folder}: going on with the interrupted run")
        recipe = load_recipe(str(folder / "config.yaml"))
    else:
        recipe = _recipe(preset)
        console.stage(f"moonbase quickstart: {preset}, about {duration(60 * minutes)} of pretraining on this machine")
        _refuse_what_needs_a_gpu(recipe, minutes)
        texts = _vocabulary_texts(folder)  # first, so that a folder that cannot be written is known at once
        recipe = recipe.model_copy(update={"steps": _steps_for(recipe, minutes, console)})
        data = recipe.data.model_copy(update={"vocabulary_sources": (Source(path=str(texts)),), "split_digits": True})
        recipe = recipe.model_copy(update={"data": data})
    return train(recipe, folder, resume=resume, console=console, make_sampler=make_sampler)


def make_sampler(model: Transformer, tokenizer: Tokenizer):
    """Greedy completions through the engine, as the sampling callback wants them."""
    engine = Engine(model, tokenizer, cache_tokens=8192, max_running=8, prefix_cache=False)
    return lambda prompts: engine.generate(prompts, Sampling(max_tokens=48))


def _recipe(preset: str) -> Recipe:
    recipe = load_recipe(preset)
    scale = 1 if not torch.cuda.is_available() else 20
    sources = tuple(installed_python_sources())
    data = recipe.data.model_copy(update={"sources": sources, "max_bytes": scale * CORPUS_BYTES})
    return recipe.model_copy(update={"name": _NAME, "data": data, "sample_prompts": PROMPTS})


def _vocabulary_texts(folder: Path) -> Path:
    """Dialogues as plain text, which the vocabulary is learned from beside the corpus. None of them is trained on."""
    path = files.make_folder(folder) / "vocabulary.jsonl"
    lines = []
    for dialogue in make_dialogues(_VOCABULARY_DIALOGUES, _VOCABULARY_SEED):
        parts = render_parts(dialogue["messages"], dialogue["tools"], add_generation_prompt=False)
        lines.append(json.dumps({"text": "\n".join(part.text for part in parts if not part.special)}) + "\n")
    files.write_text(path, "".join(lines))
    return path


def _refuse_what_needs_a_gpu(recipe: Recipe, minutes: float) -> None:
    """Raises UserError where not even one step would fit into the time."""
    flops = train_flops_per_token(recipe.model, recipe.sequence_length) * recipe.tokens_per_step
    if not torch.cuda.is_available() and flops / _CPU_FLOPS > 60 * max(minutes, 1.0):
        raise UserError(f"one step of this preset would take about {duration(flops / _CPU_FLOPS)} on a CPU: "
                        "it needs a GPU; use --preset pico")


def _steps_for(recipe: Recipe, minutes: float, console: Console) -> int:
    """How many steps fit, measured on a throw-away model; rounded, so that it reads well. The median over a few
    seconds: a busy moment must not decide the length of the run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    return max(20, round(60 * minutes / (_AROUND_STEPS * statistics.median(times)) / 10) * 10)


def _compare_with_xz(folder: Path, console: Console) -> dict[str, Any]:
    """What the pretrained model reached, beside what xz makes of the same held-out bytes; into run.json and report."""
    console.stage("comparing with xz -9 on the same held-out bytes")
    held_out = Corpus.open(folder / "corpus").validation_text(FINAL_BYTES)
    xz = 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)
    results = _facts(folder)["results"] | {"xz_bits_per_byte": xz, "held_out_bytes": len(held_out)}
    with contextlib.closing(RunFolder(folder)) as run:
        run.update_facts(results=results)
    write_report(folder)
    return results


# --- fine-tuning on dialogues -----------------------------------------------------------------------------------------


def _fine_tune(preset: str, folder: Path, minutes: float, resume: bool, console: Console) -> dict[str, Any]:
    recipe = load_recipe(str(folder / "config.yaml")) if resume else _chat_recipe(folder, minutes)
    if resume:
        console.stage(f"{folder}: going on with the interrupted run")
    else:
        console.stage(f"fine-tuning on {DIALOGUES:,} dialogues with tools, {recipe.steps:,} steps")
        console("writing dialogues", 0, DIALOGUES)
        write_dialogues(folder / "dialogues.jsonl", DIALOGUES, _DIALOGUE_SEED)
    return train(recipe, folder, resume=resume, console=console, make_sampler=make_chat_sampler)


def _chat_recipe(folder: Path, minutes: float) -> Recipe:
    """The recipe of the second stage, from that of the first: the same model and batches, on dialogues."""
    base = load_recipe(str(folder / _BASE / "config.yaml"))
    tokens = CHAT_TOKENS * (20 if torch.cuda.is_available() else 1) * min(1.0, minutes / MINUTES)
    return base.model_copy(update={
        "stage": "sft", "init": str(folder / _BASE), "style": "kimi-k2",
        "data": DataConfig(sources=(Source(path=str(folder / "dialogues.jsonl")),)),
        "steps": max(20, round(tokens / base.tokens_per_step / 10) * 10), "sample_prompts": CHAT_PROMPTS,
        "optimizer": base.optimizer.model_copy(update={"lr": _CHAT_LR * base.optimizer.lr}),
    })


def make_chat_sampler(model: Transformer, tokenizer: Tokenizer, style: str = "kimi-k2"):
    """Greedy replies through the engine to what a user says first."""
    complete = make_complete(model, tokenizer, style)
    return lambda prompts: complete([([{"role": "user", "content": prompt}], []) for prompt in prompts])


def make_complete(model: Transformer, tokenizer: Tokenizer, style: str) -> Complete:
    """Greedy turns of a model, as the evaluation wants them."""
    stop = () if tokenizer.im_end_id is None else (tokenizer.im_end_id,)
    engine = Engine(model, tokenizer, stop_ids=stop, cache_tokens=_CACHE_TOKENS, prefix_cache=False)

    def complete(prompts: Any) -> list[str]:
        def ids(prompt: Prompt) -> list[int]:
            return encode(tokenizer, render_parts(*prompt, style))

        written = engine.generate_ids([ids(prompt) for prompt in prompts], Sampling(max_tokens=_REPLY_TOKENS))
        return [tokenizer.decode(reply) for reply in written]

    return complete


def _evaluate(folder: Path, console: Console) -> Evaluation:
    console.stage(f"asking {QUESTIONS} questions that are in no dialogue")
    tokenizer = load_tokenizer_of(folder)
    style = style_of(folder) or "kimi-k2"
    return evaluate(held_out_tasks(QUESTIONS), make_complete(load(folder), tokenizer, style), style)


# --- what it came to --------------------------------------------------------------------------------------------------


def _finish(console: Console, folder: Path, outcome: dict[str, Any], started: float) -> dict[str, Any]:
    evaluation = _evaluate(folder, console)
    summary = evaluation.summary()
    base = _compare_with_xz(folder / _BASE, console)
    with contextlib.closing(RunFolder(folder)) as run:
        run.update_facts(results={**_facts(folder)["results"], "tool_questions": summary}, base_run=_BASE,
                         next_commands=next_commands(folder))
    files.write_text(folder / "examples.json", json.dumps(_examples(evaluation), indent=1, ensure_ascii=False) + "\n")
    report = write_report(folder)
    ours, xz = base["validation_bits_per_byte"], base["xz_bits_per_byte"]
    print(f"\nheld out, never seen: {base['held_out_bytes']:,} bytes of Python")
    print(f"  the pretrained model   {ours:.3f} bits per byte")
    print(f"  xz -9                  {xz:.3f} bits per byte")
    samples = _last_samples(folder / _BASE)
    if samples:
        print("\nsome completions of the pretrained model (greedy):")
    for prompt, text in samples:
        print(f"  {prompt!r} → {text!r}")
    print(f"\nheld-out questions that need a tool: {summary['questions']}")
    print(f"  right call                 {summary['right_calls']:.1%}")
    print(f"  right call and answer      {summary['right']:.1%}")
    seconds = time.monotonic() - started
    print(f"\nreport: {report}   ({duration(seconds)} in all)")
    print("next:")
    commands = [*next_commands(folder), "moonbase train pico data=YOUR/TEXTS"]
    for command in commands:
        print(f"  {command}")
    return {"folder": str(folder), "status": "finished", **outcome,
            "validation_loss": base["validation_loss"], "validation_bits_per_byte": ours,
            "xz_bits_per_byte": xz, "held_out_bytes": base["held_out_bytes"], "tool_questions": summary,
            "report": str(report), "next_commands": next_commands(folder), "seconds_in_all": seconds}


def next_commands(folder: Path) -> list[str]:
    """What one may type after a quickstart."""
    return [shlex.join(["moonbase", *words]) for words in (
        ("chat", str(folder)), ("serve", str(folder)), ("info", str(folder)),
        ("convert", str(folder), f"{folder}-hf", "--format", "hf"))]


def _examples(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Dialogues for the report: right ones of every kind, and what went wrong where something did."""
    kinds: dict[str, list[Any]] = {}
    for outcome in evaluation.outcomes:
        if outcome.answered:
            kinds.setdefault(outcome.task.kind, []).append(outcome)
    wrong = [outcome for outcome in evaluation.outcomes if not outcome.answered][:2]
    shown = [outcomes[number] for number in range(2) for outcomes in kinds.values() if len(outcomes) > number]
    chosen = shown[:EXAMPLES - len(wrong)] + wrong
    return [{"kind": outcome.task.kind, "right": outcome.answered, "reason": outcome.reason,
             "tools": [tool["function"]["name"] for tool in outcome.task.tools], "messages": outcome.messages}
            for outcome in chosen]


def _last_samples(folder: Path) -> list[tuple[str, str]]:
    """(prompt, continuation) of the newest samples; none where none could be drawn."""
    path = folder / "samples.txt"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("=== ")[-1].splitlines()[1:]
    values = [json.loads(line[4:]) for line in lines if line[:4] in (">>> ", "... ")]
    return list(zip(values[::2], values[1::2], strict=True))


def _say_stopped(console: Console, folder: Path, run: Path, outcome: dict[str, Any], preset: str) -> None:
    saved = f"; a checkpoint is saved in {run}/checkpoints" if latest_checkpoint(run) else ""
    console.note(f"{outcome['reason']} at step {outcome['step']}{saved}.")
    _say_how_to_go_on(folder, preset)


def _say_how_to_go_on(folder: Path, preset: str) -> None:
    again = ["moonbase", "quickstart"]
    again += ["--preset", preset] if preset != "pico" else []
    again += ["--out", str(folder)] if folder != Path("runs/quickstart") else []
    print(f"to go on: {shlex.join(again)}", file=sys.stderr)


@contextlib.contextmanager
def _saying_how_to_go_on(folder: Path, preset: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM between the trainings: what is finished stays, what was in hand is done again."""
    try:
        with sigterm_as_ctrl_c():
            yield
    except KeyboardInterrupt:
        _say_how_to_go_on(folder, preset)
        raise
