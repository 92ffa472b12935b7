"""Answers of real models that were stored earlier, by key: a whole evaluation offline, without keys, on real text.

| dataset | key of an answer | stored with it |
|---|---|---|
| `mmlu-pro` | `question_id`, as text | nothing but the text |
| `paired-politics` | `CATEGORY/QUESTION_ID` | the host, its fingerprint, usage, reasoning |
| `xstest` | the prompt's `id`, `v2-7` or `7` | nothing but the text |

An answer is also found by the text of its question, where no other answer has the same. Texts of `xstest` are unsafe:
nothing here puts one into a message or a log.

With the answers of `paired-politics` lie the verdicts of two models that judged them (`find_verdicts`).
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonbase.errors import UserError, did_you_mean
from moonbase.evals.records import digest

DATA_VARIABLE = "MOONBASE_SHARED"
"""The environment variable that names the folder of real data."""
_HOW = f"--data FOLDER (-M data=FOLDER where Inspect itself is called), or set {DATA_VARIABLE}"
JUDGED = {"paired-politics": "paired-politics/analysis*/{model}.jsonl.gz"}
"""Dataset to the files with verdicts on its answers, one folder a judge."""
ANSWER_FAILED = "answer failed"
"""The verdict that what is stored is the failure of a host, and no answer."""
VERDICTS = {"COMPLETE": "full", "EVASIVE": "evasive", "DENIAL": "refusal", "ERROR_ORIGINAL_MODERATION": ANSWER_FAILED}
"""The words of llm-compliance in ours."""
_THINK, _END_THINK = "◁think▷", "◁/think▷"
"""How Kimi-VL marks its reasoning in the text."""
_HASH_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """One answer as it was recorded. None and 0: nobody wrote it down."""

    key: str
    question: str
    text: str
    reasoning: str = ""
    stop_reason: str = "stop"
    """stop, length or content_filter, in OpenAI's words."""
    model: str | None = None
    """As the host named it."""
    provider: str | None = None
    """The host that computed it."""
    fingerprint: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    has_usage: bool = False


@dataclass(frozen=True)
class StoredAnswers:
    """All answers of one model to one dataset."""

    dataset: str
    model: str
    by_key: dict[str, StoredAnswer]
    by_question: dict[str, StoredAnswer | None]
    """Digest of the question to its answer; None where several answers have the same question."""

    def of_key(self, key: str) -> StoredAnswer:
        """Raises UserError."""
        found = self.by_key.get(key) or self.by_key.get(f"v2-{key}")
        if found is None:
            raise UserError(f"replay/{self.dataset}:{self.model} has no answer with key {key!r}; it has "
                            f"{len(self.by_key)}, the first is {next(iter(self.by_key))!r}")
        return found

    def of_question(self, text: str) -> StoredAnswer:
        """Raises UserError, which names the question by its digest alone."""
        mark = digest(normal(text))
        found = self.by_question.get(mark)
        if found is None:
            why = "several answers to" if mark in self.by_question else "no answer to"
            raise UserError(f"replay/{self.dataset}:{self.model} has {why} the question {mark[:23]}…; give the sample "
                            'metadata {"replay_key": ...}')
        return found


def normal(text: str) -> str:
    """A question without the accidents of white space."""
    return _HASH_SPACE.sub(" ", text).strip()


def find_answers(name: str, folder: str | Path | None = None) -> StoredAnswers:
    """`name`: DATASET:MODEL, where a part of the model's name will do that no other has. `folder`: the real data; None
    takes it from the environment. Read once per process. Raises UserError."""
    return _read(*_located(name, folder))


def check_answers(name: str, folder: str | Path | None = None) -> None:
    """Raises UserError where `find_answers` would for want of a dataset, a folder or a model, without reading them."""
    _located(name, folder)


def _located(name: str, folder: str | Path | None) -> tuple[str, str, _Files]:
    """(dataset, the model's whole name, its files)"""
    dataset, _, model = name.partition(":")
    if dataset not in DATASETS:
        raise UserError(f"replay/{name}: no such dataset{did_you_mean(dataset, DATASETS)}; there are "
                        f"{', '.join(DATASETS)}")
    folder = folder or os.environ.get(DATA_VARIABLE)
    if not folder:
        raise UserError(f"replay/{name}: which folder holds the stored answers? Give {_HOW}")
    files = _files(dataset, Path(folder))
    return dataset, _choose(name, dataset, model, files), files


def models_of(dataset: str, folder: str | Path) -> list[str]:
    """Names of the models that have answers. Raises UserError where there are none."""
    return sorted(_files(dataset, Path(folder)).names)


class _Files:
    """Files of a dataset by model; hashable, so that reading can be remembered."""

    def __init__(self, names: dict[str, Path]) -> None:
        self.names = names
        self._identity = tuple((name, str(path.resolve()), path.stat().st_mtime_ns) for name, path in names.items())

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Files) and self._identity == other._identity


