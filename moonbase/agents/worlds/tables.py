"""Real tables as a closed world: the DeepWideSearch tasks that build on WideSearch, with their gold tables as pages.

Each table has a subject page (what it is about, and how the task describes it), lists that lead on, and pages of
records, one `label: value` line a cell; rows that share the first of several keys share a page. All tables stand in one
world, so each task's pages are hidden among the pages of the others. The data is read from a folder with
`tasks.jsonl.gz` and `tables/ID.csv`; none of it is in this package.

Grading follows the metric that WideSearch (Wong et al. 2025, §3.4 and its evaluator) names for each column:

    exact_match   the texts without case, spaces and asterisks are equal
    number_near   the first numbers differ by no more than the criterion, relative to the gold; 33.2% is 0.332, units
                  are not looked at, and two cells without any number agree
    date_near     the dates are within 31 days; a month or year alone is its first day, and two cells without a date
                  agree only where both are empty or their texts are equal (the evaluator lets any two of them agree)
    url_match     the hosts are the same
    llm_judge     no model judges here. Two cells agree where they are one date, one number, or the same items in any
                  order, without case, spaces, punctuation and the marks of nothing (/, -, NA): a lower bound of what a
                  judge would pass

Cells are reduced to what their metric looks at, and the common grader counts (it asks that keys agree by the same
rules and, unlike the evaluator, does not forgive rows that are there twice). A column whose name nobody asked for is
taken for the one with the nearest name.
"""

from __future__ import annotations

import csv
import datetime
import difflib
import functools
import gzip
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from moonbase.agents.tools.tool import ToolContext, Toolset
from moonbase.agents.worlds.cells import plain_text, read_date, read_number
from moonbase.agents.worlds.grading import Score, score_rows
from moonbase.agents.worlds.index import Index
from moonbase.agents.worlds.tables_in_text import Row, parse_table, plain_header
from moonbase.agents.worlds.world import Call, Column, Hit, Page, PagedWorld, Task
from moonbase.errors import UserError

PAGE_CHARACTERS = 16_000
"""Of records on one page, unless one record alone is longer; a tool's result is cut at twice that."""
LIST_ROWS = 40
"""Pages that one list leads to."""
NEAR_DAYS = 31
"""What date_near allows."""
TEXT_LIMIT = 1_000_000
SITE = "https://tables.example"
METRICS = ("exact_match", "number_near", "date_near", "url_match", "llm_judge")

# The common grader knows relative tolerances alone: of days counted from so far back, 31 are the same part everywhere.
_LONG_AGO = 1_000_000_000
_DIGEST_ABOVE = 200
_NUMBER = re.compile(r"[-+]?(?:\d*\.\d+|\d+\.?\d*)%?")
_LIST_MARK = re.compile(r"(?:\d{1,2}[.)、]|[-•·*])\s*(?=\D)")
_CHINESE_DATE = re.compile(r"(\d{4})年(?:(\d{1,2})月(?:(\d{1,2})[日号])?)?")
_ADDRESS = re.compile(r"https?://[^\s<>)\]|\"']+")
_LINK = re.compile(r"<(https://[^<>\s]+)>")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]+")


@dataclass(frozen=True)
class Metric:
    """How a column is compared."""

    name: str
    criterion: float = 0.0
    """number_near: the relative error allowed."""


class TablesWorld(PagedWorld):
    """The pages of all tables. Chinese is found by any two characters that stand together."""

    def __init__(self, name: str, pages: Sequence[Page]) -> None:
        super().__init__(name, pages)
        self.index = Index(_pairs(f"{page.title}\n{page.title}\n{page.text}") for page in pages)

    def search(self, query: str, k: int = 10) -> list[Hit]:
        """The best k pages by BM25."""
        return super().search(_pairs(query), k)


def _pairs(text: str) -> str:
    """Chinese is written without spaces: each pair of neighbours becomes a word."""
    return _HAN.sub(lambda run: " " + " ".join(
        run[0][place : place + 2] for place in range(max(1, len(run[0]) - 1))) + " ", text)


