"""Every family: two solvers agree, twins are twins, items differ, difficulty is difficulty, verifiers hold."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from moonbase.agents.tools.sandbox import find_bubblewrap
from moonbase.errors import UserError
from moonbase.evals.fresh import FAMILIES, agree, coding, generate, logic, scripted, table_questions, tool_use, verify
from moonbase.evals.fresh.itemset import Configuration, effort, problems
from moonbase.evals.fresh.problem import Problem, family_module

ROOT = Path(__file__).resolve().parents[2]
QUICK = tuple(name for name in FAMILIES if name not in ("code", "long"))
slow = pytest.mark.slow
"""The same with as many items as a claim wants; a few of them, in every other run, find what is broken."""
needs_sandbox = pytest.mark.skipif(find_bubblewrap()[0] is None, reason="bubblewrap does not work here")


def right(problem: Problem) -> str:
    return scripted.wording(problem, True, random.Random(0))


def wrong(problem: Problem) -> str:
    return scripted.wording(problem, False, random.Random(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("count", [25, pytest.param(300, marks=slow)])
def test_two_solvers_agree_on_hundreds_of_items(family: str, language: str, count: int) -> None:
    if family == "long":
        items = [generate(family, "agree", 1 + index % 3, index, language) for index in range(count // 5)]
        # 128,000 tokens, and 256,000.
        items += [generate(family, "agree", difficulty, 7, language) for difficulty in (4, 5)[: 1 + count // 100]]
    else:
        items = [generate(family, "agree", 1 + index % 5, index, language) for index in range(count)]
    assert [problem.id for problem in items if not agree(problem)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_item_is_the_same_again_and_another_under_another_seed_or_index(family: str) -> None:
    level = 1 if family == "long" else 3
    again = [generate(family, seed, level, index) for seed in ("one", "two") for index in range(8) for _ in range(2)]
    assert again[::2] == again[1::2]
    assert len({problem.identity for problem in again}) == 16
    assert len({problem.id for problem in again}) == 16
    assert generate(family, 7, level, 0) == generate(family, "7", level, 0)


def test_items_are_the_same_in_another_process() -> None:
    code = ("from moonbase.evals.fresh import generate, FAMILIES\n"
            "for family in FAMILIES:\n"
            "    for language in ('en', 'zh'):\n"
            "        p = generate(family, 'process', 2, 3, language); print(p.id, p.input_digest, p.target_digest)")
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={"PYTHONHASHSEED": "1", "PATH": ""}).stdout.splitlines()
    here = (generate(family, "process", 2, 3, language) for family in FAMILIES for language in ("en", "zh"))
    assert told == [f"{one.id} {one.input_digest} {one.target_digest}" for one in here]


@pytest.mark.parametrize("family", (*QUICK, "code"))
@pytest.mark.parametrize("count", [15, pytest.param(150, marks=slow)])
def test_a_set_has_no_doubles(family: str, count: int) -> None:
    chosen = list(problems(Configuration(families=(family,), count=count, languages=("en",)), "doubles"))
    assert len({problem.identity for problem in chosen}) == len(chosen) == 5 * count


def numbers_in(text: str) -> list[str]:
    """What a question is asked of, apart from numbering."""
    text = re.sub(r"(?m)^\d+\. ", "", text)
    return sorted(re.findall(r"\d+", text))


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_share_structure_and_numbers(family: str) -> None:
    for index in range(10):
        level = 1 + index % (2 if family == "long" else 5)
        one, other = (generate(family, "twins", level, index, language) for language in ("en", "zh"))
        assert (one.twin, other.twin) == (other.id, one.id) and one.item == other.item
        assert one.spec == other.spec
        assert len(re.findall(r"[\u4e00-\u9fff]", other.prompt)) > 15 and not re.search(r"[\u4e00-\u9fff]", one.prompt)
        if family in ("maths", "tables", "tools", "code"):
            told = [numbers_in(problem.prompt) for problem in (one, other)]
            # English words out a step ("by 3 modulo the length") that Chinese says once.
            assert set(told[0]) == set(told[1]), one.id
        if family in ("maths", "code", "gym", "long", "tools", "tables"):
            assert one.target == other.target


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_accuracy_falls_with_difficulty_for_a_weak_and_a_strong_solver(family: str) -> None:
    if family == "code" and find_bubblewrap()[0] is None:
        pytest.skip("bubblewrap does not work here")
    count, samples = {"code": (8, 1), "long": (4, 40), "wide": (30, 4)}.get(family, (50, 8))
    table = {}
    for strength in scripted.SLIP:
        for difficulty in range(1, 6):
            total = 0.0
            for index in range(count):
                problem = generate(family, "monotone", difficulty, index, "en" if index % 2 else "zh")
                if family == "code":
                    # Graded by the sandbox elsewhere; here the chance itself, so that hundreds of runs are not needed.
                    total += (1 - scripted.SLIP[strength]) ** effort(problem)
                    continue
                total += sum(verify(problem, scripted.answer(problem, strength, sample))[0] == 1.0
                             for sample in range(samples)) / samples
            table[strength, difficulty] = total / count
    for strength in scripted.SLIP:
        accuracies = [table[strength, difficulty] for difficulty in range(1, 6)]
        assert all(harder <= easier + 0.03 for easier, harder in itertools.pairwise(accuracies)), accuracies
        assert accuracies[0] - accuracies[-1] > 0.1, accuracies
    assert all(table["weak", level] < table["strong", level] for level in range(1, 6)), table


@pytest.mark.parametrize("family", (*QUICK, "long"))
@pytest.mark.parametrize("language", ["en", "zh"])
def test_right_answers_count_and_wrong_ones_do_not(family: str, language: str) -> None:
    for index in range(8 if family == "long" else 25):
        problem = generate(family, "grade", 1 + index % (2 if family == "long" else 5), index, language)
        assert verify(problem, right(problem)) == (1.0, ""), problem.id
        assert verify(problem, "Let me think.\n\n" + right(problem))[0] == 1.0
        score, remark = verify(problem, wrong(problem))
        assert score < 1.0 and remark, problem.id


HOSTILE = ("", " ", "\x00", "Answer:", "答案：", "Answer: " + "9" * 100_000, "Answer: 1e999999999", "[" * 50_000,
           "{" * 50_000,
           "\\boxed{" * 20_000, "|" * 100_000, "| a |\n| --- |\n" * 5_000, "Answer: " + "(" * 50_000, "\ud800",
           "½" * 1000,
           "```python\n" * 5_000, "Answer: " + "一" * 50_000, "Answer: " + "1/" * 50_000, '[{"name": 1}]',
           '[{"name": null}]',
           '{"name": "x", "arguments": "["}', '[{"function": []}]', "Answer: __import__('os')", "٣" * 100, "-" * 70_000,
           '[{"name": "a", "arguments": ' + "[" * 5_000 + "]}]")


@pytest.mark.parametrize("family", (*QUICK, "long"))
@pytest.mark.parametrize("count", [2, pytest.param(10, marks=slow)])
def test_no_answer_makes_a_verifier_raise_or_dawdle(family: str, count: int) -> None:
    for language in ("en", "zh"):
        for index in range(count):
            problem = generate(family, "hostile", 1 if family == "long" else 1 + 3 * index % 5, index, language)
            for text in HOSTILE:
                start = time.process_time()
                score, remark = verify(problem, text)
                assert score is not None and score < 1.0, (problem.id, text[:30])
                assert len(remark) <= 300 and time.process_time() - start < 2.0, text[:30]


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_at_once_is_no_answer(family: str) -> None:
    """Guessing many answers never pays."""
    if family in ("code", "tools", "wide"):
        return
    for index in range(20):
        problem = generate(family, "shotgun", 1, index)
        text = "Answer: " + ", ".join([*map(str, range(300)), right(problem).removeprefix("Answer: ")])
        assert verify(problem, text)[0] == 0.0


@pytest.mark.parametrize("family", ["maths", "logic", "gym", "long"])
def test_no_prompt_tells_its_answer(family: str) -> None:
    for index in range(60 if family != "long" else 5):
        problem = generate(family, "leak", 1 if family == "long" else 1 + index % 5, index)
        assert "nswer: " not in problem.prompt.replace('"Answer: …"', "") or family == "gym"
        if family == "maths":
            assert problem.target.lstrip("-") not in re.findall(r"(?<![\d/])\d+(?:/\d+)?(?![\d/])", problem.prompt)
        if problem.kind == "order":
            assert ", ".join(problem.target) not in problem.prompt
        if family == "long":
            assert problem.prompt.count(problem.target) == 1


def test_specs_hold_no_answer() -> None:
    """The prompt is rendered from the spec; it could not tell what the spec does not know."""
    for family in ("maths", "logic", "tables", "wide"):
        for index in range(15):
            problem = generate(family, "spec", 1 + index % 5, index)
            assert not {"target", "answer", "solution", "result", "truth", "seats"} & problem.spec.keys()


def test_bad_arguments_are_said() -> None:
    for arguments in (("poetry", 1, 1, 0, "en"), ("maths", 1, 6, 0, "en"), ("maths", 1, 1, 0, "fr")):
        with pytest.raises(UserError):
            generate(*arguments)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "long"])
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=slow)])
def test_a_thousand_items_take_less_than_twenty_seconds(family: str, count: int) -> None:
    family_module(family)
    generate(family, "speed", 1, 0)  # what is made once
    start = time.process_time()
    for index in range(count):
        generate(family, "speed", 1 + index % 5, index)
    # Of this process alone, whatever else the machine is doing.
    seconds = time.process_time() - start
    print(f"\n{count} items of {family}: {seconds:.1f} s")
    assert seconds < count / 50


# Mathematics and logic


def test_maths_accepts_equal_numbers() -> None:
    problem = next(one for index in range(99) if "/" in (one := generate("maths", "forms", 3, index)).target)
    value = Fraction(problem.target)
    top, bottom = abs(value.numerator), value.denominator
    sign = "-" if value < 0 else ""
    for text in (f"{sign}{top}/{bottom}", f"{sign}{3 * top}/{3 * bottom}",
                 rf"\boxed{{{sign}\frac{{{top}}}{{{bottom}}}}}",
                 f"{'负' if sign else ''}{bottom}分之{top}"):
        assert verify(problem, f"Answer: {text}")[0] == 1.0, text
    for text in (f"{sign}{top + 1}/{bottom}", f"{'' if sign else '-'}{top}/{bottom}", f"{float(value):.3f}"):
        assert verify(problem, f"Answer: {text}")[0] == 0.0, text


def test_every_clue_of_a_logic_puzzle_is_needed_and_none_is_missing() -> None:


    for index in range(30):
        spec = generate("logic", "clues", 2, index).spec
        if spec["kind"] != "order":
            continue

        def solutions(clues: list, size: int = len(spec["people"])) -> int:
            return sum(all(logic._holds(clue, seats) for clue in clues)
                       for seats in itertools.permutations(range(size)))

        assert solutions(spec["clues"]) == 1
        if len(spec["clues"]) > 2:
            assert all(solutions([one for one in spec["clues"] if one is not clue]) > 1 for clue in spec["clues"])


def test_the_order_of_knights_does_not_matter_and_of_seats_does() -> None:
    knights = next(p for i in range(99) if (p := generate("logic", 1, 3, i)).kind == "knights" and len(p.target) > 1)
    assert verify(knights, "Answer: " + " and ".join(reversed(knights.target)))[0] == 1.0
    order = next(p for i in range(99) if (p := generate("logic", 1, 3, i)).kind == "order")
    assert verify(order, "Answer: " + " -> ".join(order.target))[0] == 1.0
    assert verify(order, "Answer: " + ", ".join(reversed(order.target)))[0] == 0.0


# Tables


def test_tables_come_as_text_html_and_picture_and_say_the_same() -> None:
    import pandas

    forms = set()
    for index in range(40):
        problem = generate("tables", "forms", 2, index)
        table, form = problem.spec["tables"][0], problem.spec["form"]
        forms.add(form)
        if form == "csv":
            lines = problem.prompt.split("\n\n")[0].split("\n")[1:]
            rows = [line.split(",") for line in lines]
        elif form == "html":
            rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in problem.prompt.split("\n")
                    if line.startswith("<tr>")]
        elif form == "markdown":
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in problem.prompt.split("\n")
                    if line.startswith("|") and "---" not in line]
        else:
            assert problem.png()[:8] == b"\x89PNG\r\n\x1a\n" and problem.png() == problem.png()
            continue
        assert rows == [list(map(str, row)) for row in (table["columns"], *table["rows"])]
        question = problem.spec["question"]
        if question["joined"] or question["ask"] not in ("sum", "mean", "largest", "count"):
            continue
        frame = pandas.DataFrame(table["rows"], columns=table["columns"])
        for name, sign, limit in question["where"]:
            frame = frame[frame[name] == limit] if sign == "=" else frame[frame[name] >= limit]
        value = {"sum": frame[question["value"]].sum(), "largest": frame[question["value"]].max(), "count": len(frame),
                 "mean": frame[question["value"]].mean()}[question["ask"]]
        assert float(Fraction(problem.target[0])) == pytest.approx(float(value))
    assert forms == set(table_questions.FORMS)


def test_a_group_is_accepted_in_either_language() -> None:
    problem = next(p for i in range(200) if (p := generate("tables", 3, 4, i, "zh")).kind == "top-group")
    english = problem.target[0]
    assert verify(problem, f"答案：{english}")[0] == 1.0
    assert verify(problem, f"答案：{table_questions._WORDS_ZH[english]}")[0] == 1.0
    assert verify(problem, f"答案：{table_questions._WORDS_ZH[english]}（{english}）")[0] == 1.0


# Tools


def test_other_calls_that_lead_to_the_same_end_are_right() -> None:
    for index in range(60):
        problem = generate("tools", "order", 4, index)
        calls = tool_use.calls_of(problem.spec)
        assert verify(problem, json.dumps(calls[::-1]))[0] == 1.0
        as_openai = [{"type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}
                     for call in calls]
        assert verify(problem, json.dumps(as_openai))[0] == 1.0
        assert verify(problem, json.dumps(calls[1:]))[0] == 0.0
        assert verify(problem, json.dumps([{**calls[0], "name": "no_such"}, *calls[1:]]))[0] == 0.0
        extra = {"name": calls[0]["name"], "arguments": {**calls[0]["arguments"], "force": True}}
        assert verify(problem, json.dumps([extra, *calls[1:]]))[0] == 0.0


def test_a_refused_call_changes_nothing() -> None:
    for index in range(40):
        spec = generate("tools", "refused", 5, index).spec
        desk, key = tool_use.Desk(spec), spec["keys"]["id"]
        for call in tool_use.calls_of(spec):
            for bad in ({key: "nothing"}, {}, None, {**call["arguments"], key: 7}, {**call["arguments"], "more": 1},
                        {name: value if name == key else "x" * 99 for name, value in call["arguments"].items()}):
                before = json.dumps(desk.state)
                if bad == call["arguments"]:
                    continue
                with pytest.raises(ValueError):
                    desk.call(call["name"], bad)
                assert json.dumps(desk.state) == before
            desk.call(call["name"], call["arguments"])
        assert desk.state == tool_use.solve_b(spec, "en") and desk.done == tool_use.calls_of(spec)


# Code


def test_a_repair_task_is_broken_and_only_there() -> None:
    found = 0
    for index in range(200):
        problem = generate("code", "bugs", 1 + index % 5, index)
        if problem.kind != "repair":
            continue
        found += 1
        space: dict = {}
        exec(coding.broken_source(problem.spec), space)
        out = []
        for case in problem.spec["cases"]:
            try:
                out.append(space[problem.spec["name"]](list(case)))
            except Exception:
                out.append(None)
        assert out != problem.target
        assert coding.broken_source(problem.spec) in problem.prompt
        assert coding.source(problem.spec) not in problem.prompt
    assert found > 50


@needs_sandbox
def test_programs_are_run_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    # What never ends is waited for.
    monkeypatch.setattr(coding, "LIMITS", dataclasses.replace(coding.LIMITS, wall_seconds=2, cpu_seconds=1))
    problem = generate("code", "run", 3, 1)
    good, name = coding.source(problem.spec), problem.spec["name"]
    assert verify(problem, f"Here:\n```python\n{good}\n```")[0] == 1.0
    bad = {
        "no code": "I would sort the list.",
        "changes its argument": f"{good.replace(name, 'inner')}\ndef {name}(xs):\n    out = inner(xs)\n    "
                                "xs.append(1)\n    return out",
        "not the same twice": f"seen = []\n{good.replace(name, 'inner')}\ndef {name}(xs):\n    seen.append(1)\n"
                              "    return inner(xs) if len(seen) % 2 else [1]",
        "raises": f"def {name}(xs):\n    raise KeyError(1)",
        "wrong name": good.replace(name, "other"),
        "floats": f"{good.replace(name, 'inner')}\ndef {name}(xs):\n    return [float(x) for x in inner(xs)]",
        "never ends": f"def {name}(xs):\n    while True: pass",
        "prints and leaves": f"import os\nprint('[]', flush=True)\nos._exit(0)\ndef {name}(xs):\n    return xs",
        "syntax": f"def {name}(xs:\n    return xs",
        "memory": f"def {name}(xs):\n    return [0] * 10**10",
        "equal to everything": f"class A(list):\n    def __eq__(self, o): return True\n"
                               f"def {name}(xs):\n    return A([1])",
        "reads": f"def {name}(xs):\n    return list(open('/etc/passwd'))",
    }
    for what, code in bad.items():
        score, remark = verify(problem, f"```python\n{code}\n```" if what != "no code" else code)
        assert score == 0.0 and remark, what


@needs_sandbox
def test_a_verifier_works_inside_a_running_loop() -> None:
    import asyncio

    problem = generate("code", "loop", 1, 1)

    async def inside() -> float | None:
        return verify(problem, right(problem))[0]

    assert asyncio.run(inside()) == 1.0


# Long context


@pytest.mark.parametrize(("language", "text", "asked"), [
    ("en", "Ben handed the red parcel to Cal. The red parcel that Dan kept bears the label XYZ-123. Fen slept.\n\n"
           "Cal handed the blue parcel to Eva. Ada handed the red parcel to Ben. Cal handed the red parcel to Dan.\n\n"
           "The red parcel that Eva kept bears the label ABC-999. The blue parcel that Eva kept bears the label Q-5.",
     "\n\nQuestion: In the beginning Ada had a red parcel, which was then handed on."),
    ("zh", "Ben 把红色包裹交给了 Cal。Dan 留下的红色包裹上写着标签 XYZ-123。Fen 睡了。\n\n"
           "Cal 把蓝色包裹交给了 Eva。Ada 把红色包裹交给了 Ben。Cal 把红色包裹交给了 Dan。\n\n"
           "Eva 留下的红色包裹上写着标签 ABC-999。Eva 留下的蓝色包裹上写着标签 Q-5。",
     "\n\n问题：最初，Ada 拿着一个红色包裹，之后它在人们手中依次转交。")])
def test_solvers_of_long_texts_read_words_and_nothing_else(language: str, text: str, asked: str) -> None:
    from moonbase.evals.fresh.long_context import read_backwards, read_forwards

    paragraphs = [f"{part}\n\n" for part in text.split("\n\n")]
    assert read_forwards(text + asked, language) == read_backwards(paragraphs, asked, language) == "XYZ-123"
    lost = text.replace("Ben handed", "Ben showed").replace("Ben 把", "Ben 将")
    with pytest.raises(ValueError):
        read_forwards(lost + asked, language)
    with pytest.raises(AssertionError):
        read_backwards([lost], asked, language)


def test_long_texts_are_as_long_as_they_say_and_stream() -> None:
    import tracemalloc

    from moonbase.evals.fresh import long_context

    for difficulty, tokens in enumerate(long_context.TOKENS, 1):
        problem = generate("long", "length", difficulty, 0)
        assert 0.95 < len(problem.prompt) / (tokens * long_context.CHARACTERS_PER_TOKEN["en"]) < 1.1
    spec = problem.spec
    tracemalloc.start()
    assert long_context.solve_b(spec, "en") == problem.target
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(problem.prompt) / 4
