"""Questions with one short answer that is read out of the model's words, from local copies: MMLU-Pro, GSM8K, and any
set of multiple choice whose columns a suite names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from inspect_ai import Epochs, Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import TaskState, generate

from moonbase.errors import UserError
from moonbase.evals.short_answers import as_target, letter_in, number_in
from moonbase.evals.sources import find_copy, read_rows, source_of
from moonbase.evals.suite import Suite, TaskSpec

LETTERS = "ABCDEFGHIJ"
MULTIPLE_CHOICE = ("{question}\n\nOptions:\n{options}\n\nThink step by step, then end with a line "
                   "\"The answer is (X).\", where X is the letter of the right option.")
WORD_PROBLEM = "{question}\n\nThink step by step, then end with a line \"#### N\", where N is the answer as a number."


@scorer(metrics=[], name="exact")
def exact_scorer(read: str) -> Scorer:
    """`read`: letter or number. An answer in which nothing is found is wrong; the details say that nothing was."""
    reader: Callable[[str], Any] = {"letter": letter_in, "number": number_in}[read]

    async def score(state: TaskState, target: Target) -> Score:
        found = reader(state.output.completion)
        right = found is not None and found == reader(target.text)
        return Score(value={"accuracy": float(right)},
                     metadata={"details": {"extracted": None if found is None else str(found)}})

    return score


def mmlu_pro(suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool) -> Task:
    """MMLU-Pro questions without examples; with stored answers, these were given to five examples and the question."""
    def samples() -> Iterator[Sample]:
        for row in _rows(suite, spec, data):
            id = str(row["question_id"])
            options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, row["options"], strict=False))
            yield Sample(
                id=id, input=MULTIPLE_CHOICE.format(question=row["question"], options=options),
                target=as_target(f"The answer is ({row['answer']}).", letter_in), metadata={
                    "item": id, "group": row["category"], "cluster": "", "replay_key": id,
                    "condition": {"language": "en"}})

    return _exact_task(suite, spec, samples(), "letter", limit, stored)


def gsm8k(suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool) -> Task:
    """The test part of GSM8K without examples. An item's id is its line."""
    def samples() -> Iterator[Sample]:
        for number, row in enumerate(_rows(suite, spec, data), 1):
            yield Sample(
                id=str(number), input=WORD_PROBLEM.format(question=row["question"]),
                target=as_target("#### " + row["answer"].rpartition("####")[2].strip(), number_in),
                metadata={"item": str(number), "group": None, "cluster": "", "condition": {"language": "en"}})

    return _exact_task(suite, spec, samples(), "number", limit, stored)


def choices(suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool) -> Task:
    """Multiple choice out of the user's own copy. `params`, beside those of a source (`sources.Source`): `question`,
    `answer` (a letter, a number from 0, or the right option's text), `options` (a column with a list or an object by
    letters, or a list of columns) and `context`; `a.b` is field b of column a. Without `id` an item's id is its line.
    """
    params = spec.params
    named = [*params["options"]] if isinstance(params.get("options"), list) else [params.get("options", "options")]

    def samples() -> Iterator[Sample]:
        for number, row in enumerate(_rows(suite, spec, data), 1):
            id = str(_column(row, params["id"])) if "id" in params else str(number)
            found = [_column(row, name) for name in named]
            if len(found) == 1:
                found = list(found[0].values() if isinstance(found[0], dict) else found[0])
            told = [str(_column(row, params["context"]))] if "context" in params else []
            yield Sample(
                id=id, input=MULTIPLE_CHOICE.format(
                    question="\n\n".join([*told, str(_column(row, params.get("question", "question")))]),
                    options="\n".join(f"{letter}. {one}" for letter, one in zip(LETTERS, found, strict=False))),
                target=f"The answer is ({_letter(_column(row, params.get('answer', 'answer')), found, number)}).",
                metadata={"item": id, "cluster": "", "condition": {"language": params.get("language", "en")},
                          "group": str(_column(row, params["group"])) if "group" in params else None})

    return _exact_task(suite, spec, samples(), "letter", limit, stored)


def _column(row: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        if not isinstance(row, dict):
            raise KeyError(name)
        row = row[part]
    return row


def _letter(answer: Any, options: list[Any], number: int) -> str:
    """Which of the options is right. Raises UserError, which quotes nothing."""
    said = str(answer).strip()
    texts = [str(option) for option in options]
    place = LETTERS.find(said.upper()) if len(said) == 1 and said.isalpha() else int(said) if (
        isinstance(answer, int) or (said.isdecimal() and said not in texts)) else -1
    if place < 0 and said in texts:
        place = texts.index(said)
    if not 0 <= place < min(len(options), len(LETTERS)):
        raise UserError(f"row {number}: its answer is none of its {len(options)} options; check the suite's params")
    return LETTERS[place]


def _rows(suite: Suite, spec: TaskSpec, data: Path | None) -> Iterator[dict[str, Any]]:
    source = source_of(spec.params, f"suite {suite.name}, task {spec.name}")
    return read_rows(find_copy(source, data), source.root)


def _exact_task(
    suite: Suite, spec: TaskSpec, samples: Iterator[Sample], read: str, limit: int | None, stored: bool
) -> Task:
    try:
        dataset = MemoryDataset(list(islice(samples, limit)), name=spec.name)
    except KeyError as error:
        raise UserError(f"{spec.params['file']}: no field {error}; it is not the set that {spec.name} needs") from None
    return Task(name=spec.name, dataset=dataset, solver=generate(), scorer=exact_scorer(read),
                epochs=Epochs(1 if stored else suite.samples, reducer=[]))
