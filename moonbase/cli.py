"""The `moonbase` command: one thin verb per capability.

A verb imports its room when it runs, so that `--help` and `info` answer at once. Results go to standard output,
progress to standard error; with `--json` a verb prints exactly one JSON object. Exit codes: 0 done, 1 failed,
2 the user's mistake, 75 worth trying again, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moonbase import cli_agents, cli_evals
from moonbase.cli_results import deliver, show_bench, show_int4, show_run, show_speedrun
from moonbase.errors import TrainingStopped, TryAgain, UserError

INTERRUPTED = 130

app = typer.Typer(
    name="moonbase",
    help="Train, convert, measure and talk to K2-class models, from two CPU cores up.",
    epilog="Start here:  moonbase quickstart\n\nExamples of a command:  moonbase train --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Format(StrEnum):
    """What `moonbase convert` writes."""

    hf = "hf"
    hf_int4 = "hf-int4"
    hf_fp8 = "hf-fp8"


class Dtype(StrEnum):
    """The floating-point weights that `moonbase convert` writes."""

    bf16 = "bf16"
    fp32 = "fp32"
    keep = "keep"


class ScaleRule(StrEnum):
    """How `moonbase convert` finds the scale of an INT4 group."""

    absmax_7 = "absmax/7"
    absmax_7_5 = "absmax/7.5"
    least_error = "least-error"


def _complete_preset(incomplete: str) -> list[str]:
    from moonbase.presets import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
PRESETS = "pico, nano, moonlight-16b, deepseek-v3, deepseek-v3.2, kimi-k2 or kimi-k2.5"
"""For help texts: reading the folder of presets would load what `--help` does not need."""


# --- verbs ------------------------------------------------------------------------------------------------------------


@app.command(epilog="Examples:  moonbase quickstart\n\n"
                    "  moonbase quickstart --preset nano --minutes 30 --out runs/nano")
def quickstart(
    preset: Annotated[str, typer.Option(help="What to train: pico on a CPU, nano on a GPU.",
                                        autocompletion=_complete_preset)] = "pico",
    out: Annotated[Path, typer.Option(help="Folder for the run and its report; an interrupted run in it is "
                                           "resumed.")] = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Minutes of pretraining; fine-tuning takes about two "
                                                          "more.")] = 2.75,
    as_json: AsJson = False,
) -> None:
    """The whole chain on this machine, from a corpus to a report and a model to talk to.

    Corpus, tokenizer, pretraining, fine-tuning on dialogues with tools, measurement, report. Nothing is downloaded: the
    text is the Python code that this machine already has. Ctrl-C stops at a checkpoint; the same command goes on.
    """
    from moonbase.quickstart import quickstart as run_quickstart

    result = deliver(as_json, lambda: run_quickstart(preset=preset, folder=out, minutes=minutes))
    if result.get("status") == "stopped":
        raise typer.Exit(INTERRUPTED)


@app.command(epilog="Examples:  moonbase train pico data=my/texts steps=500\n\n"
                    "  moonbase train my-recipe.yaml optimizer.lr=2e-3 --out runs/second\n\n"
                    "  moonbase train runs/second --resume\n\n"
                    "  moonbase train runs/second stage=continue data=more/texts --out runs/further\n\n"
                    "  moonbase train runs/second stage=sft data=chats.jsonl optimizer.lr=2e-4 --out runs/chat")
def train(
    recipe: Annotated[str, typer.Argument(help="A preset such as pico or nano, a YAML file of recipe fields, a run "
                                               "folder to repeat (--out NEW) or resume (--resume), or with stage=sft "
                                               "or stage=continue a run or checkpoint folder to train further.",
                                          metavar="RECIPE", autocompletion=_complete_preset)],
    overrides: Annotated[list[str] | None, typer.Argument(
        metavar="key=value ...", help="Recipe fields by dotted name: data, steps, batch_size, sequence_length, "
                                       "optimizer.lr, seed, ... The config.yaml of any run shows them all.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run folder.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder: checkpoints, metrics, samples and report.html.",
                                             show_default="runs/NAME, by the recipe's name")] = None,
    as_json: AsJson = False,
) -> None:
    """Pretrain, continue from a checkpoint (stage=continue), or fine-tune one on dialogues (stage=sft).

    data=FOLDER or data=FILE names the text, where the recipe does not yet: .txt .md .py .rst .jsonl .parquet, plain, gz
    or zst, in any mix.

    Dialogues are JSONL, a line each: {"messages": [...], "tools": [...]} as OpenAI's chat API has them. The loss is on
    what the assistant says. Network, batches and optimizer are those of the run that is trained further; style=kimi-k2,
    kimi-k2-thinking or kimi-k2.5 sets how dialogues are written as tokens.

    Ctrl-C saves a checkpoint first. Under torchrun the work is shared among its processes.
    """
    from moonbase.recipe import load_next_recipe, load_recipe

    further = not resume and os.path.isdir(recipe) and any(
        override in ("stage=sft", "stage=continue") for override in overrides or ())
    if further:
        plan = load_next_recipe(recipe, overrides or ())
    elif os.path.isfile(Path(recipe) / "config.yaml"):
        if out is None and not resume:
            raise UserError(f"{recipe} is a run folder: add --resume to go on, or --out NEW to repeat its recipe")
        out = out or Path(recipe)
        recipe = str(Path(recipe) / "config.yaml")
    if not further:
        plan = load_recipe(recipe, overrides or ())

    from moonbase.train.run import default_run_folder
    from moonbase.train.run import train as run_training

    folder = out or default_run_folder(plan)
    if resume and (folder / "config.yaml").is_file():
        # The run's own recipe is the base, whatever preset it was started from.
        plan = load_recipe(str(folder / "config.yaml"), overrides or ())
    sampler = _chat_sampler(plan) if plan.stage == "sft" else _sampler
    with _saying_how_to_go_on(folder):
        result = deliver(as_json, lambda: run_training(plan, folder, resume=resume, make_sampler=sampler), show_run)
    if result.get("status") == "stopped":
        raise typer.Exit(INTERRUPTED)


@contextlib.contextmanager
def _saying_how_to_go_on(folder: Path) -> Iterator[None]:
    """For Ctrl-C and SIGTERM before the first step or after the last; in between, the run ends in order and says so."""
    from moonbase.checkpoint import latest_checkpoint
    from moonbase.train.run import sigterm_as_ctrl_c

    try:
        with sigterm_as_ctrl_c():
            yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            again = shlex.join(["moonbase", "train", str(folder), "--resume"])
            saved = latest_checkpoint(folder) is not None
            print(f"to go on: {again}" if saved else "nothing is saved yet; to start again: the same command",
                  file=sys.stderr)
        raise


def _sampler(model: Any, tokenizer: Any) -> Callable[[list[str]], list[str]]:
    """What training draws its samples with: rooms of one floor meet here."""
    from moonbase.engine import Engine

    # A small cache beside the training state, and nothing kept in it: the weights change between calls.
    return Engine(model, tokenizer, cache_tokens=8192, max_running=8, prefix_cache=False).generate


def _chat_sampler(plan: Any) -> Callable[[Any, Any], Callable[[list[str]], list[str]]]:
    """What fine-tuning draws its samples with: replies to prompts that are what a user says first."""
    from moonbase.quickstart import make_chat_sampler
    from moonbase.train.sft import chat_style

    return lambda model, tokenizer: make_chat_sampler(model, tokenizer, chat_style(plan, tokenizer))


@app.command(epilog="Examples:  moonbase info kimi-k2\n\n  moonbase info runs/quickstart --json")
def info(
    model: Annotated[str, typer.Argument(
        help=f"A run folder, a checkpoint folder, a config.json, or a preset: {PRESETS}.", metavar="MODEL|PRESET",
        autocompletion=_complete_preset)],
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context that the FLOPs are stated for.",
                                                show_default="4096, or the model's limit")] = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, active parameters, FLOPs per token, weight bytes and KV bytes per token.

    Reads the configuration alone, so it answers at once for any size.
    """
    from moonbase import cli_info

    deliver(as_json, lambda: cli_info.describe(model, context), cli_info.show)


