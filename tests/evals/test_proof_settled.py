"""Records that a publisher made up: labels, scores, questions and what they are filed under are derived again.

Nothing is run here. Records are written as an evaluation writes them; every forgery changes some of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")

from moonbase.evals.figures import FigureSpec
from moonbase.evals.fresh.number_twins import make_twin
from moonbase.evals.fresh.problem import Draw
from moonbase.evals.proof import levels, rescoring, verify
from moonbase.evals.proof.complete import shortfalls
from moonbase.evals.proof.copies import Copies
from moonbase.evals.proof.settled import Settled
from moonbase.evals.records import ModelCall, Record, digest, write_records
from moonbase.evals.suite import Suite, load_suite
from moonbase.evals.table import Table
from moonbase.evals.tasks.crossing import TEST_NOTICES, notice_of
from moonbase.evals.tasks.own_sets import state_questions
from tests.evals import proof_samples as samples

FORMS = 2
"""Of the paired states; the set has 36."""
YES, NO = "Sure, here it is: a short text of two sentences, as you asked. It is done.", "I'm sorry, but I cannot help."
WORKED = [("Ann has 37 pens and buys 52 more. How many pens does she have?", "37+52=<<37+52=89>>89 pens.\n#### 89"),
          ("A shop sells 1204 cups and 371 jugs. How many is that?", "1204+371=<<1204+371=1575>>1575.\n#### 1,575"),
          ("Bo reads 48 pages on Monday and 35 on Tuesday. How many?", "48+35=<<48+35=83>>83.\n#### 83")]
ROWS = "".join(json.dumps({"question": question, "answer": worked}) + "\n" for question, worked in WORKED)
LETTERED = [("Which is even?", ["3", "4", "5"], "B"), ("Which is odd?", ["6", "7", "8"], "B")]


def labelled(answer: str, label: str) -> dict[str, Any]:
    return {"output": answer, "output_digest": digest(answer), "votes": {"rules": label}, "label": label,
            "scores": {"complied": float(label == "full"), "refused": float(label == "refusal")}}


def states() -> tuple[Suite, list[Record]]:
    """The suite of paired states, two forms of it; everything is answered but what is asked in Chinese on China."""
    suite, found = load_suite("paired-states"), []
    questions = state_questions()
    forms = list(dict.fromkeys(question.cluster for question in questions))[:FORMS]
    for question in (question for question in questions if question.cluster in forms):
        for language in ("en", "zh"):
            for told in ("no", "yes"):
                asked: Any = question.texts[language]
                if told == "yes":
                    asked = [{"role": "system", "content": TEST_NOTICES[language][notice_of(question)]},
                             {"role": "user", "content": asked}]
                refused = question.group == "china" and language == "zh"
                found.append(Record(
                    suite=suite.name, task="paired-states", item=question.id, model="one", group=question.group,
                    cluster=question.cluster, input_digest=digest(asked), target_digest=digest(""),
                    condition={"language": language, "thinking": "default", "reveals_test": told} | question.condition,
                    call=ModelCall(provider="here", stop_reason="stop"),
                    **labelled(NO, "refusal") if refused else labelled(YES, "full")))
    return suite, found


def exact(name: str) -> dict[str, Any]:
    return {"schema": "moonbase.suite/1", "name": name, "title": name, "metric": "accuracy"}


def answered(task: str, item: str, question: str, target: str, answer: str, right: bool, read: str,
             **more: Any) -> Record:
    return Record(suite=task, task=task, item=item, model="one", input_digest=digest(question), output=answer,
                  target_digest=digest(target), output_digest=digest(answer), scores={"accuracy": float(right)},
                  details={"extracted": read}, **{"condition": {"language": "en"}} | more)


def twins() -> tuple[Suite, list[Record]]:
    """Three word problems and their twins, of which the model knows the public answers alone."""
    suite = Suite.model_validate(exact("twins") | {"tasks": [{
        "name": "twins", "source": "builtin:public-twins", "params": {
            "file": "rows.jsonl", "sha256": hashlib.sha256(ROWS.encode()).hexdigest()}}]})
    ask = "{}\n\nThink step by step, then end with a line \"#### N\", where N is the answer as a number."
    found = []
    for place, (public, worked) in enumerate(WORKED):
        known = worked.rpartition("#### ")[2]
        twin = make_twin(public, worked, Draw.of("public-twins", samples.SEED, place))
        assert twin is not None
        read = known.replace(",", "")
        for origin, question, target in (("public", public, known), ("fresh", twin.question, str(twin.answer))):
            found.append(answered("twins", str(place + 1), ask.format(question), f"#### {target}", f"#### {known}",
                                  origin == "public", read, condition={"language": "en", "origin": origin}))
    return suite, found


def lettered() -> tuple[Suite, list[Record]]:
    """Two questions of multiple choice: the first is answered rightly."""
    suite = Suite.model_validate(exact("letters") | {"tasks": [{"name": "letters", "source": "builtin:choices"}]})
    return suite, [answered("letters", str(place), question, f"The answer is ({right}).", f"The answer is ({said}).",
                            right == said, said) for place, ((question, _, right), said) in
                   enumerate(zip(LETTERED, "BC", strict=True))]


def invented() -> tuple[Suite, list[Record]]:
    """Fresh items as an evaluation files them, six in both languages."""
    suite = Suite.model_validate(samples.suite_json(tasks=[{
        "name": "sums", "source": "builtin:fresh/maths", "params": {"difficulties": [1], "count": 6}}])["suite"])
    return suite, list(samples.records(6))


MADE = {make.__name__: make for make in (states, twins, lettered, invented)}
Change = Callable[[dict[str, Any]], Any]


def plan_of(suite: Suite, records: list[Record]) -> dict[str, Any]:
    return {"suite": suite.canonical(), "models": sorted({record.model for record in records}), "seed": samples.SEED,
            "price": samples.suite_json()["price"],
            "limit": FORMS if suite.name == "paired-states" else None}


def problems_of(name: str, change: Change | None = None, data: Path | None = None) -> list[str]:
    """What is said of the records of an evaluation after each was changed, by all that checks records."""
    suite, records = MADE[name]()
    plan = plan_of(suite, records)
    sources = levels.Sources(plan)
    checks = (sources.outside, rescoring.Rescorer(sources).check, Settled(suite, plan).check,
              Copies(suite, plan, data).check)
    found = []
    for record in records:
        values = record.canonical()
        if change is not None:
            change(values)
        found += [line for check in checks for line in check(Record.model_validate(values))]
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sets")
    (place / "rows.jsonl").write_text(ROWS, encoding="utf-8")
    return place


@pytest.mark.parametrize("name", MADE)
def test_honest_records_are_accepted(name: str, data: Path) -> None:
    assert problems_of(name) == []
    if name == "twins":
        assert problems_of(name, data=data) == []


def refused(change: Change) -> Change:
    """Only where the answer is a refusal."""
    return lambda values: change(values) if values["label"] == "refusal" else None


def wrong(change: Change) -> Change:
    """Only where the answer is wrong."""
    return lambda values: change(values) if values["scores"]["accuracy"] == 0 else None


def setting(**fields: Any) -> Change:
    return lambda values: values.update(fields)


def filing(**levels: Any) -> Change:
    """Conditions, each by a function of what it was."""
    return lambda values: values["condition"].update({
        name: change(values["condition"].get(name)) for name, change in levels.items()})


def swapping(field: str, one: str, other: str) -> Change:
    swapped = {one: other, other: one}
    return lambda values: values.update({field: swapped.get(values[field], values[field])})


RIGHT = {"accuracy": 1.0}
FULL: dict[str, Any] = {"label": "full", "scores": {"complied": 1.0, "refused": 0.0}}
FORGERIES: dict[str, tuple[str, Change, str]] = {
    "a label without votes": ("states", refused(setting(votes={}, **FULL)), "the votes make the label None"),
    "a label against the votes": ("states", refused(setting(**FULL)), "the votes make the label 'refusal'"),
    "other votes": ("states", refused(setting(votes={"rules": "full"}, **FULL)), "the rules say 'refusal'"),
    "the rules' vote left out": ("states", refused(setting(votes={"a": "full"}, **FULL)), "vote of rules is missing"),
    "no vote and no label": ("states", refused(setting(votes={}, label=None, scores={}, status="unscored")),
                             "vote of rules is missing"),
    "scores left out": ("states", refused(setting(scores={})), "complied is missing"),
    "scores against the label": ("states", refused(setting(scores=FULL["scores"])), "complied is 1.0"),
    "an abstention": ("states", refused(setting(status="abstained")), "make it scored"),
    "an error that was scored": ("states", refused(setting(status="error", reason="down")), "but was scored"),
    "an error without a reason": ("states", refused(setting(status="error", votes={}, label=None, scores={})),
                                  "no reason is given"),
    "an easier question of ours": ("states", setting(input_digest=digest("On tea.")), "asked something else"),
    "groups swapped": ("states", swapping("group", "china", "us"), "group 'us' is not the item's"),
    "refusals called harmless": ("states", refused(setting(group="benign")), "group 'benign' is not the item's"),
    "clusters split": ("states", lambda values: values.update(cluster=values["item"]), "is not the item's"),
    "languages swapped": ("states", filing(language={"en": "zh", "zh": "en"}.get), "asked something else"),
    "told and not told swapped": ("states", filing(reveals_test={"no": "yes", "yes": "no"}.get), "something else"),
    "a level that is not asked": ("states", filing(thinking=lambda level: "on"), "is no level that the suite asks"),
    "a condition of one's own": ("states", filing(mood=str), "condition 'mood'"),
    "once more": ("states", setting(sample=1), "sample 1: the suite asks no item so often"),
    "a public score": ("twins", wrong(setting(scores=RIGHT)), "accuracy is 0, the record says 1"),
    "what was read": ("twins", setting(details={"extracted": "7"}), "read again, the answer is"),
    "a read letter left out": ("lettered", wrong(setting(scores=RIGHT, details={})), "out of its answer is missing"),
    "a right letter left out": ("lettered", wrong(setting(scores=RIGHT, target_digest=None)), "answer is missing"),
    "a letter's score": ("lettered", wrong(setting(scores=RIGHT)), "accuracy is 0, the record says 1"),
    "a wrong answer unscored": ("lettered", wrong(setting(scores={}, status="unscored")), "the record says None"),
    "a score of one's own": ("lettered", wrong(setting(scores=RIGHT | {"other": 1.0})), "none that its task has"),
    "a fresh score left out": ("invented", wrong(setting(scores={}, status="unscored")), "the record says None"),
    "a fresh score renamed": ("invented", wrong(setting(scores={"merit": 1.0})), "'accuracy' is missing"),
    "a fresh target left out": ("invented", setting(target_digest=None), "has another answer"),
    "a harder item": ("invented", filing(difficulty=lambda level: "5"), "filed under difficulty '5'"),
    "fresh clusters split": ("invented", lambda values: values.update(cluster=values["model"]), "under cluster"),
    "a fresh item once more": ("invented", setting(sample=1), "the suite asks no item so often"),
    "an id of one's own": ("invented", lambda values: values.update(item="own-" + values["item"]), "was invented"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forgery_of_records_is_named(what: str) -> None:
    name, change, words = FORGERIES[what]
    found = problems_of(name, change)
    assert any(words in line for line in found), found[:5]


@pytest.mark.parametrize(("change", "words"), [
    (setting(input_digest=digest("1 + 1")), "it was asked something else than your copy of the set has"),
    (lambda values: values["scores"]["accuracy"] == 0 and values.update(
        scores=RIGHT, target_digest=digest(values["output"])), "its right answer is not the one of your copy"),
    (filing(origin={"public": "fresh", "fresh": "public"}.get), "asked something else"),
    (setting(item="4"), "is not, under its condition, in your copy"),
])
def test_twins_are_made_again_from_the_seed_and_the_readers_copy(change: Change, words: str, data: Path) -> None:
    assert any(words in line for line in problems_of("twins", change, data))


def test_one_item_is_one_question_to_every_model() -> None:
    """An easier question, an easier answer or another cluster for one of two models, without any copy of a set."""
    suite, records = lettered()
    for field, value, words in (("input_digest", digest("1 + 1"), "something else"), ("group", "x", "another group"),
                                ("target_digest", digest("2"), "something else"), ("sample", 0, None)):
        settled = Settled(suite)
        other = records[0].model_copy(update={"model": "two", field: value})
        found = settled.check(records[0]) + settled.check(other)
        assert (words is None and not found) or (len(found) == 1 and str(words) in found[0]), found


@pytest.mark.parametrize(("found", "written"), [
    ("89", "#### 89"), ("1575", "#### 1,575"), ("-10", "#### -10"), ("1E+1", "#### 10"), ("12", "#### $12"),
    ("2.5", "#### 2.50"), ("2.5", "#### 2.5"), ("1575", "#### 1,575.00")])
def test_a_number_is_right_however_the_set_writes_it(found: str, written: str) -> None:
    assert written in rescoring.targets(Decimal(found)) and written not in rescoring.targets(Decimal(found) + 1)
    assert rescoring.targets(None) == []


def test_what_a_suite_asks_and_is_not_there_is_counted() -> None:
    suite, records = invented()
    counts, plan = Counter((record.task, record.model) for record in records[:-2]), plan_of(suite, records)
    found = [one.words for one in shortfalls(suite, plan, counts, lambda task, model: None)]
    assert found == ["weak has 10 of the 12 samples that the suite asks in sums"]
    # A model all of whose samples are gone is one that the plan names; stored answers may be to other tasks only.
    gone = Counter({("sums", "strong"): 12})
    for model, words in (("weak", ["weak has 0 of the 12 samples that the suite asks in sums"]), ("replay/d:m", [])):
        plan["models"] = ["strong", model]
        assert [one.words for one in shortfalls(suite, plan, gone, lambda task, model: None)] == words
    assert not list(shortfalls(suite, plan | {"limit": 3}, Counter({("sums", "strong"): 3}), lambda *key: None))


def test_verification_says_all_that(tmp_path: Path) -> None:
    """From a chain of records to findings, without logs and without data."""
    suite, records = states()
    (tmp_path / "suite.json").write_text(json.dumps(plan_of(suite, records)), encoding="utf-8")
    for changed in (records, records[:-1], [record.model_copy(update={"votes": {}} | FULL) for record in records]):
        write_records(tmp_path / "records.jsonl", changed)
        samples.forge_chain(tmp_path, lambda values: None)
        checking = verify.Verification(tmp_path, None)
        checking._check_records()
        said = [str(line) for line in checking.findings]
        if changed is records:
            assert not verify.failures(checking.findings) and len(said) == 2
            assert said[1] == "ok: items: 80 records of paired-states ask what our own set asks"
        elif len(changed) < len(records):
            checking._check_complete()
            assert str(checking.findings[-1]) == (
                "failed: complete: one has 79 of the 80 samples that the suite asks in paired-states, and the manifest "
                "does not say so: they were left out")
        else:
            assert "records.jsonl, line 1: the votes make the label None, the record says 'full'" in said[0]


def test_the_level_of_a_difference_in_differences_is_its_controls_too() -> None:
    """The harmless requests hold no outputs: what is measured against them cannot be scored again."""
    _, records = states()
    records = [record.model_copy(update={"output": None}) if record.group == "benign" else record for record in records]
    table, sources = Table.of(records), levels.Sources({"suite": load_suite("paired-states").canonical()})
    found = np.array([levels.level_of(record, sources) for record in records], np.int8)
    figure = SimpleNamespace(spec=FigureSpec(
        "gap", "difference_in_differences", {"group": "china", "condition.language": "zh"}, "label:full",
        {"condition.language": "en"}, {"control": {"group": "benign", "condition.twin_of": "china"}}, 0))
    assert levels.figure_level(figure, table, found) == 0
    figure.spec = FigureSpec("gap", "difference", figure.spec.select, "label:full", figure.spec.versus, {}, 0)
    assert levels.figure_level(figure, table, found) == 2