def _files(dataset: str, folder: Path) -> _Files:
    pattern, strip, _ = DATASETS[dataset]
    found = {re.sub(strip, "", path.name): path for path in sorted(folder.glob(pattern))}
    if not found:
        raise UserError(f"{folder / pattern}: no stored answers there; name the folder that holds {dataset}: {_HOW}")
    return _Files(found)


def _choose(name: str, dataset: str, model: str, files: _Files) -> str:
    known = sorted(files.names)
    if model in files.names:
        return model
    matches = [one for one in known if model.lower().replace("/", "_") in one.lower()]
    if len(matches) != 1:
        how = f"is one of {len(matches)} models" if matches else "is no model of it"
        raise UserError(f"replay/{name}: {model or 'an empty name'!r} {how}; write replay/{dataset}:MODEL with one of "
                        f"{', '.join(matches or known)}")
    return matches[0]


def find_verdicts(dataset: str, model: str, folder: str | Path | None = None) -> dict[str, dict[str, str]]:
    """Key of an answer -> `stored:JUDGE` -> label, or ANSWER_FAILED: what models said of it when it was stored. Empty
    where nobody did. `model`: its whole name. Read once per process. Raises UserError."""
    folder = folder or os.environ.get(DATA_VARIABLE)
    if not folder or dataset not in JUDGED:
        return {}
    return _read_verdicts(_Files({str(path.parent): path for path in sorted(Path(folder).glob(
        JUDGED[dataset].format(model=model)))}))


@functools.lru_cache(maxsize=32)
def _read_verdicts(files: _Files) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for path in files.names.values():
        try:
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                for row in map(json.loads, lines):
                    judge = "stored:" + row["judge_model"].rpartition("/")[2]
                    found.setdefault(f"{row['category']}/{row['question_id']}", {})[judge] = VERDICTS[row["compliance"]]
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: these are no stored verdicts ({type(error).__name__}: {str(error)[:60]})"
                            ) from None
    return found


@functools.lru_cache(maxsize=32)
def _read(dataset: str, model: str, files: _Files) -> StoredAnswers:
    path, read = files.names[model], DATASETS[dataset][2]
    by_key: dict[str, StoredAnswer] = {}
    by_question: dict[str, StoredAnswer | None] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
            for answer in read(lines):
                if answer.key in by_key:
                    raise UserError(f"{path}: key {answer.key!r} comes twice")
                by_key[answer.key] = answer
                mark = digest(normal(answer.question))
                by_question[mark] = None if mark in by_question else answer
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: these are no stored answers of {dataset} ({type(error).__name__})") from None
    return StoredAnswers(dataset, model, by_key, by_question)


def _mmlu_pro(lines: io.TextIOBase) -> Iterator[StoredAnswer]:
    for line in lines:
        row = json.loads(line)
        yield StoredAnswer(str(row["question_id"]), row["question"], row["output"])


def _xstest(lines: io.TextIOBase) -> Iterator[StoredAnswer]:
    for row in csv.DictReader(lines):
        yield StoredAnswer(row["id"], row["prompt"], row["completion"])


def _paired_politics(lines: io.TextIOBase) -> Iterator[StoredAnswer]:
    for line in lines:
        row = json.loads(line)
        response = row["response"]
        choice, usage = response["choices"][0], response.get("usage")
        message, details = choice["message"], (usage or {}).get("completion_tokens_details") or {}
        reasoning, text = _split(message.get("reasoning") or message.get("reasoning_content") or "", message["content"])
        yield StoredAnswer(
            f"{row['category']}/{row['question_id']}", row["question"], text, reasoning, choice["finish_reason"],
            response.get("model"), response.get("provider") or row.get("api_provider"),
            response.get("system_fingerprint") or None, *_counts(usage, details), usage is not None)


def _split(reasoning: str, text: str | None) -> tuple[str, str]:
    """Reasoning that stands in the text apart from it; one that never ended is all there is."""
    text = text or ""
    if reasoning or not text.startswith(_THINK):
        return reasoning, text
    reasoning, _, text = text.removeprefix(_THINK).partition(_END_THINK)
    return reasoning, text


def _counts(usage: dict[str, Any] | None, details: dict[str, Any]) -> tuple[int, int, int]:
    usage = usage or {}
    return usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0, details.get("reasoning_tokens") or 0


DATASETS: dict[str, tuple[str, str, Callable[[io.TextIOBase], Iterator[StoredAnswer]]]] = {
    "mmlu-pro": ("mmlu-pro-outputs/*_5shots.jsonl.gz", r"_5shots\.jsonl\.gz$", _mmlu_pro),
    "paired-politics": ("paired-politics/responses/*.jsonl.gz", r"\.jsonl\.gz$", _paired_politics),
    "xstest": ("xstest/completions/*.csv.gz", r"^xstest_v2_completions_|\.csv\.gz$", _xstest),
}
"""Files of each dataset, what to take off their names for the model's, and how to read them."""
