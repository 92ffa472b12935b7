"""The world of real tables. Skipped where the folder of shared data is absent."""

from __future__ import annotations

import asyncio
import copy
import csv
import io
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moonbase.agents.worlds import tables
from moonbase.agents.worlds.grading import score
from moonbase.agents.worlds.world import Column, PagedWorld, Task, world_tools
from moonbase.errors import UserError


@pytest.fixture(scope="module")
def tables_folder(shared_data: Path) -> Path:
    folder = shared_data / "deepwidesearch"
    if not folder.is_dir():
        pytest.skip(f"the tables are absent: {folder}")
    return folder


@pytest.fixture(scope="module")
def tables_world(tables_folder: Path) -> tuple[PagedWorld, list[Task]]:
    return tables.load_tables(tables_folder)


@pytest.fixture(scope="module")
def oracle_answers(tables_world: tuple[PagedWorld, list[Task]]) -> dict[str, str]:
    """What the scripted oracle writes, by task: one run through the tools for all tests."""
    world, tasks = tables_world
    tools = world_tools(world)

    async def solve_all() -> dict[str, str]:
        return {task.id: await tables.solve(task, tools) for task in tasks}

    return asyncio.run(solve_all())


def test_oracle_is_right_on_every_table(
    tables_world: tuple[PagedWorld, list[Task]], oracle_answers: dict[str, str], tables_folder: Path
) -> None:
    tasks = tables_world[1]
    assert len(tasks) == 68 and len({task.id for task in tasks}) == 68
    assert sum(len(task.answer) for task in tasks) == 5727
    for task in tasks:
        grade = score(task, oracle_answers[task.id])
        assert (grade.item_f1, grade.row_f1, grade.exact, grade.notes) == (1.0, 1.0, True, ()), task.id
        # And every cell of the file is in the answer, letter for letter.
        text = (tables_folder / "tables" / f"{task.id}.csv").read_bytes().decode("utf-8-sig")
        gold = Counter(_letters(cell) for row in list(csv.reader(io.StringIO(text, newline="")))[1:] for cell in row)
        said = Counter(_letters(cell) for line in oracle_answers[task.id].splitlines()[3:-1]
                       for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        del gold[""], said[""]
        assert gold == said, task.id


def _letters(cell: str) -> str:
    return re.sub(r"\s|<br>", "", cell.replace("\\|", "|"))


def test_oracle_calls_lead_to_every_row(tables_world: tuple[PagedWorld, list[Task]]) -> None:
    world, tasks = tables_world
    for task in tasks:
        first, *openings = task.oracle
        assert [hit.id for hit in world.search(first.arguments["query"], 1)] == list(first.pages), task.id
        reached = {world.pages[first.pages[0]].url}
        for call in openings:
            # Each page opened is the subject or stands as a link on a page opened before.
            assert call.arguments["url"] in reached, (task.id, call)
            reached.update(world.find(call.arguments["url"]).links)
        of_row = {call.row: call for call in openings if call.row is not None}
        assert set(of_row) == set(range(len(task.answer)))
        for number, row in enumerate(task.answer):
            page = world.open(of_row[number].arguments["url"])
            assert all(re.sub(r"\s", "", cell) in re.sub(r"\s", "", page) for cell in row.values()), (task.id, number)


def test_pages_fit_a_tool_result(tables_world: tuple[PagedWorld, list[Task]]) -> None:
    world, _ = tables_world
    assert max(len(page.text) for page in world.pages) < 32_000
    assert world.digest() == PagedWorld("again", world.pages).digest()


def test_chinese_is_found_inside_a_sentence(tables_world: tuple[PagedWorld, list[Task]]) -> None:
    world, _ = tables_world
    assert any("七里香" in world.open(hit.url) for hit in world.search("请问七里香是谁写的", 5))


def test_what_must_not_move_the_score(tables_world: tuple[PagedWorld, list[Task]]) -> None:
    for task in tables_world[1]:
        names, rows = task.column_names, list(task.answer)
        random.Random(task.id).shuffle(rows)
        flat = [{name: cell.replace("\n", "<br>") for name, cell in row.items()} for row in rows]
        forms = {
            "row order": tables.write_markdown(rows, names),
            "column order": tables.write_markdown(rows, names[::-1]),
            "an extra column": tables.write_markdown([row | {"Source": "x"} for row in rows], [*names, "Source"]),
            "headers in capitals": tables.write_markdown(
                [{name.upper(): cell for name, cell in row.items()} for row in rows],
                [name.upper() for name in names]),
            "JSON": json.dumps(rows, ensure_ascii=False),
            "CSV": f"Here it is:\n```csv\n{_csv(flat, names)}```",
            "number format": tables.write_markdown([_other_numbers(task, row) for row in rows], names),
        }
        for form, text in forms.items():
            grade = score(task, text)
            assert grade.exact and grade.item_f1 == 1.0, (task.id, form, grade)


def _csv(rows: list[dict[str, str]], names: list[str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _other_numbers(task: Task, row: dict[str, str]) -> dict[str, str]:
    """Numbers of graded columns with other marks: 1,234.5 and 1234.50 are one number, 33.2% is 33.20 %."""
    def rewrite(found: re.Match[str]) -> str:
        digits = found[0].replace(",", "")
        whole, point, rest = digits.partition(".")
        plain = found[0] == digits and len(whole) > 3
        return (f"{int(whole):,}" if plain else whole) + (f"{point}{rest}0" if point else "")

    return {name: re.sub(r"\d[\d,]*(?:\.\d+)?", rewrite, cell, count=1)
            if _metric(task, name) == "number_near" and cell.count(".") < 2 else cell
            for name, cell in row.items()}


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_what_must_move_the_score(every: int, tables_world: tuple[PagedWorld, list[Task]]) -> None:
    swaps = 0
    for task in tables_world[1][::every]:
        names, rows, chance = task.column_names, task.answer, random.Random(task.id)
        num_rows, num_cells = len(rows), len(rows) * len(names)
        lonely = [number for number, row in enumerate(rows) if sum(_same_key(task, row, one) for one in rows) == 1]
        place = chance.choice(lonely)

        def grade(changed: list[dict[str, str]], task: Task = task) -> Any:
            return score(task, tables.write_markdown(changed, task.column_names))

        dropped = grade(rows[:place] + rows[place + 1 :])
        assert dropped.item_precision == 1.0 and dropped.item_recall == pytest.approx(1 - 1 / num_rows), task.id
        assert dropped.row_f1 == dropped.item_f1 == pytest.approx(2 * (num_rows - 1) / (2 * num_rows - 1))
        doubled = grade([*rows, rows[place]])
        assert doubled.item_recall == 1.0, task.id
        assert doubled.item_f1 == pytest.approx(2 * num_rows / (2 * num_rows + 1)), task.id
        others = [name for name in names if name not in task.keys and re.search(r"\d|\w{3}", rows[place][name])
                  and rows[place][name] not in ("NA", "nan")]
        for name in others[: 300 // num_rows + 1]:
            wrong = copy.deepcopy(rows)
            wrong[place][name] = "entirely wrong"
            marred = grade(wrong)
            assert marred.item_f1 == pytest.approx(1 - 1 / num_cells), (task.id, name, rows[place][name])
            assert marred.row_f1 == pytest.approx(1 - 1 / num_rows) and not marred.exact
        wrong = copy.deepcopy(rows)
        wrong[place][task.keys[0]] = "no such key"
        assert grade(wrong).item_f1 == pytest.approx(1 - 1 / num_rows), task.id
        for name in names[: 600 // num_rows + 2]:
            pair = next(((place, other) for other in lonely if name not in task.keys
                         and _clearly_differ(task, name, rows[place][name], rows[other][name])), None)
            if pair is not None:
                swaps += 1
                swapped = copy.deepcopy(rows)
                swapped[pair[0]][name], swapped[pair[1]][name] = rows[pair[1]][name], rows[pair[0]][name]
                assert grade(swapped).item_f1 == pytest.approx(1 - 2 / num_cells), (task.id, name, pair)
    assert swaps > 250 / every


def _metric(task: Task, name: str) -> str:
    return next(column.type for column in task.columns if column.name == name)


def _same_key(task: Task, row: dict[str, str], other: dict[str, str]) -> bool:
    return all(_bare(row[key]) == _bare(other[key]) for key in task.keys)


def _bare(cell: str) -> str:
    return "".join(sorted(letter for letter in cell.casefold() if letter.isalnum()))


def _clearly_differ(task: Task, name: str, one: str, other: str) -> bool:
    metric = _metric(task, name)
    if metric == "number_near":
        numbers = [re.findall(r"\d+(?:\.\d+)?", cell.replace(",", "")) for cell in (one, other)]
        if not all(numbers):
            return False
        small, large = sorted(float(found[0]) for found in numbers)
        return large > 1.5 * small
    if metric == "date_near":
        years = [re.findall(r"\d{4}", cell) for cell in (one, other)]
        return all(years) and abs(int(years[0][0]) - int(years[1][0])) > 1
    return _bare(one) != _bare(other)


@pytest.mark.parametrize(("metric", "criterion", "gold", "same", "other"), [
    ("exact_match", 0, "Le Pré Catelan", ["le pré catelan", "**Le Pré Catelan**", "LePréCatelan"], ["Le Pre", ""]),
    ("exact_match", 0, "/", ["/", "-", "NA", ""], ["no"]),
    ("number_near", 0.05, "$327.20", ["327.2", "USD 330", "$1,327.20".replace("1,", "")], ["400", "NA", "300"]),
    ("number_near", 0.05, "476,560 ha", ["476560", "476,560 hectares"], ["476 560 ha", "4765 km2"]),
    ("number_near", 0.1, "33.20%", ["33.2%", "0.332", "34 %".replace(" ", "")], ["33.2", "20%"]),
    ("number_near", 0.0, "1937年", ["1937"], ["1938"]),
    ("number_near", 0.05, "-68.6", ["-68.6", "-70"], ["68.6"]),
    ("number_near", 0.05, "NA", ["/", "nan", "", "not found"], ["0"]),
    ("date_near", 0, "May 19, 2000", ["2000-05-19", "19 May 2000", "May 2000", "2000年6月1日"], ["2000-07-01", "2001"]),
    ("date_near", 0, "2016-09", ["September 2016", "2016年9月"], ["2017-09", "NA"]),
    ("date_near", 0, "NA", ["-", "NA"], ["2016-09"]),
    ("number_near", 0.1, "0.5", [".5", "50%", "0.46"], ["5", "1" * 500_000]),
    ("url_match", 0, "https://[::1", ["https://[::1"], ["https://b.example"]),
    ("llm_judge", 0, "a, " * 900 + "end", ["end, " + "a、" * 900], ["a, " * 900 + "other"]),
    ("url_match", 0, "https://www.cam.ac.uk/", ["see https://www.cam.ac.uk/study"], ["https://bristol.ac.uk/", ""]),
    ("llm_judge", 0, "张恭庆、姜伯驹", ["姜伯驹, 张恭庆", "姜伯驹；张恭庆"], ["张恭庆"]),
    ("llm_judge", 0, "2025年5月6日", ["2025-05-06", "May 6, 2025"], ["2025-05-07"]),
    ("llm_judge", 0, "1,340", ["1340", "1340.0"], ["1341"]),
    ("llm_judge", 0, "1.Bogey Award\n2.Golden Screen", ["Golden Screen; Bogey Award"], ["Golden Screen"]),
])
def test_metrics(metric: str, criterion: float, gold: str, same: list[str], other: list[str]) -> None:
    """Expected by hand from the definitions of the WideSearch evaluator."""
    columns = (Column("k", "exact_match"), Column("v", metric, tolerance=criterion))
    task = Task("one", "tables", "", columns, [{"k": "row", "v": gold}], ("k",))
    for cell in [gold, *same]:
        assert score(task, json.dumps([{"k": "row", "v": cell}])).exact, cell
    for cell in other:
        assert score(task, json.dumps([{"k": "row", "v": cell}])).item_f1 == 0.5, cell


def test_columns_take_near_names(tables_world: tuple[PagedWorld, list[Task]]) -> None:
    """One table spells "Tution", its task asks for "Tuition"."""
    task = next(task for task in tables_world[1] if task.id == "wide2deep_ws_en_009")
    text = tables.write_markdown(task.answer, task.column_names).replace("Tution", "Tuition")
    assert "Tuition Fees" in task.prompt and score(task, text).exact


def test_no_table_and_no_folder(tables_world: tuple[PagedWorld, list[Task]], tmp_path: Path) -> None:
    assert score(tables_world[1][0], "I could not find it.").item_f1 == 0.0
    with pytest.raises(UserError, match=r"tasks\.jsonl\.gz is missing"):
        tables.load_tables(tmp_path)
