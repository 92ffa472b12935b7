"""Questions about random tables, shown as text, HTML or a picture.

Solver A asks sqlite3; solver B walks over the rows in plain Python. `question` is data from which the sentence, the SQL
and the walk are made separately.
"""

from __future__ import annotations

import html
import re
import sqlite3
from fractions import Fraction
from typing import Any

from moonbase.evals.fresh.answers import final, fold, read_items, read_number
from moonbase.evals.fresh.problem import Draw, answer_line

Spec = dict[str, Any]
ROWS = (8, 12, 18, 26, 40)
FORMS = ("markdown", "csv", "html", "image")
# What things are called: table, key column, two categories, three numbers. (Latin column name, English, Chinese)
_SUBJECTS = (
    ("orders", "orders", "订单", "order_id"), ("shipments", "shipments", "货运单", "shipment_id"),
    ("repairs", "repairs", "维修单", "repair_id"), ("flights", "flights", "航班", "flight_id"),
    ("samples", "samples", "样本", "sample_id"), ("leases", "leases", "租约", "lease_id"))
_CATEGORIES = (
    ("colour", "colour", "颜色", {"amber": "琥珀色", "black": "黑色", "coral": "珊瑚色", "green": "绿色",
                                "ivory": "象牙色"}),
    ("status", "status", "状态", {"open": "进行中", "closed": "已结束", "paused": "暂停", "late": "逾期"}),
    ("grade", "grade", "等级", {"A": "甲", "B": "乙", "C": "丙", "D": "丁"}),
    ("carrier", "carrier", "承运商", {"Volt": "伏特", "Nimbus": "雨云", "Arrow": "飞箭", "Delta": "三角洲",
                                   "Quill": "羽笔"}),
    ("method", "method", "方式", {"manual": "人工", "batch": "批量", "remote": "远程"}))
_NUMBERS = (
    ("units", "units", "件数"), ("cost", "cost", "费用"), ("weight", "weight", "重量"), ("hours", "hours", "小时数"),
    ("score", "score", "得分"), ("delay", "delay", "延误"), ("distance", "distance", "距离"))
_SITES = (("site", "site", "站点"), ("depot", "depot", "仓库"), ("office", "office", "办事处"))
_PLACE = (("region", "region", "地区", {"north": "北部", "south": "南部", "east": "东部", "west": "西部"}),)
_WORDS_ZH = {latin: zh for one in (*_CATEGORIES, *_PLACE) for latin, zh in one[3].items()}
_SYLLABLES = ("ba", "do", "fe", "gu", "ka", "li", "mo", "nu", "pe", "ra", "si", "to", "vu", "ze")


FEWEST = 3
"""Rows that a question is about: of one row alone the mean, the largest and the sum are the same."""


def make(draw: Draw, difficulty: int) -> Spec | None:
    subject = draw.choice(_SUBJECTS)
    categories = draw.sample(_CATEGORIES, 1 if difficulty == 1 else 2)
    numbers = draw.sample(_NUMBERS, 2 if difficulty < 3 else 3)
    joined = difficulty >= 3 and draw.random() < (0, 0, 0.5, 0.8, 1.0)[difficulty - 1]
    site = draw.choice(_SITES)
    codes = draw.sample([a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in _SYLLABLES], 4 + difficulty)
    key_numbers = draw.sample(range(1000, 9999), ROWS[difficulty - 1])
    columns = [subject[3], *(one[0] for one in categories), *(one[0] for one in numbers), *([site[0]] * joined)]
    rows = [[f"{subject[0][0].upper()}{number}", *(draw.choice(tuple(one[3])) for one in categories),
             *(draw.randint(2, 20 * 10 ** draw.randint(0, 1)) for _ in numbers), *([draw.choice(codes)] * joined)]
            for number in key_numbers]
    tables = [{"name": subject[0], "columns": columns, "rows": rows}]
    if joined:
        tables.append({"name": site[0] + "s", "columns": [site[0], "region", "staff"],
                       "rows": [[code, draw.choice(tuple(_PLACE[0][3])), draw.randint(3, 90)] for code in codes]})
    question = _question(draw, difficulty, tables, [one[0] for one in categories], [one[0] for one in numbers], joined)
    if len(_chosen(tables, question)) < FEWEST:
        return None
    return {"kind": question["ask"], "difficulty": difficulty, "form": draw.choice(FORMS), "tables": tables,
            "question": question}


