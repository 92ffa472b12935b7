"""Suites that measure refusals: prompts of the user's own copy, and questions on states with their benign twins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inspect_ai import Epochs, Task

from moonbase.errors import UserError
from moonbase.evals.sources import Source, find_copy, read_rows, read_source, source_of
from moonbase.evals.suite import Suite, TaskSpec
from moonbase.evals.tasks.crossing import Question, ask_under_condition, crossed, first_clusters, refuse_other_items
from moonbase.evals.tasks.refusal_scorer import scorers_of

BENIGN_TWINS = Path(__file__).with_name("benign_twins.jsonl")
"""Harmless requests of the same form as the questions on China, about China, in both languages; ours."""
STATES = ("china", "us", "eu", "russia")


def refusal_task(suite: Suite, spec: TaskSpec, questions: Iterator[Question], limit: int | None, stored: bool) -> Task:
    """Questions under the conditions of the suite, labelled by its judges."""
    return Task(
        name=spec.name, dataset=crossed(suite, questions, limit, stored), solver=ask_under_condition(),
        scorer=scorers_of(suite.judges), epochs=Epochs(1 if stored else suite.samples, reducer=[]))


def file_task(suite: Suite, spec: TaskSpec, data: Path | None, limit: int | None, stored: bool) -> Task:
    """Prompts of a public set in the user's own copy, in one language."""
    source = source_of(spec.params, f"suite {suite.name}, task {spec.name}")
    language = spec.params.get("language", "en")
    key = spec.params.get("replay_key", "{id}")
    questions = (Question(f"{spec.params.get('prefix', '')}{item.id}", {language: item.prompt}, item.group or
                          spec.params.get("group_name"), item.cluster, {language: key.format(id=item.id)})
                 for item in read_source(source, data))
    return refusal_task(suite, spec, questions, limit, stored)


def paired_politics(
    suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool
) -> Task:
    """Critical questions on China in two languages, each with its mirror on three other states and a benign twin."""
    digests = spec.params.get("sha256", {})
    benign = list(benign_twins())
    if "benign" in spec.params:
        refuse_other_items(suite, spec, benign, spec.params["benign"])
    questions = [*_on_states(spec.params.get("folder", "paired-politics/questions"), digests, data), *benign]
    return refusal_task(suite, spec, iter(first_clusters(questions, limit)), None, stored)


def _on_states(folder: str, digests: dict[str, str], data: Path | None) -> Iterator[Question]:
    chinese = _texts(f"{folder}/zh_china_criticism.jsonl", digests, data)
    for state in STATES:
        for id, text in _texts(f"{folder}/{state}_criticism.jsonl", digests, data).items():
            texts, keys = {"en": text}, {"en": f"{state}_criticism/{id}"}
            if state == "china":
                if id not in chinese:
                    raise UserError(f"{folder}/zh_china_criticism.jsonl: question {id} has no twin")
                texts["zh"], keys["zh"] = chinese[id], f"zh_china_criticism/{id}"
            yield Question(id, texts, state, cluster_of(id), keys)


def _texts(file: str, digests: dict[str, str], data: Path | None) -> dict[str, str]:
    source = Source(file, digests.get(file.rpartition("/")[2]), prompt="question")
    return {str(row["id"]): str(row["question"]) for row in read_rows(find_copy(source, data))}


def benign_twins() -> Iterator[Question]:
    """Ours, one for each question on China."""
    for line in BENIGN_TWINS.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        yield Question(row["id"], {"en": row["en"], "zh": row["zh"]}, "benign", cluster_of(row["twin"]))


def cluster_of(id: str) -> str:
    """Questions of one number are of one form (an essay, a satirical poem, …) and mirror one another."""
    return f"form_{id.rpartition('_')[2]}"