@app.command(epilog="Examples:  moonbase convert runs/quickstart exported\n\n"
                    "  moonbase convert path/to/checkpoint smaller --format hf-int4")
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A run folder or a checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; it must not exist yet.")],
    to: Annotated[Format, typer.Option("--format", help="hf: plain floats; hf-int4: experts in INT4 as Kimi K2 "
                                                        "Thinking has them (compressed-tensors); hf-fp8: 128x128 "
                                                        "blocks as DeepSeek-V3 has them.")] = Format.hf,
    dtype: Annotated[Dtype, typer.Option(help="Weights that are not quantised; keep: as the source stores them "
                                              "(format hf only).")] = Dtype.bf16,
    mtp: Annotated[bool | None, typer.Option(help="Keep or drop multi-token-prediction modules.",
                                             show_default="as in the source")] = None,
    int4_rule: Annotated[ScaleRule | None, typer.Option(help="How a group of 32 gets its scale (format hf-int4).",
                                                       show_default="the one of the run, or absmax/7")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in another format: plain floats, INT4 experts or FP8 blocks, in the Hugging Face layout."""
    if dtype is Dtype.keep and to is not Format.hf:
        raise UserError(f"--dtype keep goes with --format hf; what {to.value} leaves unquantised is bf16 or fp32")
    if int4_rule is not None and to is not Format.hf_int4:
        raise UserError(f"--int4-rule goes with --format hf-int4, found {to.value}")
    import torch

    from moonbase import checkpoint
    from moonbase.config import read_json
    from moonbase.report.console import Console

    wanted = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32, Dtype.keep: None}[dtype]

    def work() -> dict[str, Any]:
        folder = checkpoint.resolve_model_folder(source)
        with Console() as progress:
            checkpoint.convert(folder, destination, to.value, dtype=wanted, mtp=mtp,
                               int4_rule=int4_rule.value if int4_rule else None, progress=progress)
        shards = list(destination.glob("*.safetensors"))
        return {"source": folder, "destination": destination, "format": to.value,
                "dtype": read_json(destination / "config.json")["dtype"], "files": len(shards),
                "bytes": sum(shard.stat().st_size for shard in shards)}

    deliver(as_json, work, lambda made: print(
        f"{destination}: {made['bytes'] / 1e6:,.1f} MB of weights, {to.value}, {made['dtype']}"))


@app.command(epilog="Examples:  moonbase bench train --preset pico --peer transformers\n\n"
                    "  moonbase bench moe --preset kimi-k2 --peer torch --card moe.md")
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="train, muon, moe, mla, decode, serve, slice, int4, "
                                                        "speedrun, swarm, agents or evals.")],
    preset: Annotated[str | None, typer.Option(help="The network, with random weights; swarm, agents and evals have "
                                                    "none.", show_default="pico",
                                               autocompletion=_complete_preset)] = None,
    peer: Annotated[str | None, typer.Option(help="Measure this package beside moonbase in the same run: transformers, "
                                                  "for muon, moe and mla torch.", show_default="none")] = None,
    card: Annotated[Path | None, typer.Option(metavar="FILE.md", show_default="none",
                                              help="Keep the result as a page, with a picture beside it.")] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the result, .svg or .png.",
                                                 show_default="none")] = None,
    minutes: Annotated[float | None, typer.Option(
        help="For speedrun: no run begins that would not end within them; the same command goes on.",
        show_default="no limit")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For speedrun: where its runs are kept.",
                                             show_default="runs/speedrun/PRESET")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory, side by side with a peer, in one table.

    Whole networks: train, decode, serve, slice (the layers of a large one that fit here). Kernels: muon, moe (experts
    in INT4), mla (attention over latents). Losses: int4 (what it costs), speedrun (MuonClip against AdamW; hours).
    Without a network: agents, swarm, evals. --card keeps the figures together with how they were measured.
    """
    from moonbase.bench import run as run_bench

    given = {"preset": preset, "peer": peer, "card": card, "picture": picture, "minutes": minutes, "out": out}
    options = {key: value for key, value in given.items() if value is not None}
    show = {"swarm": cli_agents.show_swarm_bench, "int4": show_int4, "speedrun": show_speedrun}.get(name, show_bench)
    deliver(as_json, lambda: run_bench(name, **options), show)


@app.command(epilog="Examples:  moonbase chat runs/quickstart\n\n  moonbase chat http://127.0.0.1:8000")
def chat(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="A run folder, a checkpoint folder, or the URL of an OpenAI-compatible endpoint "
                              "(URL#NAME for one of its models; its key in MOONBASE_API_KEY).")],
) -> None:
    """Talk to a model in the terminal, streaming.

    /help lists what else may be typed, such as /tools. A model that has learnt no dialogues continues what one writes.
    """
    from moonbase.terminal import chat as run_chat

    run_chat(model)


