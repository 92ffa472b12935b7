"""Toolsets by the words of a command line: `search:docs,python,world:1`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from moonbase.agents.tools.tool import Toolset
from moonbase.errors import UserError, did_you_mean

KINDS = {
    "search": "search:FOLDER", "python": "python", "shell": "shell", "files": "files:FOLDER", "world": "world:SEED",
    "mcp": "mcp:FILE",
}
WORLD_PAGES = 5000


def read_specs(texts: Sequence[str]) -> tuple[str, ...]:
    """Single specs from words with commas; paths made absolute. Raises UserError for what is none."""
    specs: list[str] = []
    for text in texts:
        kind, _, rest = text.partition(":")
        # A path may hold a comma: one that is there is taken as a whole.
        whole = kind in KINDS and rest and os.path.exists(os.path.expanduser(rest))
        specs += [text] if whole else [piece.strip() for piece in text.split(",") if piece.strip()]
    return tuple(dict.fromkeys(_checked(spec) for spec in specs))


def _checked(spec: str) -> str:
    kind, colon, rest = spec.partition(":")
    if kind not in KINDS:
        raise UserError(f"--tools {spec}: there is no such tool{did_you_mean(kind, KINDS)}. Tools: "
                        f"{', '.join(KINDS.values())}")
    if ":" not in KINDS[kind]:
        if colon:
            raise UserError(f"--tools {spec}: {kind} takes nothing behind a colon")
        return kind
    if not rest:
        raise UserError(f"--tools {spec}: write {KINDS[kind]}")
    if kind == "world":
        seed, _, pages = rest.partition(":")
        if not seed.isdecimal() or (pages and not pages.isdecimal()):
            raise UserError(f"--tools {spec}: write world:SEED or world:SEED:PAGES with whole numbers")
        return spec
    path = Path(rest).expanduser().absolute()
    if not path.exists():
        raise UserError(f"--tools {spec}: {rest} does not exist")
    if kind == "files" and not path.is_dir():
        raise UserError(f"--tools {spec}: {rest} is no folder")
    return f"{kind}:{path}"


async def open_tools(
    specs: Sequence[str], work: Path, *, allow_unsafe: bool = False, report: Callable[[str], None] | None = None
) -> Toolset:
    """The tools of all specs in one set; MCP servers are running already, so it must be closed (`async with`).

    `work`: the folder of python and shell where no files:FOLDER is among the specs; made if needed. Raises UserError,
    with nothing left running.
    """
    folders = [Path(spec.partition(":")[2]) for spec in specs if spec.startswith("files:")]
    tools, sandbox = Toolset(), None
    # Servers last: what fails before them leaves none behind.
    for spec in sorted(specs, key=lambda spec: spec.startswith("mcp:")):
        kind, _, rest = spec.partition(":")
        if kind in ("python", "shell") and sandbox is None:
            from moonbase.agents.tools.sandbox import make_sandbox

            folder = folders[0] if folders else work
            folder.mkdir(parents=True, exist_ok=True)
            sandbox = _named(lambda folder=folder: make_sandbox(folder, allow_unsafe=allow_unsafe))
        try:
            more = await _open(kind, rest, sandbox, report)
            try:
                tools = tools + more
            except ValueError as error:
                async with more:
                    pass
                raise UserError(f"--tools {spec}: {error}; take one of them") from None
        except BaseException:
            async with tools:
                pass
            raise
    return tools


def _named(make: Callable[[], object]) -> object:
    """Make a sandbox; its complaint names the flag of the command line."""
    try:
        return make()
    except UserError as error:
        raise UserError(str(error).replace("--allow-unsafe (allow_unsafe=True)", "--allow-unsafe-sandbox")) from None


async def _open(kind: str, rest: str, sandbox: object, report: Callable[[str], None] | None) -> Toolset:
    if kind == "search":
        from moonbase.agents.tools.search import search_tools

        return search_tools(rest, report=report)
    if kind == "files":
        from moonbase.agents.tools.files import file_tools

        return file_tools(rest)
    if kind == "python":
        from moonbase.agents.tools.python import python_tools

        return python_tools(sandbox)
    if kind == "shell":
        from moonbase.agents.tools.shell import shell_tools

        return shell_tools(sandbox)
    if kind == "world":
        from moonbase.agents.worlds.wideworld import make_world
        from moonbase.agents.worlds.world import world_tools

        seed, _, pages = rest.partition(":")
        return world_tools(make_world(int(seed), int(pages or WORLD_PAGES), "test"))
    from moonbase.agents.tools.mcp_client import mcp_tools

    return await mcp_tools(rest)