def _question(draw: Draw, difficulty: int, tables: list[dict[str, Any]], categories: list[str], numbers: list[str],
              joined: bool) -> dict[str, Any]:
    rows, columns = tables[0]["rows"], tables[0]["columns"]
    asks = (("count", "sum", "largest"), ("count", "sum", "largest", "mean"),
            ("sum", "mean", "top-group", "above-mean"),
            ("mean", "top-group", "above-mean", "range"), ("mean", "top-group", "above-mean", "product-sum"))
    some = draw.choice(rows)
    conditions = [[name, "=", some[columns.index(name)]] for name in categories[: 1 + (difficulty >= 4)]]
    if difficulty in (2, 3, 5):
        name = draw.choice(numbers)
        # The row on which all conditions are modelled fulfils them: no question is about nothing.
        conditions.append([name, ">=", max(1, some[columns.index(name)] - draw.randint(0, 9))])
    if joined:
        region = next(row[1] for row in tables[1]["rows"] if row[0] == some[-1])
        conditions.append(["region", "=", region])
    value, other = draw.sample(numbers, 2)
    ask = draw.choice(asks[difficulty - 1])
    group = categories[-1]
    if ask == "top-group":
        # Groups are compared, so their column is not held fast.
        conditions = [one for one in conditions if one[0] != group]
    question = {"ask": ask, "value": value, "other": other, "group": group, "where": conditions, "joined": joined}
    # What asks for too much is asked of less, as long as something is asked; the table that is joined stays in it.
    for name in [*categories[:0:-1], *numbers]:
        if len(_chosen(tables, question)) < FEWEST and len(question["where"]) > 1 + joined:
            question["where"] = [one for one in question["where"] if one[0] != name]
    return question


def _chosen(tables: list[dict[str, Any]], question: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, as dicts of both tables' columns, that fulfil all conditions."""
    rows = [dict(zip(tables[0]["columns"], row, strict=True)) for row in tables[0]["rows"]]
    if question["joined"]:
        of_key = {row[0]: dict(zip(tables[1]["columns"], row, strict=True)) for row in tables[1]["rows"]}
        rows = [row | of_key[row[tables[1]["columns"][0]]] for row in rows]
    return [row for row in rows if all(row[name] == limit if sign == "=" else row[name] >= limit
                                       for name, sign, limit in question["where"])]


# The sentence.


def _named(column: str, zh: bool, picture: bool) -> str:
    """A column in the question. In Chinese the words of a picture, which are Latin, stand behind ours."""
    for word in (*_CATEGORIES, *_NUMBERS, *_SITES, *_PLACE, ("staff", "staff", "员工数")):
        if word[0] == column:
            return word[1] if not zh else f"{word[2]}（{column}）" if picture else word[2]
    return next((f"{one[2]}编号" for one in _SUBJECTS if zh and one[3] == column), column)


def _value(value: Any, zh: bool, picture: bool) -> str:
    if not zh or value not in _WORDS_ZH:
        return str(value)
    return f"{_WORDS_ZH[value]}（{value}）" if picture else _WORDS_ZH[value]


def _show_question(spec: Spec, zh: bool) -> str:
    question, picture = spec["question"], spec["form"] == "image"
    ask, group = question["ask"], _named(question["group"], zh, picture)
    value, other = (_named(question[part], zh, picture) for part in ("value", "other"))
    subject = next(one for one in _SUBJECTS if one[0] == spec["tables"][0]["name"])
    if zh:
        where = "、".join(f"{_named(name, zh, picture)}{'为' if sign == '=' else '不小于 '}{_value(limit, zh, picture)}"
                         for name, sign, limit in question["where"])
        those = f"{where}{' ' * where[-1:].isdigit()}的{subject[2]}" if where else f"所有{subject[2]}"
        return {"count": f"{those}共有多少个？", "sum": f"{those}的{value}总和是多少？",
                "largest": f"{those}中，{value}的最大值是多少？",
                "mean": f"{those}的{value}平均值是多少？（精确的整数或分数）",
                "range": f"{those}的{value}最大值与最小值之差是多少？",
                "top-group": f"只看{those}，按{group}分组，哪一组的{value}总和最大？若并列，请全部列出。",
                "above-mean": f"只看{those}，其中{value}严格大于这些{subject[2]}的{value}平均值的有多少个？",
                "product-sum": f"{those}的{value}与{other}的乘积之和是多少？"}[ask]
    where = [f"{_named(name, zh, picture)} {'' if sign == '=' else 'of at least '}{limit}"
             for name, sign, limit in question["where"]]
    several = ", ".join(where[:-1]) + " and " if len(where) > 1 else ""
    those = f"{subject[1]} with {several}{where[-1]}" if where else f"all {subject[1]}"
    return {"count": f"How many {those} are there?", "sum": f"What is the total of {value} over {those}?",
            "largest": f"What is the largest {value} among {those}?",
            "mean": f"What is the mean {value} of {those} (an exact integer or fraction)?",
            "range": f"What is the difference between the largest and the smallest {value} of {those}?",
            "top-group": f"Taking only {those}: which {group} has the largest total {value}? Name all if several do.",
            "above-mean": f"Taking only {those}: in how many of them is {value} strictly above its mean "
                          "over them?",
            "product-sum": f"For {those}: what is the sum of {value} times {other}?"}[ask]


def _title_zh(name: str) -> str:
    return next(one[2] for one in (*_SUBJECTS, *_SITES) if name in (one[0], one[0] + "s"))


def _show_tables(spec: Spec, zh: bool) -> str:
    parts = []
    for table in spec["tables"]:
        title = table["name"] if not zh else _title_zh(table["name"])
        columns = [_named(name, zh, False) for name in table["columns"]] if zh else table["columns"]
        rows = [[_value(cell, zh, False) for cell in row] for row in table["rows"]]
        if spec["form"] == "markdown":
            lines = [f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows)]
            parts.append(f"{title}\n\n" + "\n".join(lines))
        elif spec["form"] == "csv":
            parts.append(f"{title}.csv\n" + "\n".join(",".join(map(str, row)) for row in (columns, *rows)))
        elif spec["form"] == "html":
            cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
            head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
            body = "\n".join(f"<tr>{row}</tr>" for row in (head, *cells))
            parts.append(f"<table>\n<caption>{title}</caption>\n{body}\n</table>")
    if spec["form"] == "image":
        return "数据见图片中的表格。" if zh else "The data are the tables in the picture."
    return "\n\n".join(parts)


