"""Grading: every way of writing a table reads the same, and every corruption costs what the definitions say."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import time
from decimal import Decimal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moonbase.agents.worlds.cells import canonical
from moonbase.agents.worlds.grading import Score, parse_table, score, score_rows
from moonbase.agents.worlds.metrics import cells_agree
from moonbase.agents.worlds.tables_in_text import MOST_ROWS
from moonbase.agents.worlds.world import Column, Task

COLUMNS = (Column("Name", "text"), Column("Length (m)", "number", "m"), Column("Founded", "date"),
           Column("Trade", "text"))
NAMES = [column.name for column in COLUMNS]


def make_task(
    rows: list[dict[str, str]], columns: tuple[Column, ...] = COLUMNS, keys: tuple[str, ...] = ("Name",)
) -> Task:
    return Task("t", "wide", "", columns, rows, keys)


def gold_rows(count: int) -> list[dict[str, str]]:
    return [{"Name": f"Thing {number}", "Length (m)": f"{1000 + number:,}.5", "Founded": f"{number % 28 + 1} May 1712",
             "Trade": f"trade {number}"} for number in range(count)]


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def comma_separated(rows: list[dict[str, str]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# --- tables in text ---

CELL = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="\\`~"), min_size=1,
               max_size=8)


@settings(max_examples=300, deadline=None)
@given(body=st.lists(st.lists(CELL, min_size=3, max_size=3), min_size=1, max_size=5), form=st.integers(0, 4))
def test_every_form_of_a_table_is_read_back(body: list[list[str]], form: int) -> None:
    names = ["Alpha", "Beta two", "Gamma"]
    rows = [dict(zip(names, cells, strict=True)) for cells in body]
    text = (
        f"Here it is:\n\n{markdown(rows)}\n\nThat is all | I found.",
        f"```markdown\n{markdown(rows)}\n```",
        f"As CSV:\n```csv\n{comma_separated(rows)}```\nDone, I think.",
        f"The list is {json.dumps(rows)}; enjoy.",
        f"```json\n{json.dumps(rows, indent=1, ensure_ascii=False)}\n```",
    )[form]
    # In Markdown a row of nothing but such signs may as well be a rule between rows.
    assume(form >= 2 or not any(set("".join(row.values())) <= set("-:=+| ") for row in rows))
    assert parse_table(text, names) == rows


@pytest.mark.parametrize(("text", "rows"), [
    ("a | b | c\n1 | 2 | 3", [{"a": "1", "b": "2", "c": "3"}]),
    ("| a | b |\n| 1 | 2 |", [{"a": "1", "b": "2"}]),
    ("|a|b|\n|:-:|---|\n|x\\|y|", [{"a": "x|y", "b": ""}]),
    ("|a|b|\n|-|-|\n|1|2|3|\n\n||\n", [{"a": "1", "b": "2"}]),
    ('a,b\n"1,5","say ""hi"""\n', [{"a": "1,5", "b": 'say "hi"'}]),
    ("a;b\n1;2", [{"a": "1", "b": "2"}]),
    ('[{"a": 1, "b": null}, {"a": 2.50, "c": [1, "x"]}]', [
        {"a": "1", "b": "", "c": ""}, {"a": "2.50", "b": "", "c": "1, x"}]),
    ("|a|a|\n|-|-|\n|1|2|", [{"a": "1", "a [2]": "2"}]),
    ("", None), ("No table here.", None), ("One, two, three.\nAnd more.", None), ("yes | no", None), ("[{", None),
    ("[1, 2]", None), ("```\n```", None),
])
def test_odd_tables(text: str, rows: list[dict[str, str]] | None) -> None:
    assert parse_table(text) == rows


def test_of_several_tables_the_fitting_one_counts() -> None:
    right = "|Name|Founded|\n|-|-|\n|x|1900|"
    other = "|Step|Done|\n|-|-|\n|1|yes|"
    draft = "|Name|Founded|\n|-|-|\n|x|1800|"
    for text in (f"{right}\n\n{other}", f"{other}\n\n{right}", f"{draft}\n\nBetter:\n\n{right}\n\n{other}"):
        assert parse_table(text, ["Name", "Founded"]) == [{"Name": "x", "Founded": "1900"}]


def test_a_table_without_its_header_has_the_columns_asked_for() -> None:
    rows = gold_rows(3)
    body = "\n".join(markdown(rows).splitlines()[2:])
    assert parse_table(body, NAMES) == rows and score(make_task(rows), body).exact


