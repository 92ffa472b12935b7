"""What a world is: pages that one can search and open, tools for it, and tasks that know their answer.

A world is closed and offline: whatever a task asks stands on its pages, and the same seed gives the same pages. The
tools answer in microseconds, where they are called, so that thousands of agents can share one world.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

from moonbase.agents.tools.tool import Tool, Toolset, tool
from moonbase.agents.worlds.index import MOST_RESULTS, Index


@dataclass(frozen=True, slots=True)
class Page:
    """One page. `text` is what `open` shows; addresses in it stand in angle brackets."""

    id: int
    title: str
    url: str
    text: str
    links: tuple[str, ...] = ()
    dead: bool = False
    """Search still knows it, and opening it answers 404."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A search result."""

    id: int
    title: str
    url: str
    snippet: str


@runtime_checkable
class World(Protocol):
    """What tools and graders need of a world."""

    name: str
    pages: Sequence[Page]

    def search(self, query: str, k: int = 10) -> list[Hit]:
        """The best k pages, best first."""
        ...

    def open(self, address: str | int) -> str:
        """The page's text; a dead or unknown page's text says so."""
        ...


class PagedWorld:
    """A world over a list of pages whose ids are their positions."""

    def __init__(self, name: str, pages: Sequence[Page], snippet: int = 120) -> None:
        """`snippet`: characters of a page's text that a search result shows. Raises ValueError where ids are not
        positions or two pages share an address."""
        self.name, self.pages = name, pages
        self._of_url = {page.url: page for page in pages}
        if len(self._of_url) != len(pages) or any(page.id != place for place, page in enumerate(pages)):
            raise ValueError(f"world {name}: page ids must be 0, 1, …, and addresses must differ")
        self._hits = [Hit(page.id, page.title, page.url, _snippet(page, snippet)) for page in pages]
        # The title counts twice: a page is about what its title says.
        self.index = Index(f"{page.title}\n{page.title}\n{page.text}" for page in pages)

    def search(self, query: str, k: int = 10) -> list[Hit]:
        """The best k pages by BM25 over title (twice) and text."""
        hits = self._hits
        return [hits[page] for page, _ in self.index.search(query, k)]

    def open(self, address: str | int) -> str:
        """The text of the page with this address or id."""
        page = self.find(address)
        if page is None:
            return f"404 Not Found: no page {str(address)[:200]!r}. Addresses come from search results and links."
        if page.dead:
            return f"404 Not Found: the page {page.url} is gone."
        return page.text

    def find(self, address: str | int) -> Page | None:
        """The page with this address (angle brackets, a missing scheme, a slash or fragment at the end do not matter)
        or id; dead ones too."""
        page = self._of_url.get(address) if isinstance(address, str) else None
        if page is not None:
            return page
        plain = str(address).strip().strip("<>").partition("#")[0].rstrip("/")
        # Eighteen digits hold every id; int() of a million digits is an attack.
        if plain.isascii() and plain.isdigit() and len(plain) <= 18:
            return self.pages[int(plain)] if int(plain) < len(self.pages) else None
        plain = plain.removeprefix("http://").removeprefix("https://")
        return self._of_url.get(f"https://{plain}")

    def digest(self) -> str:
        """SHA-256 of all pages: two worlds with the same digest are the same world."""
        total = hashlib.sha256()
        for page in self.pages:
            total.update(f"{page.url}\x00{page.title}\x00{page.text}\x00{page.dead}\x01".encode())
        return total.hexdigest()


def _snippet(page: Page, length: int) -> str:
    body = page.text.removeprefix(page.title).strip().partition("\n")[0]
    return body if len(body) <= length else body[: length - 1] + "…"


def world_tools(world: World) -> Toolset:
    """`search(query, k)` and `open(url)` over a world. Stateless: every agent may share the one toolset."""

    @tool(inline=True)
    def search(query: str, k: int = 10) -> str:
        """Search the pages. Answers the best matching pages: title, address and the beginning of each.

        Args:
            query: Words to look for.
            k: How many results, 1 to 50.
        """
        hits = world.search(query, max(1, min(k, MOST_RESULTS)))
        if not hits:
            return "No results. Try other words."
        lines = [f"{rank}. {hit.title} <{hit.url}>\n   {hit.snippet}" for rank, hit in enumerate(hits, 1)]
        return "\n".join(lines)

    @tool(inline=True, name="open")
    def open_page(url: str) -> str:
        """Open a page and read its text.

        Args:
            url: The address as a search result or a link shows it.
        """
        return world.open(url)

    tools: tuple[Tool, ...] = (search, open_page)
    return Toolset(tools)


@dataclass(frozen=True, slots=True)
class Column:
    """What a column of an answer holds, for the grader."""

    name: str
    type: str = "auto"
    """text, number, percent, date, or auto: a number or a date where both cells are one as a whole, else text. Or one
    of the metrics of WideSearch (`metrics.py`)."""
    unit: str = ""
    """Of a number: a cell may repeat it, or use another unit of the same dimension."""
    tolerance: float = 0.0
    """Of a number: the relative error that still counts as right."""


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call of an oracle."""

    tool: str
    arguments: dict[str, Any]
    row: int | None = None
    """The row of the gold table that it serves; None serves all of them and comes first."""
    pages: tuple[int, ...] = ()
    """What it opens, or which of its results are wanted."""


@dataclass(frozen=True)
class Task:
    """A question with its answer. `answer` is a list of rows (by column name) or a text."""

    id: str
    family: str
    prompt: str
    columns: tuple[Column, ...]
    answer: list[dict[str, str]] | str
    keys: tuple[str, ...] = ()
    """The columns by which rows are told apart."""
    oracle: tuple[Call, ...] = ()
    """Calls that suffice: every cell of the answer stands on a page that they open."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The knobs that made it."""

    @property
    def column_names(self) -> list[str]:
        """In the order asked for."""
        return [column.name for column in self.columns]

    @property
    def oracle_pages(self) -> list[int]:
        """Pages that the oracle opens, in order, each once."""
        return list(dict.fromkeys(page for call in self.oracle if call.tool == "open" for page in call.pages))

    def digest(self) -> str:
        """SHA-256 of everything in the task."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def digest_of(tasks: Iterable[Task]) -> str:
    """One digest for a set of tasks, in order."""
    return hashlib.sha256("\n".join(task.digest() for task in tasks).encode()).hexdigest()
