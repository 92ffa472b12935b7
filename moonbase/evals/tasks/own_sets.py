"""Sets of our own, which need no data: criticism of states with mirrors and harmless twins, and words that alarm.

Both are crossed completely, so that every effect of interest is a difference between requests that differ in one thing:

    paired_states.yaml    36 forms (an essay against ..., a satirical poem on ...) × 5 states × critical or harmless ×
                          English or Chinese
    alarming_words.yaml   66 pairs: a harmless request with an alarming word, and a plain one × English or Chinese

An item's cluster is its form or its pair. Rendering takes no chance: the same files give the same items, whose digest
stands in the suite, so that figures of two evaluations are of the same questions or are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from inspect_ai import Task

from moonbase.evals.suite import Suite, TaskSpec
from moonbase.evals.tasks.crossing import Question, first_clusters, refuse_other_items
from moonbase.evals.tasks.prompts import refusal_task

LANGUAGES = ("en", "zh")
"""In the order of the texts in the files."""
ALARMING, PLAIN = "safe", "benign"


def paired_states(
    suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool
) -> Task:
    """Critical requests on five states in two languages, each with its mirrors and a harmless twin."""
    return _task(suite, spec, state_questions, limit, stored)


def alarming_words(
    suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool
) -> Task:
    """Harmless requests with an alarming word, and their plain twins, in two languages."""
    return _task(suite, spec, alarming_questions, limit, stored)


def _task(suite: Suite, spec: TaskSpec, read: Callable[[], tuple[Question, ...]], limit: int | None,
          stored: bool) -> Task:
    questions = read()
    refuse_other_items(suite, spec, questions, spec.params.get("digest"))
    # Whole clusters: a question without its mirrors and twins is no pair.
    return refusal_task(suite, spec, iter(first_clusters(questions, limit)), None, stored)


@cache
def state_questions() -> tuple[Question, ...]:
    """Ids STATE_FORM and STATE_FORM_benign; group the state or `benign`, whose state is the condition `twin_of`."""
    given = _read("paired_states.yaml")
    return tuple(question for form, item in given["items"].items() for state in given["states"]
                 for question in _on_state(form, item, state, given["words"]))


def _on_state(form: str, item: dict[str, Any], state: str, common: dict[str, Any]) -> Iterator[Question]:
    words = {name: versions[state] for name, versions in {**common, **item.get("words", {})}.items()}
    for subject in ("critical", "benign"):
        texts = {language: item[subject][place].format_map({name: both[place] for name, both in words.items()})
                 for place, language in enumerate(LANGUAGES)}
        if subject == "critical":
            yield Question(f"{state}_{form}", texts, state, form)
        else:
            yield Question(f"{state}_{form}_benign", texts, "benign", form, condition={"twin_of": state})


@cache
def alarming_questions() -> tuple[Question, ...]:
    """Ids PAIR and PAIR_plain."""
    return tuple(
        Question(pair + tail, {language: both[language][place] for language in LANGUAGES}, group, pair)
        for pair, both in _read("alarming_words.yaml").items()
        for place, (tail, group) in enumerate((("", ALARMING), ("_plain", PLAIN))))


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))
