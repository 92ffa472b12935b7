"""Records and suites that a publisher forges and seals anew, key, chain and figures all consistent: votes that nobody
gave, conditions left out, digests of another kind, answers called none, costs, sources that make nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")

from moonbase.errors import UserError
from moonbase.evals.collect import TOO_LONG
from moonbase.evals.fresh import generate
from moonbase.evals.fresh.commitment import Audit, Revealed
from moonbase.evals.fresh.itemset import Configuration
from moonbase.evals.proof import levels, settled, verify
from moonbase.evals.proof.complete import absent
from moonbase.evals.proof.settled import Settled
from moonbase.evals.records import ModelCall, Record, digest, write_records
from moonbase.evals.suite import Suite
from moonbase.evals.tasks import build_tasks
from tests.evals import proof_samples as samples

Change = Callable[[dict[str, Any]], Any]
NO = "I'm sorry, but I cannot help."
SALTED = "hmac-sha256:" + "0" * 64
HEX = "ab" * 32


def suite_of(*tasks: dict[str, Any], **more: Any) -> Suite:
    return Suite.model_validate({"schema": "moonbase.suite/1", "name": "s", "title": "S", "metric": "accuracy",
                                 "tasks": list(tasks)} | more)


def record(task: str, model: str = "moonbase/one", answer: str = NO, **more: Any) -> Record:
    return Record(**{"suite": "s", "task": task, "item": "1", "model": model, "input_digest": digest("?"),
                     "target_digest": digest(""), "output": answer, "output_digest": digest(answer),
                     "condition": {"language": "en"}} | more)


LABELLED = {"condition": {"language": "en", "thinking": "default", "reveals_test": "no"},
            "label": "refusal", "scores": {"complied": 0.0, "refused": 1.0}}
JUDGED = {"name": "politics", "source": "builtin:paired-politics", "stored": "paired-politics"}


def panel() -> tuple[Suite, Record]:
    """The rules alone, and an answer that our engine gave."""
    return suite_of({"name": "states", "source": "builtin:paired-states"}, judges=("rules",)), record(
        "states", **LABELLED, votes={"rules": "refusal"})


def judged() -> tuple[Suite, Record]:
    """The rules and a model."""
    return suite_of({"name": "states", "source": "builtin:paired-states"}, judges=("rules", "hosted/judge")), record(
        "states", **LABELLED, votes={"rules": "refusal", "hosted/judge": "refusal"})


def replayed() -> tuple[Suite, Record]:
    """A stored answer with stored votes."""
    votes = {"rules": "refusal", "stored:a": "refusal", "stored:b": None}
    return suite_of(JUDGED, judges=("rules",)), record("politics", "replay/paired-politics:m", **LABELLED, votes=votes)


def lettered() -> tuple[Suite, Record]:
    return suite_of({"name": "letters", "source": "builtin:mmlu-pro"}), record(
        "letters", answer="The answer is (B).", target_digest=digest("The answer is (A)."), scores={"accuracy": 0.0},
        details={"extracted": "B"}, input_tokens=40, output_tokens=10)


def withheld() -> tuple[Suite, Record]:
    return suite_of({"name": "mine", "source": "file:mine"}, judges=("rules",), withhold=True), record(
        "mine", **LABELLED, votes={"rules": "refusal"}) .model_copy(update={
            "output": None, "input_digest": SALTED, "target_digest": SALTED, "output_digest": SALTED})


def called() -> tuple[Suite, Record]:
    return suite_of({"name": "calls", "source": "builtin:bfcl"}), record("calls", scores={"accuracy": 1.0}, group="x")


def foreign() -> tuple[Suite, Record]:
    return suite_of({"name": "theirs", "source": "inspect_evals/one"}), record("theirs", condition={},
                                                                              scores={"accuracy": 1.0})


def wide() -> tuple[Suite, Record]:
    return suite_of({"name": "wide", "source": "builtin:wideworld", "params": {"delegate": False}}), record(
        "wide", group="wide", condition={"language": "en", "delegation": "no"},
        scores={"accuracy": 1.0, "item_f1": 1.0, "row_f1": 1.0})


def invented() -> tuple[Suite, Record]:
    """Calls of functions: the family that has one condition more."""
    problem = generate("tools", 7, 1, 0, "en")
    return suite_of({"name": "tools", "source": "builtin:fresh/tools", "params": {"difficulties": [1], "count": 1}}), \
        record("tools", item=problem.item, group="tools", cluster=problem.item, input_digest=problem.input_digest,
               target_digest=problem.target_digest, scores={"accuracy": 0.0},
               condition={"language": "en", "difficulty": "1", "calls": "tools"})


MADE = {make.__name__: make for make in (panel, judged, replayed, lettered, withheld, called, foreign, wide, invented)}


def problems_of(name: str, change: Change | None = None, price: Any = None) -> list[str]:
    suite, honest = MADE[name]()
    values = honest.canonical()
    if change is not None:
        change(values)
    return Settled(suite, {"price": {"moonbase/one": price} if price else {}}).check(Record.model_validate(values))


@pytest.mark.parametrize("name", MADE)
def test_honest_records_are_accepted(name: str) -> None:
    assert problems_of(name) == []


def setting(**fields: Any) -> Change:
    return lambda values: values.update(fields)


def voting(label: str | None, **votes: str | None) -> Change:
    """More votes, and all that follows from them."""
    def change(values: dict[str, Any]) -> None:
        values["votes"].update({name.replace("__", ":"): vote for name, vote in votes.items()})
        values.update(label=label, scores={name: None if label is None else float(label in found) for name, found in (
            ("complied", ("full",)), ("refused", ("refusal", "api_block")))})
        values.update({} if label else {"status": "abstained", "reason": "nobody could tell"})
    return change


def without(*names: str, field: str = "condition") -> Change:
    return lambda values: [values[field].pop(name) for name in names]


def adding(field: str, **entries: Any) -> Change:
    return lambda values: values[field].update(entries)


def too_long(output: str, stop_reason: str, **call: Any) -> Change:
    """Called too long for the model."""
    return lambda values: values.update(
        status="unscored", reason=f"{TOO_LONG}: 9 tokens", votes={}, label=None, scores={}, output=output,
        output_digest=digest(output), call=values["call"] | {"stop_reason": stop_reason} | call)


FORGERIES: dict[str, tuple[str, Change, str]] = {
    "two judges who outvote the rules": ("panel", voting("full", j0="full", j1="full"), "nobody asked j0"),
    "a judge who says what everybody says": ("panel", voting("refusal", j0="refusal"), "nobody asked j0"),
    "a judge who reports a block": ("panel", voting("api_block", j0="api_block"), "nobody asked j0"),
    "judges who cannot tell": ("panel", voting(None, j0=None, j1=None), "nobody asked j0"),
    "stored votes of what was not stored": ("panel", voting("full", stored__a="full", stored__b="full"),
                                            "nobody asked stored:a"),
    "a vote that is no label": ("judged", lambda values: values["votes"].update({"hosted/judge": "grand"}), "no label"),
    "a fact that the judge alone found": ("judged", lambda values: (
        voting("api_block")(values), values["votes"].update({"hosted/judge": "api_block"})), "the rules would have"),
    "votes on letters": ("lettered", setting(votes={"rules": "full"}, label="full", scores={
        "accuracy": 0.0, "complied": 1.0, "refused": 0.0}), "nobody asked rules"),
    "stored answers of another set": ("replayed", setting(model="replay/xstest:m"), "its task has none of these"),
    "our engine with stored votes": ("replayed", setting(model="moonbase/one"), "nobody asked stored:a"),
    "a score more of calls": ("called", adding("scores", merit=1.0), "none that its task has"),
    "a score above one": ("called", setting(scores={"accuracy": 5.0}), "from 0 to 1"),
    "a group of another package": ("foreign", setting(group="china"), "filed under group 'china'"),
    "a cluster of another package": ("foreign", setting(cluster="c"), "filed under cluster 'c'"),
    "a delegation that was not": ("wide", adding("condition", delegation="yes"), "is no level"),
    "another language": ("lettered", adding("condition", language="zh"), "is no level"),
    "letters in clusters": ("lettered", setting(cluster="c"), "filed under cluster 'c'"),
    "no language": ("invented", without("language"), "condition 'language' is missing"),
    "no difficulty": ("invented", without("difficulty"), "condition 'difficulty' is missing"),
    "no form of calls": ("invented", without("calls"), "condition 'calls' is missing"),
    "no group": ("invented", setting(group=None), "filed under group 'None'"),
    "no cluster": ("invented", setting(cluster=""), "filed under cluster ''"),
    "a salted id of one's own": ("invented", setting(item="X1", cluster="X1", input_digest=SALTED), "was invented"),
    "a sample before the first": ("invented", setting(sample=-1), "sample is -1"),
    "a right answer that is no digest": ("lettered", setting(target_digest="x"), "target's digest 'x'"),
    "a salted right answer": ("lettered", setting(target_digest=SALTED), "target's digest 'hmac-"),
    "half a digest": ("lettered", setting(target_digest="sha256:" + "0" * 63), "target's digest 'sha256:"),
    "no right answer": ("lettered", setting(target_digest=None), "target's digest ''"),
    "a salted question": ("lettered", setting(input_digest=SALTED), "input's digest 'hmac-"),
    "a salted answer": ("lettered", setting(output=None, output_digest=SALTED), "output's digest 'hmac-"),
    "a plain digest of what is withheld": ("withheld", setting(input_digest=digest("?")), "input's digest 'sha256:"),
    "a withheld answer": ("withheld", setting(output="a"), "though the suite withholds texts"),
    "too long, with an answer": ("lettered", too_long("The answer is (B).", "model_length"), "there is an answer"),
    "too long, and it ended well": ("lettered", too_long("", "stop"), "its call ended otherwise"),
    "too long for what is stored": ("replayed", too_long("", "model_length"), "a model that repeats stored answers"),
    "too long for known weights": ("lettered", lambda values: (values.update(model="other/one"), too_long(
        "B", "model_length", weights_digest="sha256:" + HEX)(values)), "there is an answer"),
    "a cost without a price": ("lettered", setting(cost=0.001), "by the suite's prices and its tokens it is None"),
    "tokens below none": ("lettered", setting(output_tokens=-1), "output_tokens is -1"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forgery_of_records_is_named(what: str) -> None:
    name, change, words = FORGERIES[what]
    found = problems_of(name, change)
    assert any(words in line for line in found), found


@pytest.mark.parametrize(("cost", "price", "right"), [
    (0.00013, [2, 5], True), (None, [2, 5], False), (0.00012, [2, 5], False), (0.0, [0, 0], True),
    (0.1, "dear", False)])
def test_a_cost_is_tokens_at_the_suites_price(cost: float | None, price: Any, right: bool) -> None:
    """40 tokens in and 10 out."""
    assert (problems_of("lettered", setting(cost=cost), price) == []) is right


def test_a_host_that_complains_in_words_is_told() -> None:
    """Some hosts put their complaint where the answer would be."""
    suite, honest = lettered()
    values = honest.model_copy(update={"model": "hosted/one"}).canonical()
    too_long("prompt is too long: 9 tokens", "model_length")(values)
    checking = Settled(suite)
    assert checking.check(Record.model_validate(values)) == []
    assert [line.split(":")[0] for line in checking.taken_on_word(True)] == [
        "1 are called too long for the model though there are words"]


def test_whoever_judged_one_stored_answer_of_a_model_judged_all() -> None:
    suite, first = replayed()
    checking = Settled(suite)
    dropped = first.model_copy(update={"item": "2", "votes": {"rules": "refusal"}})
    more = first.model_copy(update={"item": "3", "votes": first.votes | {"stored:c": "refusal"}})
    failed = first.model_copy(update={"item": "4", "votes": {}, "scores": {}, "label": None, "status": "error",
                                      "reason": "the host's words"})
    found = [checking.check(one) for one in (first, dropped, more, failed)]
    assert found == [[], ["the vote of stored:a is missing"], ["nobody asked stored:c for a vote"], []]


# Levels and what the suite says of its tasks


@pytest.mark.parametrize(("source", "params", "level"), [
    ("builtin:mmlu-pro", {"sha256": HEX}, 3), ("builtin:mmlu-pro", {"sha256": HEX.upper()}, 3),
    ("file:mine", {"sha256": HEX}, 3), ("builtin:paired-states", {"digest": "sha256:" + HEX}, 3),
    ("builtin:paired-politics", {"sha256": {"a": HEX}, "benign": "sha256:" + HEX}, 3),
    ("builtin:paired-politics", {"sha256": {"a": HEX}}, 1), ("builtin:paired-politics", {"sha256": {"a": "b"}}, 1),
    ("builtin:mmlu-pro", {"sha256": "one"}, 1), ("builtin:mmlu-pro", {"digest": "sha256:" + HEX}, 1),
    ("builtin:paired-states", {"sha256": HEX}, 1), ("builtin:nosuch", {"sha256": HEX}, 1),
    ("builtin:bfcl", {"sha256": HEX}, 1), ("builtin:retail", {"sha256": HEX}, 1),
    ("inspect_evals/mmlu_pro", {"sha256": HEX}, 1), ("file:mine", {"sha256": None}, 1), ("builtin:mmlu-pro", None, 1)])
def test_a_set_is_known_by_a_digest_that_its_readers_compare(source: str, params: Any, level: int) -> None:
    sources = levels.Sources({"suite": {"tasks": [{"name": "t", "source": source, "params": params}]}})
    call = ModelCall(weights_digest=samples.WEIGHTS, decoding={"temperature": 0.0})
    assert levels.level_of(record("t", call=call), sources) == level
    named = call.model_copy(update={"weights_digest": "mine"})
    assert levels.level_of(record("t", call=named), sources) == min(level, 2)


@pytest.mark.parametrize(("source", "level"), [("builtin:fresh/maths", 2), ("builtin:fresh", 2), ("builtin:retail", 1),
                                               ("inspect_evals/one", 1), ("builtin:freshest", 1)])
def test_the_id_of_an_invented_item_is_one_in_tasks_of_such_alone(source: str, level: int) -> None:
    sources = levels.Sources({"seed": 7, "suite": {"tasks": [{"name": "t", "source": source}]}})
    assert levels.level_of(record("t", item=generate("maths", 7, 1, 0, "en").item), sources) == level


def test_the_sources_that_are_known_are_those_that_can_be_built() -> None:
    """`build_tasks` says itself what there is."""
    with pytest.raises(UserError) as told:
        build_tasks(suite_of({"name": "t", "source": "builtin:nosuch"}), None)
    names = str(told.value).partition("there are ")[2].removesuffix(" and fresh/FAMILY").split(", ")
    assert len(names) > 10
    known = [f"builtin:{name}" for name in names] + ["builtin:fresh", "builtin:fresh/maths", "file:own", "pack/one"]
    for source in known:
        assert list(Settled(suite_of({"name": "t", "source": source})).unknown_sources()) == []
    for source in ("builtin:nosuch", "builtin:freshest", "builtin", "nosuch", "builtins/one", "filed/one", ""):
        assert len(list(Settled(suite_of({"name": "t", "source": source})).unknown_sources())) == 1, source
    assert {*settled.READERS, *settled.GIVEN, *settled.LABELLED, settled.ACTS} == {f"builtin:{name}" for name in names}
    assert levels.DIGESTED.keys() <= {f"builtin:{name}" for name in names}


def verified(place: Path, source: str, **params: Any) -> verify.Verification:
    suite = suite_of({"name": "theirs", "source": source, "params": params})
    plan = {"suite": suite.canonical(), "models": ["moonbase/one", "moonbase/two"], "seed": 7}
    (place / "suite.json").write_text(json.dumps(plan), encoding="utf-8")
    write_records(place / "records.jsonl", [foreign()[1]])
    samples.forge_chain(place, lambda values: None)
    checking = verify.Verification(place, None)
    checking._check_records()
    checking._check_complete()
    return checking


def test_what_nobody_made_again_is_told(tmp_path: Path) -> None:
    """A source that makes nothing, and one of another package; a model that has no record at all."""
    found = [str(line) for line in verified(tmp_path, "builtin:nosuch").findings]
    assert "failed: records: suite.json: task 'theirs': there is no source 'builtin:nosuch'" in found
    checking = verified(tmp_path, "inspect_evals/one", sha256=HEX)
    assert not verify.failures(checking.findings)
    notes = [line.message for line in checking.findings if line.status == "note"]
    assert notes[0] == "1 of 1 scores of theirs were not made again here: they are the publisher's word"
    assert notes[-1].startswith("moonbase/two has no record at all in theirs, which the suite asks of it")


def test_a_model_without_any_record_is_told_wherever_it_is_asked() -> None:
    """Not where the task has no such stored answers, and not where it is known how many are missing."""
    suite = suite_of(JUDGED, {"name": "letters", "source": "builtin:mmlu-pro"})
    plan = {"models": ["one", "replay/paired-politics:m"]}
    told = list(absent(suite, plan, {("politics", "one"): 3}, ()))
    assert [line.partition(",")[0] for line in told] == [
        "replay/paired-politics:m has no record at all in politics", "one has no record at all in letters"]
    assert list(absent(suite, plan, {}, [("politics", "one"), ("letters", "one"),
                                         ("politics", "replay/paired-politics:m")])) == []


# Promised items


@pytest.mark.parametrize(("change", "words"), [
    (without("language"), "its condition language is missing"), (without("calls"), "its condition calls is missing"),
    (without("difficulty"), "its condition difficulty is missing"),
    (adding("condition", mood="good"), "its condition mood is none"), (setting(group=None), "filed under group None"),
    (setting(cluster=""), "filed under cluster"), (setting(sample=-1), "sample -1: 1 were committed to")])
def test_a_promise_binds_what_items_are_filed_under(change: Change, words: str) -> None:
    configuration = Configuration(families=("tools",), difficulties=(1,), languages=("en",), count=1)
    values = invented()[1].canonical()
    for forged in (False, True):
        if forged:
            change(values)
        audit = Audit(Revealed(configuration, ("moonbase/one",), "7", "key"))
        found = [line.text for line in audit.of([Record.model_validate(values)])]
        assert any(words in line for line in found) if forged else found == [], found