@pytest.mark.parametrize("text", [
    "|" * 2_000_000, "|a" * 500_000, "| a | b |\n" * 300_000, "[" * 1_000_000, '[{"a":' * 200_000, "[{" * 500_000,
    "-" * 1_000_000 + "|", "`" * 1_000_000, "```\n" * 200_000, '"' * 1_000_000, 'a,"' * 300_000, "," * 1_000_000,
    "\n" * 1_000_000, "|" + "1" * 1_000_000 + "|" + "," * 10, "[" + '{"a": 1},' * 100_000 + "{}]", "a,b\n" * 300_000,
    "|Name|\n|" + "*" * 500_000 + "|\n", '[{"Name": ' + "9" * 500_000 + "}]", "[   " * 300_000, "\\|" * 500_000,
    "|Name|Founded|\n|-|-|\n" + "|Thing 0|1 May 1712|\n" * 100_000, "Answer: " * 200_000, "\x00" * 1_000_000,
    '[{"Name": [' + "[" * 100_000 + "]" * 100_000 + "]}]"], ids=lambda text: text[:12])
def test_hostile_answers_are_bounded(text: str) -> None:
    started = time.thread_time()
    graded = score(make_task(gold_rows(4)), text)
    assert isinstance(graded, Score) and graded.item_f1 < 0.1
    assert len(parse_table(text) or []) <= MOST_ROWS
    assert time.thread_time() - started < 10


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.text("|-\n,[]{}\":a1 `", max_size=200))
def test_any_text_is_graded(text: str) -> None:
    graded = score(make_task(gold_rows(2)), text)
    assert graded.item_f1 == 0 and not graded.exact
    score(Task("t", "deep", "", (Column("x", "number"),), "12"), text)


# --- cells ---

SAME = {
    ("number", ""): ["1234.5", "1,234.50", "1 234,5", "1.234,50", "1'234.5", "1_234.5", "+1234.5", "**1,234.5**",
                     "1.2345e3", "１２３４.５", "1.2345 thousand", "1.2345k", "[1,234.5](https://x.example)"],
    ("number", "m"): ["312", "312 m", "312m", "0.312 km", "31,200 cm", "312 metres"],
    ("number", "km²"): ["40", "40 km²", "40 km2", "4,000 ha", "40 sq km"],
    ("number", "million marks"): ["31.5", "31.5 million marks", "31,500,000 marks", "0.0315 billion marks"],
    ("percent", ""): ["12.5", "12.5%", "12,5 %", "12.50 %"],
    ("date", ""): ["4 May 1712", "May 4, 1712", "1712-05-04", "4.5.1712", "04.05.1712", "1712/05/04",
                   "4th of May, 1712", "4 may 1712", "1712-05-04T00:00:00Z", "5/4/1712"],
    ("text", ""): ["Café au  lait", "café au lait", " CAFÉ AU LAIT ", "Cafe\u0301 au lait", "*Café au lait*",
                   '"Café au lait"'],
    ("auto", ""): ["2,000", "2000", "2000.0"],
}
DIFFERENT = [
    ("number", "", "1.234", "1,234"), ("number", "", "12.5", "125"), ("number", "", "-5", "5"),
    ("number", "m", "312", "312 km"), ("number", "m", "312", "312 kg"), ("number", "", "12", "about 12, maybe"),
    ("number", "", "1,234", "1,234,56"), ("date", "", "4 May 1712", "5 May 1712"),
    ("date", "", "4 May 1712", "May 1712"), ("date", "", "4 May 1712", "1712"),
    ("date", "", "30 March 1712", "30 Febr 1712"), ("text", "", "Cafe", "Café"), ("text", "", "a b", "ab"),
    ("auto", "", "12 m", "12"), ("text", "", "007", "7"), ("text", "", "x", ""), ("percent", "", "12.5%", "0.125"),
]


@pytest.mark.parametrize("kind", SAME)
def test_ways_to_write_the_same(kind: tuple[str, str]) -> None:
    column = Column("x", *kind)
    for one, other in itertools.product(SAME[kind], repeat=2):
        assert cells_agree(column, one, other), (one, other)


@pytest.mark.parametrize(("type_", "unit", "one", "other"), DIFFERENT)
def test_what_is_not_the_same(type_: str, unit: str, one: str, other: str) -> None:
    column = Column("x", type_, unit)
    assert not cells_agree(column, one, other) and not cells_agree(column, other, one)


def test_tolerance() -> None:
    column = Column("x", "number", tolerance=0.05)
    assert cells_agree(column, "100", "105") and cells_agree(column, "100", "95")
    assert not cells_agree(column, "100", "105.1") and not cells_agree(column, "100", "about 100 or so")


@settings(max_examples=500, deadline=None)
@given(value=st.decimals(-10**9, 10**9, places=3), grouped=st.booleans(), zeros=st.integers(0, 4))
def test_number_formats_keep_the_number(value: Decimal, grouped: bool, zeros: int) -> None:
    text = f"{value:{',' if grouped else ''}f}" + "0" * zeros
    assert canonical(Column("x", "number"), text) == ("number", value)


