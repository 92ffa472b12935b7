"""Twins of public questions, and the gap between both: found where memory is planted, not found where there is none."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from pathlib import Path

import pytest

from moonbase.evals.figures import Table, figures_of
from moonbase.evals.fresh.contamination import contamination_index, index_of
from moonbase.evals.fresh.number_twins import make_twin, template
from moonbase.evals.fresh.problem import Draw
from moonbase.evals.records import Record, digest
from moonbase.evals.sources import read_rows
from moonbase.evals.suite import load_suite

BAKER = ("A baker sells 36 rolls at 3 marks each and twice as many buns at 5 marks each. How much is that in all?",
         "36*3 = <<36*3=108>>108. 36*2 = <<36*2=72>>72. 72*5 = <<72*5=360>>360. <<108+360=468>>468\n#### 468")


def draw(number: int) -> Draw:
    return Draw.of("test", "twins", number)


def test_a_twin_has_the_words_and_steps_of_its_question_and_other_numbers() -> None:
    seen = set()
    for number in range(30):
        twin = make_twin(*BAKER, draw(number))
        rolls, mark, more = (twin.numbers[old] for old in (36, 3, 5))
        assert twin.question == (f"A baker sells {rolls} rolls at {mark} marks each and twice as many buns at {more} "
                                 "marks each. How much is that in all?")
        assert twin.answer == rolls * mark + 2 * rolls * more != 468 and mark < more < rolls
        assert 36 not in (rolls, mark, more) and rolls != 36 and mark != 3 and more != 5
        seen.add(twin.question)
    assert len(seen) > 10 and make_twin(*BAKER, draw(1)) == make_twin(*BAKER, draw(1))


@pytest.mark.parametrize(("question", "worked"), [
    # Its own steps do not give the published answer; a number that can be two things; one that no step explains.
    (BAKER[0], BAKER[1].replace("#### 468", "#### 469")),
    ("Ann has 8 pens and Bob has 8 books. How many in all?", "<<8+8=16>>16\n#### 16"),
    ("Ann has 15 pens and gives away some.", "<<15-4=11>>11\n#### 11"),
    # The second five is that of the weekdays; the six is four friends, Ann and Bob.
    ("Ann teaches 5 classes on every weekday. How many in all?", "<<5*5=25>>25\n#### 25"),
    ("Ann, Bob and 4 friends get 3 pens each. How many?", "<<6*3=18>>18\n#### 18"),
    ("No steps are told of 15 pens.", "#### 15"), ("Nothing.", "#### x"), ("Ann has 15 pens.", "<<15**9=1>>\n#### 1"),
])
def test_what_is_in_doubt_has_no_twin(question: str, worked: str) -> None:
    assert make_twin(question, worked, draw(0)) is None


def test_what_stands_in_words_too_stays() -> None:
    twin = make_twin("In the first 4 days Ann ran 9 miles a day, and 6 miles more after those four days.",
                     "<<4*9=36>>36 <<36+6=42>>42\n#### 42", draw(0))
    assert twin.numbers.keys() == {9, 6} and twin.question.startswith("In the first 4 days")


def test_as_many_as_twins_stay_twins() -> None:
    twin = make_twin("Ann knits 4 caps and 9 scarves for each of her 3 grandchildren, who are triplets. How many?",
                     "<<4+9=13>>13 <<13*3=39>>39\n#### 39", draw(0))
    assert twin.numbers.keys() == {4, 9} and "her 3 grandchildren" in twin.question


def test_lines_whose_published_steps_are_wrong_are_left_out_and_nothing_else_changes(shared_data: Path) -> None:
    pytest.importorskip("inspect_ai")
    from moonbase.evals.tasks.twins_task import public_twins

    suite = load_suite("contamination")
    (spec,) = suite.tasks
    wrong = {"650", "1310"}
    asked = {}
    for name, left_out in (("suite", spec.params["leave_out"]), ("all", [])):
        task = spec.model_copy(update={"params": spec.params | {"leave_out": left_out, "count": 500}})
        asked[name] = [(sample.metadata["item"], sample.input) for sample in
                       public_twins(suite, task, shared_data, 0, None, False).dataset]
    assert wrong <= {item for item, _ in asked["all"]}
    assert asked["suite"] == [one for one in asked["all"] if one[0] not in wrong]


def test_hundreds_of_public_questions_have_a_twin(shared_data: Path) -> None:
    """And their steps are done once more here, in the words of the published solution with other numbers."""
    import re

    rows = list(read_rows(shared_data / "gsm8k" / "test.jsonl.gz"))[:400]
    found = [(row, make_twin(row["question"], row["answer"], draw(place))) for place, row in enumerate(rows)]
    twins = [(row, twin) for row, twin in found if twin]
    assert len(twins) > 0.3 * len(rows)
    for row, twin in twins:
        known = {Decimal(old): Decimal(new) for old, new in twin.numbers.items()}
        for expression, result in re.findall(r"<<(.+?)=(.+?)>>", row["answer"]):
            said = "".join(f"Decimal('{known.get(Decimal(part), part)}')" if part[-1:].isdigit() else part
                           for part in re.split(r"(\d+(?:\.\d+)?|\.\d+)", expression))
            known[Decimal(result.replace(",", ""))] = eval(said, {"Decimal": Decimal})
        # Thirds have no end in decimals.
        assert round(known[Decimal(row["answer"].rpartition("####")[2].strip().replace(",", ""))], 6) == twin.answer
        assert template(row["question"], row["answer"]) is not None


def evaluation(memory: float) -> list[Record]:
    """Of a model that solves half of all questions, and remembers so many of the public ones."""
    records, model = [], "mockllm/model"
    for item in range(200):
        for origin in ("public", "fresh"):
            chance = random.Random(f"{model}/{item}/{origin}")
            right = chance.random() < 0.5 or (origin == "public" and chance.random() < memory)
            records.append(Record(
                suite="contamination", task="gsm8k-twins", item=str(item), model=model,
                condition={"language": "en", "origin": origin}, input_digest=digest(f"{item}/{origin}"),
                target_digest=digest(""), output="", output_digest=digest(""), scores={"accuracy": float(right)}))
    return records


@pytest.mark.parametrize(("memory", "found"), [(0.6, True), (0.0, False)])
def test_planted_memory_is_found_and_an_honest_model_is_not_blamed(memory: float, found: bool) -> None:
    from moonbase.evals.comparison import hypotheses_of

    suite, records = load_suite(Path("moonbase/evals/suites/contamination.yaml").resolve()), evaluation(memory)
    table = Table.of(records)
    (gap,) = [figure for figure in figures_of(suite, table)
              if figure.spec.function == "contamination" and not figure.id.startswith("hypothesis/")]
    index = index_of(records)
    assert (gap.n, index.n, index.unpaired) == (200, 200, 0)
    assert (gap.value, gap.low, gap.high) == pytest.approx((index.index, index.low, index.high))
    assert (gap.low > 0) is found is index.suspicious
    (judged,) = hypotheses_of(suite, table)
    assert (judged.verdict, judged.statement_is) == (("worse", "supported") if found else ("undecided", "undecided"))
    assert judged.figure.value == pytest.approx(gap.value)


def test_honest_models_are_blamed_no_oftener_than_the_interval_says() -> None:
    blamed = 0
    for number in range(200):
        draws = random.Random(number)
        public, fresh = ({str(item): float(draws.random() < 0.5) for item in range(60)} for _ in range(2))
        blamed += contamination_index(public, fresh).suspicious
    # 2.5% of 200 are 5; more than 12 come once in 500 times.
    assert blamed <= 12


@pytest.mark.slow
def test_the_gap_stands_in_the_report(shared_data: Path, tmp_path: Path) -> None:
    """Through Inspect: a model that knows the public answers by heart and solves nothing else."""
    pytest.importorskip("inspect_ai")
    from inspect_ai import eval as inspect_eval
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from moonbase.evals.collect import collect
    from moonbase.evals.evaluation import summarise
    from moonbase.evals.run import settle
    from moonbase.evals.tasks.twins_task import public_twins

    suite = load_suite(Path("moonbase/evals/suites/contamination.yaml").resolve())
    task = public_twins(suite, suite.tasks[0], shared_data, 0, 12, False)
    by_heart = {sample.input: sample.target for sample in task.dataset if sample.metadata["condition"]["origin"]
                == "public"}

    def say(messages, tools, tool_choice, config) -> ModelOutput:
        output = ModelOutput.from_content("mockllm/model", by_heart.get(messages[0].text, "I do not know."))
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return output

    settle(suite, ["mockllm/model"], tmp_path, seed=0, limit=12)
    inspect_eval(task, model=get_model("mockllm/model", custom_outputs=say, memoize=False),
                 log_dir=str(tmp_path / "logs"), display="none")
    collect(suite, ["mockllm/model"], tmp_path / "logs", tmp_path, {})
    summarise(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    (gap,) = [figure for figure in results["figures"] if figure["id"].endswith("accuracy public minus fresh")]
    assert gap["value"] == 1.0 and gap["n"] == 12 and gap["low"] > 0.5
    assert gap["text"].replace("-", "−") in (tmp_path / "report.html").read_text()
