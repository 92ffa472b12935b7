"""Real tables as a closed world: the DeepWideSearch tasks that build on WideSearch, with their gold tables as pages.

Each table has a subject page (what it is about, and how the task describes it), lists that lead on, and pages of
records, one `label: value` line a cell; rows that share the first of several keys share a page. All tables stand in one
world, so each task's pages are hidden among the pages of the others. The data is read from a folder with
`tasks.jsonl.gz` and `tables/ID.csv`; none of it is in this package.

Each column is graded by the metric that the task names for it (`metrics.py`).
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path

from moonbase.agents.tools.tool import ToolContext, Toolset
from moonbase.agents.worlds.metrics import METRICS
from moonbase.agents.worlds.tables_in_text import Row
from moonbase.agents.worlds.world import Call, Column, Page, PagedWorld, Task
from moonbase.errors import UserError

PAGE_CHARACTERS = 16_000
"""Of records on one page, unless one record alone is longer; a tool's result is cut at twice that."""
LIST_ROWS = 40
"""Pages that one list leads to."""
SITE = "https://tables.example"
_LINK = re.compile(r"<(https://[^<>\s]+)>")


def load_tables(folder: Path | str) -> tuple[PagedWorld, list[Task]]:
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
    return PagedWorld("tables", pages), tasks


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
    pipelines = {by_plain[name]: pipeline for name, pipeline in evaluation["eval_pipeline"].items()}
    openings = [*range(first, first + 1 + len(lists))]
    return Task(
        id=record["instance_id"], family="tables", prompt=record["question"],
        columns=tuple(_column(name, pipelines[name]) for name in names), answer=rows, keys=tuple(keys),
        oracle=(Call("search", {"query": about}, pages=(first,)),
                *(Call("open", {"url": pages[page].url}, pages=(page,)) for page in openings),
                *(Call("open", {"url": pages[page_of_row[row]].url}, row, (page_of_row[row],))
                  for row in range(len(rows)))),
        meta={"language": record["language"], "topic": record.get("topic", ""), "subject": subject})


def _column(name: str, pipeline: dict) -> Column:
    """How the evaluator of WideSearch is told to compare a column. Raises ValueError for a metric that is unknown."""
    metric = pipeline["metric"][0]
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric}")
    return Column(name, metric, tolerance=float(pipeline.get("criterion") or 0) if metric == "number_near" else 0.0)


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