# --- scores ---


def brute_force(gold: list[tuple], answer: list[tuple]) -> tuple[Decimal | float, ...]:
    """Item and row precision and recall of rows whose first value is the key, by trying every matching of rows.

    Where gold has a key once, only the answer's row with the fewest right cells can be matched; of all matchings of
    what is left the one with the most right cells counts.
    """
    width = len(gold[0])

    def right(ours: tuple, theirs: tuple) -> int:
        return sum(one == other for one, other in zip(ours, theirs, strict=True)) if ours[0] == theirs[0] else 0

    left = list(answer)
    for key in {row[0] for row in gold}:
        while sum(row[0] == key for row in gold) == 1 < sum(row[0] == key for row in left):
            counts = {place: max(right(ours, row) for ours in gold) for place, row in enumerate(left) if row[0] == key}
            left.pop(max(counts, key=lambda place: counts[place]))
    left = [row for row in left if any(row[0] == ours[0] for ours in gold)]
    places = [*range(len(gold)), *[None] * len(left)]
    best = (0, 0)
    for way in set(itertools.permutations(places, len(left))):
        # None: not matched.
        pairs = [(gold[place], row) for place, row in zip(way, left, strict=True) if place is not None]
        best = max(best, (sum(right(*pair) for pair in pairs), sum(right(*pair) == width for pair in pairs)))
    cells, rows = best
    return (cells / (len(answer) * width), cells / (len(gold) * width), rows / len(answer), rows / len(gold))


VALUES = (st.integers(0, 3), st.integers(0, 1), st.integers(0, 2))
ROWS = st.lists(st.tuples(*VALUES), min_size=1, max_size=4)


@settings(max_examples=600, deadline=None)
@given(gold=ROWS, answer=ROWS, seed=st.integers(0, 10**6))
def test_scores_are_those_of_brute_force(gold: list[tuple], answer: list[tuple], seed: int) -> None:
    """Random rows over a few values, keys repeated on both sides; each cell written in a way of its own."""
    draw = random.Random(seed)
    columns = (Column("Key", "text"), Column("Size", "number"), Column("Day", "date"))
    ways = (lambda value: draw.choice((f"Key {value}", f"key  {value}", f"**KEY {value}**")),
            lambda value: draw.choice((f"{1000 + value}", f"{1000 + value:,}", f"{1000 + value}.0")),
            lambda value: draw.choice((f"190{value}-05-04", f"4 May 190{value}", f"May 4, 190{value}")))

    def written(rows: list[tuple]) -> list[dict[str, str]]:
        return [{column.name: way(value) for column, way, value in zip(columns, ways, row, strict=True)}
                for row in rows]

    form = draw.choice((markdown, comma_separated, json.dumps))
    graded = score(make_task(written(gold), columns, ("Key",)), form(written(answer)))
    found = (graded.item_precision, graded.item_recall, graded.row_precision, graded.row_recall)
    expected = brute_force(gold, answer)
    assert found[:2] == pytest.approx(expected[:2]) and found[2:] == pytest.approx(expected[2:])
    for f1, precision, recall in ((graded.item_f1, *expected[:2]), (graded.row_f1, *expected[2:])):
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall) if precision + recall else 0)
    assert graded.exact == (sorted(gold) == sorted(answer))


COUNTS = st.integers(2, 40)


def check(graded: Score, items: tuple[float, float], rows: tuple[float, float], exact: bool = False) -> None:
    found = (graded.item_precision, graded.item_recall, graded.row_precision, graded.row_recall)
    assert found == pytest.approx((*items, *rows)) and graded.exact == exact


@given(count=COUNTS, seed=st.integers(0, 999))
def test_order_and_formats_do_not_matter(count: int, seed: int) -> None:
    draw, gold = random.Random(seed), gold_rows(count)
    rows = [{"Trade": row["Trade"].upper(), "founded": f"1712-05-{int(row['Founded'].split()[0]):02d}",
             "Length": row["Length (m)"].replace(",", "") + "0 m", "NAME": f" {row['Name']}  "} for row in gold]
    draw.shuffle(rows)
    for form in (markdown, comma_separated, json.dumps):
        graded = score(make_task(gold), form(rows))
        check(graded, (1, 1), (1, 1), exact=True)
        assert graded.item_f1 == graded.row_f1 == 1 and not graded.notes


@given(count=COUNTS, data=st.data())
def test_dropped_rows_cost_recall(count: int, data: st.DataObject) -> None:
    gold = gold_rows(count)
    dropped = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    left = 1 - len(dropped) / count
    graded = score(make_task(gold), markdown([row for place, row in enumerate(gold) if place not in dropped]))
    check(graded, (1, left), (1, left))
    assert graded.notes == (f"{len(dropped)} rows missing",)