@app.command(epilog="Examples:  moonbase serve runs/quickstart\n\n"
                    "  moonbase serve runs/quickstart --host 0.0.0.0 --api-key SECRET --model-name my-model")
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run folder or a checkpoint folder.")],
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    api_key: Annotated[list[str] | None, typer.Option(
        help="Key that clients must send; may be given several times.", envvar="MOONBASE_API_KEY",
        show_envvar=True, show_default="none: everyone who can connect may ask")] = None,
    style: Annotated[str | None, typer.Option(help="Chat style: kimi-k2, kimi-k2-thinking or kimi-k2.5.",
                                              show_default="what the model speaks")] = None,
    model_name: Annotated[list[str] | None, typer.Option(
        help="What requests must call the model; may be given several times.",
        show_default="the folder's name, and any other will do")] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that are computed together.")] = 64,
    cache_tokens: Annotated[int | None, typer.Option(
        min=1, help="Tokens that the cache holds, running requests and what is kept of earlier ones.",
        show_default="max-running whole contexts, on a CPU at least 1 GiB; at most 40% of the free memory, of a GPU's "
                     "80%")] = None,
    queue_limit: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get status 429.")] = 256,
    request_timeout: Annotated[float, typer.Option(help="Seconds for one request, waiting included.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds that answers may go on after SIGTERM or Ctrl-C.")] = 30.0,
    cors_origin: Annotated[list[str] | None, typer.Option(
        help="Web pages of this origin may call the API, https://example.com for instance.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(
        help="Another host name that a server on 127.0.0.1 answers to.")] = None,
    access_log: Annotated[Path | None, typer.Option(help="Append the access log (JSON lines) to this file.",
                                                    show_default="standard error")] = None,
    as_official: Annotated[bool, typer.Option("--as-official", help="Refuse what the official API refuses, such as "
                                              "another temperature for K2.5.")] = False,
) -> None:
    """Serve a model over HTTP: the OpenAI and the Anthropic API, metrics and a web page."""
    from moonbase.recipe import style_of
    from moonbase.serve.run import check_packages, run
    from moonbase.serve.settings import ANY_MODEL, Settings

    check_packages()
    settings = Settings(
        host=host, port=port, api_keys=tuple(api_key or ()), style=style or style_of(model),
        model_names=tuple(model_name or (Path(model).resolve().name, ANY_MODEL)),
        request_timeout=request_timeout, grace=grace, cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()), as_official=as_official,
    )
    from moonbase.checkpoint import resolve_model_folder
    from moonbase.config import read_json
    from moonbase.loading import load, load_tokenizer_of

    tokenizer = load_tokenizer_of(model)
    run(load(model, keep_int4="auto"), tokenizer, settings, read_json(resolve_model_folder(model) / "config.json"),
        max_running=max_running, cache_tokens=cache_tokens, queue_limit=queue_limit, access_log=access_log)