def render(spec: Spec, language: str) -> str:
    zh = language == "zh"
    link = ""
    if spec["question"]["joined"]:
        name = spec["tables"][1]["columns"][0]
        name = _named(name, zh, spec["form"] == "image") if zh else name
        link = f"（两张表通过“{name}”列关联。）" if zh else f" (The two tables are linked by the column {name}.)"
    return f"{_show_tables(spec, zh)}\n\n{_show_question(spec, zh)}{link}" + answer_line(
        language, "the value", "结果")


# The answers.


def solve_a(spec: Spec, language: str) -> list[str]:
    """By SQL. One value; top-group: the groups, sorted."""
    base = sqlite3.connect(":memory:")
    for table in spec["tables"]:
        columns = ", ".join(f'"{name}"' for name in table["columns"])
        base.execute(f'CREATE TABLE "{table["name"]}" ({columns})')
        base.executemany(f'INSERT INTO "{table["name"]}" VALUES ({", ".join("?" * len(table["columns"]))})',
                         table["rows"])
    question, main = spec["question"], spec["tables"][0]["name"]
    source = f'"{main}"'
    if question["joined"]:
        site = spec["tables"][1]
        source += f' JOIN "{site["name"]}" USING ("{site["columns"][0]}")'
    where = " AND ".join(f'"{name}" {sign} ?' for name, sign, _ in question["where"]) or "1"
    limits = [limit for *_, limit in question["where"]]
    value, other, group = (f'"{question[part]}"' for part in ("value", "other", "group"))
    chosen = f"FROM {source} WHERE {where}"
    ask = question["ask"]
    if ask == "top-group":
        totals = f"SELECT {group} AS g, SUM({value}) AS s {chosen} GROUP BY {group}"
        rows = base.execute(f"SELECT g FROM ({totals}) WHERE s = (SELECT MAX(s) FROM ({totals}))", limits * 2)
        answer = sorted(row[0] for row in rows)
    elif ask == "mean":
        total, count = base.execute(f"SELECT SUM({value}), COUNT(*) {chosen}", limits).fetchone()
        answer = [str(Fraction(total, count))]
    elif ask == "above-mean":
        sql = f"SELECT COUNT(*) {chosen} AND {value} * (SELECT COUNT(*) {chosen}) > (SELECT SUM({value}) {chosen})"
        answer = [str(base.execute(sql, limits * 3).fetchone()[0])]
    else:
        what = {"count": "COUNT(*)", "sum": f"SUM({value})", "largest": f"MAX({value})",
                "range": f"MAX({value}) - MIN({value})", "product-sum": f"SUM({value} * {other})"}[ask]
        answer = [str(base.execute(f"SELECT {what} {chosen}", limits).fetchone()[0])]
    base.close()
    return answer


def solve_b(spec: Spec, language: str) -> list[str]:
    """By going over the rows."""
    question = spec["question"]
    rows = _chosen(spec["tables"], question)
    values = [row[question["value"]] for row in rows]
    ask = question["ask"]
    if ask == "top-group":
        totals: dict[str, int] = {}
        for row in rows:
            totals[row[question["group"]]] = totals.get(row[question["group"]], 0) + row[question["value"]]
        return sorted(name for name, total in totals.items() if total == max(totals.values()))
    mean = Fraction(sum(values), len(values))
    answer = {"count": len(values), "sum": sum(values), "largest": max(values), "mean": mean,
              "range": max(values) - min(values), "above-mean": sum(one > mean for one in values),
              "product-sum": sum(row[question["value"]] * row[question["other"]] for row in rows)}[ask]
    return [str(answer)]


def verify(spec: Spec, language: str, target: list[str], text: str) -> tuple[float, str]:
    said = final(text)
    if spec["question"]["ask"] == "top-group":
        latin = {zh: word for word, zh in _WORDS_ZH.items()}
        items = [re.sub(r" ?[(（].*", "", item) for item in read_items(said.replace("和", ","))]
        right = sorted(fold(latin.get(item, item)) for item in items) == sorted(map(fold, target))
    else:
        right = read_number(said) == Fraction(target[0])
    return (1.0, "") if right else (0.0, f"{said[:60]!r} is not the answer")


def effort(spec: Spec) -> int:
    """Rows to look at, as many times as there are conditions and a value to take."""
    question = spec["question"]
    return len(spec["tables"][0]["rows"]) * (1 + len(question["where"]) + question["joined"]) // 5