@given(count=COUNTS, data=st.data())
def test_swapped_cells_cost_both_cells(count: int, data: st.DataObject) -> None:
    gold = gold_rows(count)
    one, other = data.draw(st.permutations(range(count)))[:2]
    rows = [dict(row) for row in gold]
    rows[one]["Trade"], rows[other]["Trade"] = rows[other]["Trade"], rows[one]["Trade"]
    items, whole = 1 - 2 / (4 * count), 1 - 2 / count
    check(score(make_task(gold), markdown(rows)), (items, items), (whole, whole))


@given(count=COUNTS, times=st.integers(1, 5))
def test_repeated_rows_cost_precision(count: int, times: int) -> None:
    gold = gold_rows(count)
    share = count / (count + times)
    graded = score(make_task(gold), markdown([*gold, *[gold[0]] * times]))
    check(graded, (share, 1), (share, 1))
    assert graded.notes == (f"{times} rows too many",)


@given(count=COUNTS, seed=st.integers(0, 999))
def test_guessing_twice_never_pays(count: int, seed: int) -> None:
    """A second guess at a row cannot make it right, in whichever order the two stand."""
    gold = gold_rows(count)
    rows = [*({**row, "Trade": "a guess"} for row in gold), *gold]
    random.Random(seed).shuffle(rows)
    check(score(make_task(gold), markdown(rows)), (0.75 / 2, 0.75), (0, 0))


@given(count=COUNTS)
def test_a_wrong_key_costs_its_row(count: int) -> None:
    gold = gold_rows(count)
    left = 1 - 1 / count
    check(score(make_task(gold), markdown([{**gold[0], "Name": "Thong 0"}, *gold[1:]])), (left, left), (left, left))


def test_columns_too_many_and_too_few() -> None:
    gold = gold_rows(8)
    graded = score(make_task(gold), markdown([{**row, "Remark": "nice"} for row in gold]))
    check(graded, (1, 1), (1, 1), exact=True)
    assert graded.notes == ("column Remark was not asked for",)
    graded = score(make_task(gold), markdown([{name: row[name] for name in NAMES[:3]} for row in gold]))
    check(graded, (0.75, 0.75), (0, 0))
    assert graded.notes == ("column Trade is missing",)
    assert score(make_task(gold), markdown([{name: row[name] for name in NAMES[1:]} for row in gold])).item_f1 == 0


def test_two_key_columns() -> None:
    gold = [{"Name": "a", "Founded": "1900", "Trade": "x"}, {"Name": "a", "Founded": "1901", "Trade": "y"}]
    columns = (Column("Name", "text"), Column("Founded", "date"), Column("Trade", "text"))
    task = make_task(gold, columns, ("Name", "Founded"))
    assert score(task, markdown(gold[::-1])).exact
    swapped = [{**gold[0], "Trade": "y"}, {**gold[1], "Trade": "x"}]
    check(score(task, markdown(swapped)), (2 / 3, 2 / 3), (0, 0))


def test_many_rows_of_one_key_are_matched_as_well_as_can_be() -> None:
    gold = [{"Name": "a", "Founded": str(1900 + number), "Trade": f"t{number}"} for number in range(30)]
    columns = (Column("Name", "text"), Column("Founded", "date"), Column("Trade", "text"))
    rows = gold[:]
    random.Random(0).shuffle(rows)
    assert score(make_task(gold, columns), markdown(rows)).exact


@pytest.mark.parametrize(("text", "right"), [
    ("It took a while.\n\nAnswer: 12,430", True), ("Answer: 9\n**Answer:** 12430", True), ("Answer:\n12430 m\n", True),
    ("12430", True),
    ("**Answer: 12,430**", True), ("Answer: 12,431", False), ("Answer: 12,430\nAnswer: 7", False), ("", False),
    ("The answer may be 12,430 or 12,431", False), ("answer: 12 430 m", True), ("Answer: 12,430 or 7", False),
    ("Answer: 12,430\n\nI hope that this helps.", True)])
def test_single_answers(text: str, right: bool) -> None:
    graded = score(Task("t", "deep", "", (Column("height", "number", "m"),), "12,430"), text)
    assert graded.exact == right and graded.item_f1 == graded.row_f1 == float(right) and bool(graded.notes) != right


def test_a_wrong_task_is_a_mistake_of_the_programmer() -> None:
    with pytest.raises(ValueError, match="must be among the columns"):
        score_rows(COLUMNS, ("Nome",), gold_rows(1), gold_rows(1))
    with pytest.raises(ValueError, match="no gold rows"):
        score_rows(COLUMNS, ("Name",), [], gold_rows(1))
