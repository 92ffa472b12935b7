"""The tools `search` and `open` over documents of one's own, offline.

A source is a folder, a file, a JSONL of documents, or documents that a program has. All of it is read once and held in
memory, index included, and `open` answers from there: nothing that a model asks for reaches the disk.

Ranking is BM25 (Robertson and Zaragoza 2009) over `words`, by the package bm25s.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moonbase.agents.tools.search_documents import Document, Progress, read_source
from moonbase.agents.tools.tool import ToolResult, Toolset, tool
from moonbase.agents.words import UNSPACED, words
from moonbase.data.readers import cut
from moonbase.data.sources import Skipped
from moonbase.errors import UserError

PAGE_CHARACTERS = 8000
SNIPPET_CHARACTERS = 240
SNIPPET_SCANNED = 200_000
"""Characters of a document in which a snippet is looked for."""
QUERY_CHARACTERS = 4096
QUERY_TERMS = 64
"""Different words of a query that count; the rest of a longer one is left out."""
MOST_RESULTS = 50
TOTAL_CHARACTERS = 2 << 30
LARGE = 2000
"""From so many documents on, progress is shown."""
INSTALL = "pip install 'moonbase[agents]'"


@dataclass(frozen=True, slots=True)
class Hit:
    """A search result."""

    id: str
    title: str
    snippet: str
    score: float


class Library:
    """Documents with their index, in memory."""

    def __init__(self, documents: Iterable[Document], progress: Progress | None = None) -> None:
        """Documents of one id get a number behind it. Raises UserError where bm25s is missing or it is too much."""
        self.documents: list[Document] = []
        self._of_id: dict[str, int] = {}
        total = 0
        for document in documents:
            total += len(document.text)
            if total > TOTAL_CHARACTERS:
                raise UserError(f"search: more than {TOTAL_CHARACTERS >> 30} billion characters: name a smaller folder")
            name, number = document.id, 2
            while name in self._of_id:
                name, number = f"{document.id}#{number}", number + 1
            self._of_id[name] = len(self.documents)
            self.documents.append(document if name == document.id else Document(name, document.title, document.text))
        self._index(progress)

    def _index(self, progress: Progress | None) -> None:
        try:
            import bm25s
        except ImportError:
            raise UserError(f"search needs the package bm25s: {INSTALL}") from None
        self._vocabulary: dict[str, int] = {}
        terms_of_document = []
        for number, document in enumerate(self.documents, 1):
            # The title counts twice: a document is about what its title says.
            found = words(f"{document.title}\n{document.title}\n{document.id}\n{document.text}")
            terms_of_document.append([self._vocabulary.setdefault(word, len(self._vocabulary)) for word in found])
            if progress is not None and len(self.documents) >= LARGE:
                progress("indexing", number, len(self.documents))
        self._bm25 = None
        if self._vocabulary:
            self._bm25 = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
            self._bm25.index((terms_of_document, self._vocabulary), create_empty_token=False, show_progress=False)

    def search(self, query: str, k: int = 10) -> list[Hit]:
        """The best k documents (at most 50) that have a word of the query, best first; of equals the earlier."""
        known = (self._vocabulary.get(word) for word in words(query[:QUERY_CHARACTERS]))
        terms = [term for term in dict.fromkeys(known) if term is not None][:QUERY_TERMS]
        if not terms or self._bm25 is None:
            return []
        scores_D = self._bm25.get_scores_from_ids(terms)
        k = min(max(k, 1), MOST_RESULTS)
        found = np.flatnonzero(scores_D > 0)
        if len(found) > k:
            least = np.partition(scores_D[found], len(found) - k)[len(found) - k]
            found = found[scores_D[found] >= least]
        best = found[np.lexsort((found, -scores_D[found]))][:k]
        documents = self.documents
        return [Hit(documents[number].id, documents[number].title, snippet(documents[number].text, query),
                    float(scores_D[number])) for number in best.tolist()]

    def find(self, name: str) -> Document | None:
        """The document of this id; a `./`, angle brackets or a fragment around it do not matter."""
        plain = name.strip().strip("<>").strip()
        for candidate in (name, plain, plain.removeprefix("./"), plain.partition("#")[0].removeprefix("./")):
            if candidate in self._of_id:
                return self.documents[self._of_id[candidate]]
        return None

    def near(self, name: str) -> list[str]:
        """Ids that look like this one."""
        name = name[:500]
        tail = name.rsplit("/", 1)[-1]
        same_end = [one for one in self._of_id if tail and one.endswith(tail)][:3]
        return same_end or difflib.get_close_matches(name, list(self._of_id)[:5000], n=3)


def search_tools(source: Any, *, report: Callable[[str], None] | None = None) -> Toolset:
    """`search(query, k)` and `open(id, page)` over a source (see `read_source`) or a Library.

    `report` takes one line about what was read and what was left out; standard error if None. Raises UserError.
    """
    library = source if isinstance(source, Library) else load_library(source, report)

    @tool(inline=True)
    def search(query: str, k: int = 10) -> str:
        """Search the documents by words. Answers the best matching ones: title, id, and a piece with the words.

        Args:
            query: Words to look for.
            k: How many results, 1 to 50.
        """
        hits = library.search(query, k)
        if not hits:
            return "No results. Try other words."
        return "\n".join(f"{rank}. {hit.title} <{hit.id}>\n   {hit.snippet}" for rank, hit in enumerate(hits, 1))

    @tool(inline=True, name="open")
    def open_document(id: str, page: int = 1) -> ToolResult:
        """Open a document and read its text.

        Args:
            id: As a search result shows it between angle brackets.
            page: Long documents come in pages; 1 is the first.
        """
        document = library.find(id)
        if document is None:
            near = library.near(id)
            meant = f" Did you mean {' or '.join(f'<{one}>' for one in near)}?" if near else ""
            return ToolResult(f"Error: there is no document {id[:200]!r}.{meant} Ids come from search results.",
                              error=True)
        pages = list(cut(document.text, PAGE_CHARACTERS))
        if not 1 <= page <= len(pages):
            return ToolResult(f"Error: {document.id} has {len(pages)} page(s), there is no page {page}.", error=True)
        if len(pages) == 1:
            return ToolResult(document.text or "[the document is empty]")
        more = f"; go on with page={page + 1}" if page < len(pages) else ""
        return ToolResult(f"{pages[page - 1]}\n[… page {page} of {len(pages)}{more} …]")

    return Toolset([search, open_document])


def load_library(source: Any, report: Callable[[str], None] | None = None) -> Library:
    """Read a source and index it; where it is large, with progress on standard error. Raises UserError."""
    from moonbase.report.console import Console

    skipped = Skipped()
    with Console() as console:
        library = Library(read_source(source, skipped, console), console)
    left_out = f"left out: {skipped.one_line()}" if skipped.total else ""
    if not library.documents:
        place = f" in {source}" if isinstance(source, (str, os.PathLike)) else ""
        raise UserError(f"search: no documents{place}{f' ({left_out})' if left_out else ''}")
    if left_out or report is not None:
        (report or functools.partial(print, file=sys.stderr))(
            f"search: {len(library.documents):,} documents{f'; {left_out}' if left_out else ''}")
    return library


def snippet(text: str, query: str, length: int = SNIPPET_CHARACTERS) -> str:
    """The piece of the text with most of the query's words, on one line; the beginning where none stands there as it
    is written."""
    text = text[:SNIPPET_SCANNED]
    lower = text.lower()
    if len(lower) != len(text):
        lower = text  # some capitals are one character and two small ones
    wanted = {word.lower() for word in re.findall(r"\w+", query[:QUERY_CHARACTERS])}
    for run in list(wanted):
        if UNSPACED.search(run):
            wanted.update(words(run))
    places: list[tuple[int, str]] = []
    for word in sorted(wanted, key=lambda word: (-len(word), word))[:QUERY_TERMS]:
        pattern = re.escape(word) if UNSPACED.search(word) else rf"(?<!\w){re.escape(word)}(?!\w)"
        places += [(found.start(), word) for found, _ in zip(re.finditer(pattern, lower), range(50), strict=False)]
    places.sort()
    best, start, first = 0, 0, 0
    inside: dict[str, int] = {}
    for position, word in places:
        inside[word] = inside.get(word, 0) + 1
        while places[first][0] + length * 3 // 4 < position:
            gone = places[first][1]
            inside[gone] -= 1
            if not inside[gone]:
                del inside[gone]
            first += 1
        value = sum(map(len, inside))
        if value > best:
            best, start = value, places[first][0]
    begin = max(start - length // 8, 0)
    if begin:
        begin = text.find(" ", begin, start) + 1 or begin
    piece = text[begin : begin + length]
    return f"{'… ' if begin else ''}{' '.join(piece.split())}{' …' if begin + length < len(text) else ''}"