def load_tables(folder: Path | str) -> tuple[TablesWorld, list[Task]]:
    """The world of all tables in a folder, and its tasks. Raises UserError where the folder does not hold them."""
    folder = Path(folder)
    path = folder / "tasks.jsonl.gz"
    if not path.is_file():
        raise UserError(f"{path} is missing: name the folder deepwidesearch with tasks.jsonl.gz and tables/ in it")
    pages: list[Page] = []
    tasks = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                record["evaluation"] = json.loads(record["evaluation"])
                header, rows = _read_csv(folder / "tables" / f"{record['instance_id']}.csv", record)
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise UserError(
                    f"{path}, line {number}: not a task with its table ({error}); get the data anew") from None
            tasks.append(_lay_out(record, header, rows, pages))
    return TablesWorld("tables", pages), tasks


def _read_csv(path: Path, record: dict) -> tuple[list[str], list[Row]]:
    """The names of the asked columns as the table writes them, and the rows under these names."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        header, *body = csv.reader(file)
    plain = ["".join(name.lower().split(" ")) for name in header]
    places = [plain.index(name) for name in record["evaluation"]["required"]]
    places.sort()
    names = [" ".join(header[place].split()) for place in places]
    return names, [{name: cells[place].replace("\r\n", "\n").strip() for name, place in zip(names, places, strict=True)}
                   for cells in body]


# Pages


def _lay_out(record: dict, names: list[str], rows: list[Row], pages: list[Page]) -> Task:
    """Append a table's pages to `pages`. Subject page, then lists, then records; answer the task."""
    evaluation = record["evaluation"]
    by_plain = {"".join(name.lower().split(" ")): name for name in names}
    keys = [by_plain[name] for name in evaluation["unique_columns"]]
    root = f"{SITE}/{record['instance_id'].removeprefix('wide2deep_ws_').replace('_', '/')}"
    subject = _subject(record)
    groups = _group(rows, keys)
    lists = [groups[start : start + LIST_ROWS] for start in range(0, len(groups), LIST_ROWS)]
    first = len(pages)
    list_urls = [f"{root}/list/{number}" for number in range(1, len(lists) + 1)]
    about = describe(record["question"])
    _append(pages, subject, root, "\n".join([
        f"Field: {record.get('topic', '')}", f"Described as: {about}", f"Records: {len(rows)} ({', '.join(names)})",
        *(f"- {subject}, list {number} of {len(lists)} <{url}>" for number, url in enumerate(list_urls, 1))]),
        list_urls)
    record_urls = [f"{root}/record/{number}" for number in range(1, len(groups) + 1)]
    for number, (url, part) in enumerate(zip(list_urls, lists, strict=True), 1):
        urls = record_urls[(number - 1) * LIST_ROWS :][: len(part)]
        lines = [f"- {_record_title(rows, group, keys)} <{target}>" for group, target in zip(part, urls, strict=True)]
        _append(pages, f"{subject}, list {number} of {len(lists)}", url, "\n".join(
            [f"Records of {subject}:", *lines, f"Up: <{root}>"]), [*urls, root])
    page_of_row = {}
    for url, group in zip(record_urls, groups, strict=True):
        page_of_row |= dict.fromkeys(group, len(pages))
        text = "\n\n".join(_write_record(rows[row]) for row in group)
        _append(pages, _record_title(rows, group, keys), url, f"{text}\n\nFrom: {subject} <{root}>", [root])
    metrics = {by_plain[name]: _metric(pipeline) for name, pipeline in evaluation["eval_pipeline"].items()}
    openings = [*range(first, first + 1 + len(lists))]
    return Task(
        id=record["instance_id"], family="tables", prompt=record["question"],
        columns=tuple(_column(name, metrics[name]) for name in names), answer=rows, keys=tuple(keys),
        oracle=(Call("search", {"query": about}, pages=(first,)),
                *(Call("open", {"url": pages[page].url}, pages=(page,)) for page in openings),
                *(Call("open", {"url": pages[page_of_row[row]].url}, row, (page_of_row[row],))
                  for row in range(len(rows)))),
        meta={"language": record["language"], "topic": record.get("topic", ""), "subject": subject,
              "metrics": {name: [metric.name, metric.criterion] for name, metric in metrics.items()}})


def describe(prompt: str) -> str:
    """What a prompt says before it comes to the form of the answer."""
    before = re.split("markdown", prompt, maxsplit=1, flags=re.IGNORECASE)[0].strip().strip('"')
    sentences = re.match(r".*[.?!。？！\n]", before, re.DOTALL)
    return " ".join((sentences[0] if sentences else before).split())


