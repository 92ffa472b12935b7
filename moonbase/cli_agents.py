"""`moonbase swarm` and `moonbase trace`: the verbs of the agents room."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moonbase.errors import TryAgain, UserError

NOT_FINISHED = 1
RETRYABLE = ("rate_limit", "overloaded", "timeout", "server", "connection")
_LIMITS = ("steps", "tokens", "seconds", "money", "critical_steps", "subagents")
_CONTEXTS = ("keep-all", "discard-all", "discard-75%", "hide-tool-result", "summary")
"""For help texts and completion; the room itself is loaded when the verb runs."""


class OutputFormat(StrEnum):
    """What `moonbase swarm --print` writes to standard output."""

    text = "text"
    json = "json"
    stream_json = "stream-json"


def _complete_tools(incomplete: str) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    kinds = ("search:", "python", "shell", "files:", "world:", "mcp:")
    return [f"{before}{comma}{kind}" for kind in kinds if kind.startswith(last)]


def _complete_context(incomplete: str) -> list[str]:
    return [name for name in _CONTEXTS if name.startswith(incomplete)]


def add_verbs(app: typer.Typer) -> None:
    """Register them."""
    app.command(epilog=_SWARM_EXAMPLES)(swarm)
    app.command(epilog=_TRACE_EXAMPLES)(trace)


_SWARM_EXAMPLES = (
    "Examples:  moonbase swarm \"Who wrote what in these notes?\" --model runs/quickstart --tools search:notes\n\n"
    "  moonbase swarm - --model http://127.0.0.1:8000 --tools python,files:work --tokens 200000 < task.txt\n\n"
    "  moonbase swarm \"...\" --model moonshot:kimi-k2.5 --price 0.6,3,0.1 --money 2 --tools mcp:servers.json\n\n"
    "  moonbase swarm --resume runs/swarm/2026-01-31-120000")
_TRACE_EXAMPLES = ("Examples:  moonbase trace runs/swarm/2026-01-31-120000 --open\n\n"
                   "  moonbase trace episodes.jsonl --out episodes.html")


# The options of swarm; what is shorter stands in its signature.
_Task = Annotated[str | None, typer.Argument(
    metavar="TASK", help="What is to be done; - reads it from standard input.", show_default=False)]
_Model = Annotated[str | None, typer.Option(
    metavar="MODEL", show_default=False,
    help="A run folder, a checkpoint folder, preset:NAME, http://HOST/v1, http://HOST/v1#NAME, "
         "openai:NAME, openai:NAME@URL, moonshot:NAME or anthropic:NAME. Keys come from the environment: "
         "MOONBASE_API_KEY, OPENAI_API_KEY, MOONSHOT_API_KEY, ANTHROPIC_API_KEY.")]
_SubModel = Annotated[str | None, typer.Option(metavar="MODEL", help="Of the sub-agents.", show_default="the same")]
_Tools = Annotated[list[str] | None, typer.Option(
    help="search:FOLDER, python, shell, files:FOLDER, world:SEED, mcp:FILE; several with commas, or the "
         "option again.",
    autocompletion=_complete_tools, show_default="none")]
_Context = Annotated[str, typer.Option(
    help=f"When a context is nearly full: {', '.join(_CONTEXTS)}.", autocompletion=_complete_context)]
_ContextTokens = Annotated[int | None, typer.Option(
    min=1, help="Tokens that prompt and reply may have together, for endpoints that do not say it.",
    show_default="what the model says")]
_SubContextTokens = Annotated[int | None, typer.Option(
    min=1, help="Of the sub-agents' model.", show_default="the same")]
_Steps = Annotated[int | None, typer.Option(min=1, help="Model calls of the orchestrator.", show_default="100")]
_SubSteps = Annotated[int | None, typer.Option(min=1, help="Model calls of each sub-agent.", show_default="100")]
_Tokens = Annotated[int | None, typer.Option(
    min=1, help="Tokens into and out of models, all agents together.", show_default="no limit")]
_Money = Annotated[float | None, typer.Option(min=0, help="Dollars in all; needs --price.", show_default="no limit")]
_CriticalSteps = Annotated[int | None, typer.Option(
    min=1, help="Steps of the orchestrator, and of each round of sub-agents those of the longest.",
    show_default="no limit")]
_Price = Annotated[str | None, typer.Option(
    metavar="IN,OUT[,CACHED]", help="Dollars per million tokens.", show_default="0")]
_SubPrice = Annotated[str | None, typer.Option(
    metavar="IN,OUT[,CACHED]", help="Of the sub-agents' model.", show_default="the same")]
_Session = Annotated[Path | None, typer.Option(
    help="Folder for events, trace and answer.", show_default="runs/swarm/TIME")]
_Resume = Annotated[Path | None, typer.Option(
    help="Go on with the session in this folder, with its task and settings; --model, --sub-model, "
         "their contexts and prices, limits and --concurrency may be given anew.",
    show_default=False)]
_Quiet = Annotated[bool, typer.Option("--print", help="No progress: the result alone, for scripts.")]
_OutputFormat = Annotated[OutputFormat, typer.Option(
    help="text: the answer; json: one object; stream-json: every event as a line, then the result.")]
_AllowUnsafeSandbox = Annotated[bool, typer.Option(
    "--allow-unsafe-sandbox",
    help="Where bubblewrap does not work: run what the model writes as plain processes, with limits and "
         "without a security boundary.")]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]


def swarm(
    task: _Task = None,
    model: _Model = None,
    sub_model: _SubModel = None,
    tools: _Tools = None,
    single: Annotated[bool, typer.Option("--single", help="One agent alone, with the same tools and trace.")] = False,
    context: _Context = "keep-all",
    context_tokens: _ContextTokens = None,
    sub_context_tokens: _SubContextTokens = None,
    steps: _Steps = None,
    sub_steps: _SubSteps = None,
    tokens: _Tokens = None,
    seconds: Annotated[float | None, typer.Option(min=0.001, help="Seconds in all.", show_default="no limit")] = None,
    money: _Money = None,
    critical_steps: _CriticalSteps = None,
    subagents: Annotated[int | None, typer.Option(min=0, help="Runs of sub-agents in all; 100 work at once.",
                                                  show_default="no limit")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Model calls at a time; more wait in line.")] = 64,
    temperature: Annotated[float, typer.Option(min=0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one reply.")] = 4096,
    seed: Annotated[int | None, typer.Option(help="For models that take one.", show_default="none")] = None,
    price: _Price = None,
    sub_price: _SubPrice = None,
    session: _Session = None,
    resume: _Resume = None,
    quiet: _Quiet = False,
    output_format: _OutputFormat = OutputFormat.text,
    allow_unsafe_sandbox: _AllowUnsafeSandbox = False,
    as_json: _AsJson = False,
) -> None:
    """Give a task to an orchestrator, which may create sub-agents that work at the same time; or to one agent alone.

    Everything that happens is written to a session folder as it happens: a session that was interrupted, or killed,
    goes on with --resume and loses at most the calls that were running. At its end the folder holds the answer
    (answer.md), the trace (episode.jsonl) and the trace as a page (trace.html).

    Limits are checked before every call. Ctrl-C stops in order. Exit code 1: ended without an answer.
    """
    given = dict(locals())
    from moonbase.cli_results import deliver

    if as_json:
        output_format = OutputFormat.json
    run = _begin(given)
    streaming = _Stream() if output_format is OutputFormat.stream_json else None

    def work() -> dict[str, Any]:
        return _work(run, streaming, quiet=quiet or streaming is not None)

    if output_format is OutputFormat.json:
        result = deliver(True, work)
    else:
        result = work()
        if streaming is not None:
            streaming.take({"type": "result", **result})
        else:
            _show_answer(result)
    if result["status"] != "finished":
        higher = " with a higher limit" if result["status"] == "over_budget" else ""
        print(f"to go on{higher}: {run.again}", file=sys.stderr)
        # What the other side may get over is worth trying again.
        passing = result["status"] == "failed" and result["reason"].partition(":")[0] in RETRYABLE
        raise typer.Exit(TryAgain.exit_code if passing else NOT_FINISHED)


@dataclasses.dataclass
class _Run:
    session: Any
    model: Any
    sub_model: Any

    @property
    def again(self) -> str:
        """The command that goes on with it."""
        return shlex.join(["moonbase", "swarm", "--resume", str(self.session.folder)])


def _begin(given: dict[str, Any]) -> _Run:
    """Everything that can be wrong before the first call. Raises UserError."""
    from moonbase.agents.session import Session, Settings, new_folder, read_settings
    from moonbase.agents.toolsets import read_specs

    old = None
    if given["resume"] is not None:
        fixed = {"task": None, "tools": None, "single": False, "context": "keep-all", "session": None,
                 "temperature": 1.0, "top_p": 1.0, "max_tokens": 4096, "seed": None}
        changed = [name for name, usual in fixed.items() if given[name] != usual and given[name] != []]
        if changed:
            words = ", ".join("TASK" if name == "task" else f"--{name.replace('_', '-')}" for name in changed)
            raise UserError(f"{words}: a resumed session keeps its own; leave it out, or begin a new session")
        old = read_settings(given["resume"])
    if given["context"] not in _CONTEXTS:
        raise UserError(f"--context {given['context']}: one of {', '.join(_CONTEXTS)}")
    changes = _changes(given, old or Settings(task="", model=""))
    if old is None:
        if given["model"] is None:
            raise UserError("--model is missing: a run folder, a checkpoint folder or the URL of an endpoint "
                            "(see moonbase swarm --help)")
        settings = Settings(
            task=_read_task(given["task"]), tools=read_specs(given["tools"] or ()), single=given["single"],
            context=given["context"], options=_options(given), **changes)
    else:
        settings = old.model_copy(update=changes)
    models = _connect(settings)
    if old is None:
        session = Session.create(given["session"] or new_folder(), settings)
    else:
        session = Session.resume(given["resume"], **changes)
    return _Run(session, *models)


def _changes(given: dict[str, Any], settings: Any) -> dict[str, Any]:
    """What the command line sets beside the task itself; what it does not name stays as `settings` has it."""
    limits = {name: given[name] for name in _LIMITS if given[name] is not None}
    changes: dict[str, Any] = {"limits": dataclasses.replace(settings.limits, **limits)}
    if given["sub_steps"] is not None:
        changes["sub_limits"] = dataclasses.replace(settings.sub_limits, steps=given["sub_steps"])
    for name in ("model", "sub_model"):
        if given[name] is not None:
            # A session may be resumed from elsewhere.
            changes[name] = os.path.abspath(given[name]) if os.path.exists(given[name]) else given[name]
    for name in ("price", "sub_price"):
        if given[name] is not None:
            changes[name] = _read_price(name, given[name])
    for name in ("context_tokens", "sub_context_tokens"):
        if given[name] is not None:
            changes[name] = given[name]
    if given["concurrency"] != 64:
        changes["concurrency"] = given["concurrency"]
    if given["allow_unsafe_sandbox"]:
        changes["allow_unsafe"] = True
    if given["sub_context_tokens"] is not None and not changes.get("sub_model", settings.sub_model):
        raise UserError("--sub-context-tokens needs --sub-model: without one sub-agents have the orchestrator's model")
    price = changes.get("price", settings.price)
    if changes["limits"].money is not None and not (price.input or price.output):
        raise UserError("--money needs --price IN,OUT[,CACHED], dollars per million tokens of this model")
    return changes


def _options(given: dict[str, Any]) -> Any:
    from moonbase.agents.models.base import CallOptions

    return CallOptions(**{name: given[name] for name in ("temperature", "top_p", "max_tokens", "seed")})


def _read_task(task: str | None) -> str:
    if task is None:
        raise UserError("the task is missing: moonbase swarm \"TASK\" --model MODEL, or - to read it from standard "
                        "input")
    if task == "-":
        task = sys.stdin.buffer.read().decode(errors="replace")
    if not task.strip():
        raise UserError("the task is empty")
    return task.encode(errors="replace").decode().strip()


def _read_price(name: str, text: str) -> Any:
    from moonbase.agents.models.base import Price

    try:
        numbers = [float(part) for part in text.split(",")]
        if len(numbers) not in (2, 3) or not all(0 <= number < float("inf") for number in numbers):
            raise ValueError
    except ValueError:
        raise UserError(f"--{name.replace('_', '-')} {text}: write IN,OUT or IN,OUT,CACHED, dollars per million "
                        "tokens, such as 0.6,3,0.1") from None
    return Price(*numbers)


def _connect(settings: Any) -> tuple[Any, Any]:
    from moonbase.agents.models.connect import connect

    model = connect(settings.model, price=settings.price, context_tokens=settings.context_tokens)
    if settings.sub_model is None:
        return model, None
    return model, connect(settings.sub_model, price=settings.sub_price or settings.price,
                          context_tokens=settings.sub_context_tokens or settings.context_tokens)


# --- while it runs ----------------------------------------------------------------------------------------------------


class _Stream:
    """Events as lines on standard output; a reader that leaves stops the work."""

    def __init__(self) -> None:
        self.broken = False
        self.stop: Callable[[], None] = lambda: None

    def take(self, event: dict[str, Any]) -> None:
        """One line. What no JSON can say (a number that is none) is null."""
        from moonbase.cli_results import plain

        if self.broken:
            return
        try:
            print(json.dumps(plain(event), allow_nan=False), flush=True)
        except BrokenPipeError:
            self.broken = True
            self.stop()


def _work(run: _Run, streaming: _Stream | None, quiet: bool) -> dict[str, Any]:
    import asyncio

    session, again = run.session, run.again
    try:
        episode = asyncio.run(_play(run, streaming, quiet))
    except (KeyboardInterrupt, asyncio.CancelledError):
        if streaming is not None and streaming.broken:
            raise BrokenPipeError from None
        if session.events:
            print(f"to go on: {again}", file=sys.stderr)
        raise KeyboardInterrupt from None
    except UserError as error:
        # A full disk in the middle, say. A mistake before the first event has nothing to resume.
        raise UserError(f"{error} (to go on: {again})" if session.events else str(error)) from None
    finally:
        session.close()
    return _result(session, episode)


async def _play(run: _Run, streaming: _Stream | None, quiet: bool) -> Any:
    import asyncio

    from rich.console import Console

    from moonbase.agents.live import LiveView, PlainLog, show

    session, task = run.session, asyncio.current_task()
    loop, console = asyncio.get_running_loop(), Console(stderr=True, highlight=False)
    # Outside the main thread, and on systems without signals, nobody sends one that could be handled in order.
    with contextlib.suppress(NotImplementedError, RuntimeError):
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    view = LiveView(lambda: (sum(pool.running for pool in session.pools), sum(pool.waiting for pool in session.pools)))
    for event in session.events:
        view.take(event)
    listeners: list[Callable[[dict[str, Any]], None]] = [view.take]
    if streaming is not None:
        streaming.stop = task.cancel
        for event in session.events:
            streaming.take(event)
        listeners.append(streaming.take)

    def note(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    drawing = None
    if not quiet:
        note(f"session {session.folder}")
        if console.is_terminal and not console.is_dumb_terminal:
            drawing = asyncio.create_task(show(view, console, session.journal.now))
        else:
            listeners.append(PlainLog(view, note).take)
    try:
        return await session.run(run.model, run.sub_model, listeners=tuple(listeners),
                                 report=None if not quiet else lambda _: None)
    finally:
        if drawing is not None:
            drawing.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # it ends by being cancelled
                await drawing


def _result(session: Any, episode: Any) -> dict[str, Any]:
    """What `--json` prints."""
    main = episode.agents[0] if episode.agents else None
    folder = session.folder
    return {
        "status": episode.status, "text": episode.text, "reason": main.reason if main else "",
        "session": str(folder), "episode": episode.id, "model": episode.model, "seconds": episode.seconds,
        "steps": sum(call.kind == "model" for call in main.calls) if main else 0, "model_calls": episode.spent.steps,
        "critical_steps": episode.critical.steps, "subagents": episode.spent.subagents,
        "tokens": episode.spent.tokens, "dollars": episode.spent.money,
        "trace": str(folder / "episode.jsonl"), "page": str(folder / "trace.html"),
        "answer": str(folder / "answer.md") if episode.status == "finished" else None}


def _show_answer(result: dict[str, Any]) -> None:
    """The answer on standard output, what it took on standard error."""
    from moonbase.report.words import compact, duration, plural
    from moonbase.terminal.screen import harmless

    if result["text"].strip():
        print(harmless(result["text"]) if sys.stdout.isatty() else result["text"])
    facts = [result["status"] + (f" ({result['reason']})" if result["reason"] else ""),
             duration(result["seconds"]), plural(result["critical_steps"], "critical step"),
             plural(result["subagents"], "sub-agent"), f"{compact(result['tokens'])} tokens"]
    if result["dollars"]:
        facts.append(f"${result['dollars']:.4f}")
    print(harmless(", ".join(facts)), f"trace: {result['page']}", sep="\n", file=sys.stderr)


def show_swarm_bench(result: dict[str, Any]) -> None:
    """`moonbase bench swarm` for people."""
    from moonbase.bench.swarm import show

    show(result)


# --- trace ------------------------------------------------------------------------------------------------------------


def trace(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A session folder, its events.jsonl (of a running or "
                                                                "killed session too), or a file of episodes.")],
    out: Annotated[Path | None, typer.Option(help="The page to write.",
                                             show_default="trace.html in the session, or FILE.html")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else "
                                                         "there.")] = False,
) -> None:
    """Write traces as one HTML page that loads nothing: agents over time, the critical path, every message.

    The page needs no network and no server; it can be sent as it is.
    """
    from moonbase.agents.episodes import read_episodes
    from moonbase.agents.page import write_page
    from moonbase.cli_results import deliver

    if source.is_dir() and not (source / "events.jsonl").is_file():
        hint = "; a training run has its report.html" if (source / "config.yaml").is_file() else ""
        raise UserError(f"{source}: no session here (events.jsonl is missing){hint}")

    def work() -> dict[str, Any]:
        folder = source if source.is_dir() else source.parent if source.name == "events.jsonl" else None
        page = out or (folder / "trace.html" if folder else source.with_suffix(".html"))
        if page.resolve() == source.resolve():
            raise UserError(f"{page}: this is the trace itself; name another file with --out")
        episodes = list(read_episodes(source))
        with _pathnames(page):
            write_page(episodes, page)
        if open_page:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())
        return {"page": page, "bytes": page.stat().st_size, "episodes": len(episodes),
                "agents": sum(len(episode.agents) for episode in episodes)}

    deliver(as_json, work, lambda made: print(made["page"]))


@contextlib.contextmanager
def _pathnames(page: Path) -> Iterator[None]:
    """A page under a name that no file can have is the user's mistake."""
    try:
        yield
    except (IsADirectoryError, ValueError) as error:
        raise UserError(f"{page}: cannot be written: {error}") from None