cli_agents.add_verbs(app)
cli_evals.add_verbs(app)
for _command in app.registered_commands:
    # The terminal breaks the lines of a paragraph, not the source.
    _paragraphs = (inspect.getdoc(_command.callback) or "").split("\n\n")
    _command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in _paragraphs)


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    import platform

    import torch

    from moonbase import __version__

    device = f"CPU, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} (CUDA {torch.version.cuda})"
    print(f"moonbase {__version__}", f"torch {torch.__version__}", f"python {platform.python_version()}", sep="\n")
    print(f"device {device}")
    raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_versions, is_eager=True,
                                          help="Versions of moonbase, torch and Python, and the device.")] = False,
) -> None:
    """Options of the command itself; its help text is the application's."""


# --- the way out ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; a user's mistake is one line, a programmer's a traceback."""
    # Before torch loads OpenMP, whose waiting threads spin for long by default: on a machine whose cores are not all
    # ours that makes a training step many times slower. Never spinning costs a third on a quiet one (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a sign must not end a run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        outcome = app(args=arguments, prog_name="moonbase", standalone_mode=False)
    except (UserError, TrainingStopped, TryAgain) as error:
        if os.environ.get("MOONBASE_DEBUG", "0") not in ("", "0"):
            traceback.print_exception(error)
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        outcome = INTERRUPTED
    except Exception as error:
        # typer keeps its own copy of click's exceptions, or uses click's, by version: known by what they can do.
        if type(error).__name__ == "Abort":
            outcome = INTERRUPTED
        elif hasattr(error, "format_message"):
            return _usage_error(error)
        else:
            raise
    if outcome == INTERRUPTED:
        _complain("interrupted", kind="")
    return outcome if isinstance(outcome, int) else 0


def _usage_error(error: Any) -> int:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        # The help that it carries; with rich it has been printed already and the message is empty.
        print(error.format_message(), end="")
        return 2
    place = context.command_path if context is not None else "moonbase"
    _complain(f"{error.format_message()} (see {place} --help)")
    return error.exit_code


def _complain(message: str, kind: str = "error: ") -> None:
    """One line on standard error, whatever the message holds."""
    print(f"moonbase: {kind}{' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