def _append(pages: list[Page], title: str, url: str, text: str, links: list[str]) -> None:
    pages.append(Page(len(pages), title, url, f"{title}\n{text}", tuple(links)))


def _subject(record: dict) -> str:
    """What the table is about: the names that the task does not say."""
    try:
        names = json.loads(re.sub(r"^```\w*|```$", "", record["entity"].strip()))["entity"]
        return ", ".join(" ".join(str(name).split()) for name in ([names] if isinstance(names, str) else names))
    except (ValueError, KeyError, TypeError, AttributeError):
        return record["instance_id"]


def _group(rows: list[Row], keys: list[str]) -> list[list[int]]:
    """Numbers of the rows that share a page, in the order of the table."""
    if len(keys) < 2:
        return [[row] for row in range(len(rows))]
    together: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        together.setdefault(row[keys[0]], []).append(number)
    groups: list[list[int]] = []
    for members in together.values():
        size = PAGE_CHARACTERS
        for row in members:
            length = len(_write_record(rows[row]))
            if size + length > PAGE_CHARACTERS:
                groups.append([])
                size = 0
            groups[-1].append(row)
            size += length
    return groups


def _record_title(rows: list[Row], group: list[int], keys: list[str]) -> str:
    shown = keys if len(group) == 1 else keys[:1]
    title = " · ".join(" ".join(rows[group[0]][key].split())[:120] for key in shown)
    return f"{title} ({len(group)} records)" if len(group) > 1 else title


def _write_record(row: Row) -> str:
    """`label: value` lines; further lines of a value are indented."""
    return "\n".join(f"{name}: " + value.replace("\n", "\n  ") for name, value in row.items())


def read_records(text: str, names: Sequence[str]) -> list[Row]:
    """The records on a page, by the labels in `names`: what `_write_record` wrote, read again."""
    records: list[Row] = []
    current = None
    by_length = sorted(names, key=len, reverse=True)
    for line in text.splitlines():
        name = next((name for name in by_length if line.startswith(f"{name}:")), None)
        if name is not None:
            if name == names[0]:
                records.append({})
            if records:
                records[-1][name] = line[len(name) + 1 :].strip()
        elif line.startswith("  ") and records and current is not None:
            records[-1][current] += f"\n{line.strip()}"
            continue
        current = name
    return [record for record in records if len(record) == len(names)]


# The oracle


async def solve(task: Task, tools: Toolset) -> str:
    """A table found by `search` and `open` alone: from the description to the subject, its lists, its records."""
    context = ToolContext("oracle", 0, "oracle")

    async def ask(name: str, **arguments: str | int) -> str:
        return (await tools.call(name, json.dumps(arguments), context)).content

    found = _LINK.findall(await ask("search", query=describe(task.prompt), k=1))
    # Records and lists stand under the address of their subject.
    root = "/".join(found[0].split("/")[:5]) if found else ""
    lists = [url for url in _LINK.findall(await ask("open", url=root)) if url.startswith(root)]
    rows: list[Row] = []
    for one in lists:
        for url in _LINK.findall(await ask("open", url=one)):
            if url.startswith(f"{root}/record/"):
                rows += read_records(await ask("open", url=url), task.column_names)
    return write_markdown(rows, task.column_names)


def write_markdown(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A fenced Markdown table, as the tasks ask for."""
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"

    return "\n".join(["```markdown", line(names), "|" + "---|" * len(names),
                      *(line([row.get(name, "") for name in names]) for row in rows), "```"])


# Grading


def score(task: Task, text: str) -> Score:
    """Grade an answer by the metric of each column."""
    rows = parse_table(text[:TEXT_LIMIT], task.column_names)
    if rows is None:
        return Score(notes=("the answer holds no table",))
    metrics = {name: Metric(*value) for name, value in task.meta["metrics"].items()}
    rows = _rename(rows, task.column_names)
    return score_rows(task.columns, task.keys, _reduce(task.answer, metrics), _reduce(rows, metrics))


def _metric(pipeline: dict) -> Metric:
    name = pipeline["metric"][0]
    if name not in METRICS:
        raise ValueError(f"unknown metric {name}")
    return Metric(name, float(pipeline.get("criterion") or 0) if name == "number_near" else 0.0)


def _column(name: str, metric: Metric) -> Column:
    """What the common grader is told of a column of reduced cells."""
    if metric.name == "number_near":
        return Column(name, "number", tolerance=metric.criterion)
    if metric.name == "date_near":
        return Column(name, "number", tolerance=NEAR_DAYS / _LONG_AGO)
    return Column(name, "text")


def _rename(rows: list[Row], names: list[str]) -> list[Row]:
    """The rows with the columns that were asked for under their own names: those that fit, then the nearest."""
    there = list(dict.fromkeys(name for row in rows for name in row))
    found: dict[str, str] = {}
    for reading in (str, lambda name: plain_header(name, unit=True), plain_header, None):
        for name in names:
            free = [one for one in there if one not in found]
            if name in found.values():
                continue
            if reading is None:
                near = difflib.get_close_matches(plain_header(name), [plain_header(one) for one in free], 1, 0.8)
                fitting = [one for one in free if plain_header(one) in near]
            else:
                fitting = [one for one in free if reading(one) == reading(name)]
            if fitting:
                found[fitting[0]] = name
    return [{found.get(name, name): value for name, value in row.items()} for row in rows]


def _reduce(rows: Sequence[Row], metrics: dict[str, Metric]) -> list[Row]:
    return [{name: reduce_cell(metrics[name], value) if name in metrics else value for name, value in row.items()}
            for row in rows]


@functools.lru_cache(maxsize=1 << 16)
def reduce_cell(metric: Metric, cell: str) -> str:
    """What a metric looks at in a cell, written so that the common grader compares it by equality or tolerance."""
    text = re.sub(r"<br\s*/?>", "\n", cell)
    if metric.name == "number_near":
        found = _NUMBER.search(unicodedata.normalize("NFKC", text).replace(",", ""))
        if found is None:
            return ""
        number = found[0]
        return repr(float(number[:-1]) / 100) if number.endswith("%") else number.removeprefix("+").rstrip(".")
    if metric.name == "date_near":
        date = _day(text)
        return _short(_squeeze(text)) if date is None else str(_LONG_AGO + date.toordinal())
    if metric.name == "url_match":
        return _short(" ".join(sorted({urlsplit(url).netloc.lower() for url in _ADDRESS.findall(text)})))
    if metric.name == "llm_judge":
        return _short(_meaning(text))
    return _short(_squeeze(text))


def _squeeze(text: str) -> str:
    """Without case, white space, asterisks and the characters of no width."""
    return "".join(letter for letter in plain_text_of_any_length(text)
                   if not letter.isspace() and letter != "*" and unicodedata.category(letter) != "Cf")


def plain_text_of_any_length(text: str) -> str:
    """In small letters and NFKC; nothing where the cell says that there is nothing."""
    return unicodedata.normalize("NFKC", text).casefold() if plain_text(text) else ""


def _short(text: str) -> str:
    # Only compared for equality, and the common grader reads the beginning of a cell.
    return text if len(text) <= _DIGEST_ABOVE else hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _day(text: str) -> datetime.date | None:
    """The date that a cell is; of a month or a year the first day."""
    plain = "".join(letter for letter in plain_text(text) if unicodedata.category(letter) != "Cf")
    found = _CHINESE_DATE.fullmatch(plain.replace(" ", ""))
    parts = tuple(int(part) for part in found.groups() if part) if found else read_date(plain)
    try:
        return datetime.date(*parts, *(1,) * (3 - len(parts))) if parts else None
    except ValueError:
        return None


def _meaning(text: str) -> str:
    """A date, a number, or the items of a list in order of their letters."""
    plain = plain_text(text)
    date, number = _day(text), read_number(plain.removeprefix("$"), "%", strict=True)
    if date is not None and len(plain) > 4:
        return date.isoformat()
    if number is not None:
        return f"{number:f}"
    items = re.split(r"[\n;,、/]+", plain_text_of_any_length(text))
    kept = ("".join(letter for letter in _LIST_MARK.sub("", item.strip(), count=1) if letter.isalnum())
            for item in items)
    return " ".join(sorted(filter(None, kept)))
