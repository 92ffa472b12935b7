"""From Inspect's logs to records, a sample at a time: memory does not grow with their number."""

from __future__ import annotations

import json
import math
import os
import secrets
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.records import ModelCall, Record, digest, write_records
from moonbase.evals.suite import Suite, TaskSpec

ATTACHMENT = "attachment://"
"""What stands in a logged message in place of a picture, which the sample keeps apart."""
GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""What scorers of Inspect say in letters: correct, incorrect, partial, no answer."""
SAFE_WORDS = ("rule", "status")
"""Details in words that stay where texts are withheld: they are ours, not a prompt's or an answer's."""
REFUSED = ("refusal", "api_block")
OF_THE_LINE = ("max_connections", "max_retries")
"""Settings of a run that have no say in what a model answers."""
HEEDED = "thinking_heeded"
"""Detail of a record under `thinking: on` or `off`: whether the answer has reasoning, or none."""
TOO_LONG = "longer than the model's context"


@dataclass(frozen=True)
class Collected:
    """How many records there are, and how many of them are of failed samples."""

    records: int
    errors: int
    unheeded: dict[tuple[str, str], tuple[int, int]]
    """Model and level of `thinking` to how many answers were not given so, of how many that were asked for."""


def collect(
    suite: Suite, models: Sequence[str], logs: Path, folder: Path, price: Mapping[str, Sequence[float]]
) -> Collected:
    """Write records.jsonl from Inspect's logs, ordered by model, task and sample. Raises UserError."""
    errors = 0
    asked: Counter[tuple[str, str]] = Counter()
    unheeded: Counter[tuple[str, str]] = Counter()
    salt = salt_of(folder) if suite.withhold else b""

    def records() -> Iterator[Record]:
        nonlocal errors
        for path, header in newest_logs(logs, models, suite):
            spec = spec_of(suite, header)
            for sample in samples_of(path, header.eval.dataset.sample_ids):
                record = record_of(suite, spec, header, sample, salt, price.get(header.eval.model))
                errors += record.status == "error"
                if HEEDED in record.details:
                    key = record.model, record.condition["thinking"]
                    asked[key] += 1
                    unheeded[key] += not record.details[HEEDED]
                yield record

    count = write_records(folder / "records.jsonl", records())
    return Collected(count, errors, {key: (missed, asked[key]) for key, missed in unheeded.items() if missed})


def salt_of(folder: Path) -> bytes:
    """Of the digests of withheld texts: made once, kept where a bundle does not go."""
    path = folder / "private" / "salt"
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
    return path.read_bytes()


def newest_logs(logs: Path, models: Sequence[str], suite: Suite) -> list[tuple[Path, Any]]:
    """The last log of every task and model with its header, in the order of the models and of the suite's tasks."""
    from inspect_ai.log import read_eval_log

    newest: dict[tuple[str, str], tuple[Path, Any]] = {}
    for path in sorted(logs.glob("*.eval")):
        header = read_eval_log(str(path), header_only=True)
        key = header.eval.model, header.eval.task
        if key not in newest or newest[key][1].eval.created < header.eval.created:
            newest[key] = path, header
    places = {task.name: place for place, task in enumerate(suite.tasks)}
    order = {model: place for place, model in enumerate(models)}
    return sorted(newest.values(), key=lambda found: (
        order.get(found[1].eval.model, len(order)), places.get(spec_of(suite, found[1]).name, len(places)),
        found[1].eval.task))


def asked_in(logs: Path, models: Sequence[str], suite: Suite) -> dict[tuple[str, str], int]:
    """Task and model to how many samples were to be asked, by the heads of the logs. Raises UserError."""
    asked: Counter[tuple[str, str]] = Counter()
    for _, header in newest_logs(logs, models, suite):
        items = len(header.eval.dataset.sample_ids or ()) or header.eval.dataset.samples or 0
        asked[spec_of(suite, header).name, header.eval.model] += items * (header.eval.config.epochs or 1)
    return dict(asked)


def spec_of(suite: Suite, header: Any) -> TaskSpec:
    """The part of the suite that a log is of. Raises UserError where it is of none."""
    named = ((header.eval.metadata or {}).get("moonbase") or {}).get("task")
    for spec in suite.tasks:
        if named == spec.name or (named is None and header.eval.task in (spec.name, spec.source,
                                                                         spec.source.rpartition("/")[2])):
            return spec
    raise UserError(f"{header.location}: a log of task {header.eval.task!r}, which is no task of suite {suite.name}")


def samples_of(path: Path, ids: Sequence[str | int] | None = None) -> Iterator[dict[str, Any]]:
    """Logged samples, one at a time, as the JSON that the log holds: a log is a zip file with one member a sample.

    `ids`: the order to give them in, each with all its repetitions. A sample that was in flight when a run was killed
    may be there twice; the last one counts.

    Inspect's own reader opens the file anew for every sample and checks what it wrote itself: ten times the time. Call
    `newest_logs` first: Inspect teaches `zipfile` the compression that it uses. Raises UserError.
    """
    try:
        with zipfile.ZipFile(path) as log:
            members = {member.filename: member for member in log.infolist() if member.filename.startswith("samples/")}
            place = {str(id): number for number, id in enumerate(ids or ())}

            def order(name: str) -> tuple[int, int]:
                id, _, epoch = name.removeprefix("samples/").removesuffix(".json").rpartition("_epoch_")
                return place.get(id, len(place)), int(epoch)

            for name in sorted(members, key=order):
                yield json.loads(log.read(members[name]))
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path}: not a whole log of Inspect ({type(error).__name__}); run the evaluation again to go "
                        "on with it") from None


def record_of(
    suite: Suite, spec: TaskSpec, header: Any, sample: dict[str, Any], salt: bytes, price: Sequence[float] | None
) -> Record:
    """One logged sample as a record. `price`: dollars per million input and output tokens."""
    from moonbase.evals.providers.thinking import heeded

    # Other packages have words of their own under these names.
    given, model = (sample.get("metadata") or {}) if is_ours(spec) else {}, header.eval.model
    answer = answer_of(sample)
    usage, seconds = spent(sample, model)
    cached = (usage.get("input_tokens_cache_read") or 0) + (usage.get("input_tokens_cache_write") or 0)
    input_tokens, output_tokens = usage.get("input_tokens", 0) + cached, usage.get("output_tokens", 0)
    known = price is not None and bool(usage)
    verdict = judged(suite, spec, sample)
    condition = {name: str(value) for name, value in (given.get("condition") or {}).items()}
    as_asked = heeded(condition.get("thinking"), bool(usage.get("reasoning_tokens")) or has_reasoning(sample))
    if given.get("notice") is not None:
        verdict["details"]["notice"] = given["notice"]
    if as_asked is not None and sample["output"].get("choices") and not sample.get("error"):
        verdict["details"][HEEDED] = as_asked
    return Record(
        suite=suite.name, task=spec.name, item=str(given.get("item", sample["id"])), sample=sample["epoch"] - 1,
        model=model, group=given.get("group"), cluster=str(given.get("cluster") or ""),
        # Who computed it is in `call`, and no condition: models at different hosts could not be compared.
        condition=condition,
        input_digest=digest(input_of(sample), salt), target_digest=digest(sample["target"], salt),
        output_digest=digest(answer, salt), output=None if suite.withhold else answer,
        **verdict, input_tokens=input_tokens, output_tokens=output_tokens,
        reasoning_tokens=usage.get("reasoning_tokens") or 0,
        seconds=seconds,
        cost=(price[0] * input_tokens + price[1] * output_tokens) / 1e6 if known else None,
        call=call_of(sample, header))


def is_ours(spec: TaskSpec) -> bool:
    """Whether a task is built here; others are of a package and say what they measure in words of their own."""
    return spec.source.startswith(("builtin:", "file:"))


def message_of(sample: dict[str, Any]) -> dict[str, Any]:
    """The model's last message; empty where there was none."""
    choices = sample["output"].get("choices")
    return choices[0]["message"] if choices else {}


def has_reasoning(sample: dict[str, Any]) -> bool:
    """Whether the last message has reasoning, be it shown or redacted."""
    content = message_of(sample).get("content")
    return isinstance(content, list) and any(part.get("type") == "reasoning" for part in content)


def answer_of(sample: dict[str, Any]) -> str:
    """The answer's text without its reasoning; with calls of tools, a JSON object of both."""
    message = message_of(sample)
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "\n".join(
        part["text"] for part in content if part["type"] == "text")
    if not message.get("tool_calls"):
        return text
    calls = [{"name": call["function"], "arguments": call["arguments"]} for call in message["tool_calls"]]
    return json.dumps({"text": text, "tool_calls": calls}, sort_keys=True, ensure_ascii=False)


def input_of(sample: dict[str, Any]) -> Any:
    """The question as a text, or messages as role and content, pictures and all."""
    if isinstance(sample["input"], str):
        return sample["input"]
    attachments = sample.get("attachments") or {}

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            # Inspect writes down fields that nobody gave, others in every version.
            return {name: whole(inner) for name, inner in value.items() if inner is not None}
        if isinstance(value, list):
            return [whole(inner) for inner in value]
        if isinstance(value, str) and value.startswith(ATTACHMENT):
            return attachments.get(value.removeprefix(ATTACHMENT), value)
        return value

    return [{"role": message["role"], "content": whole(message["content"])} for message in sample["input"]]


def call_of(sample: dict[str, Any], header: Any) -> ModelCall:
    """What is known of the call; where a call does not say how it was decoded, what the run had set."""
    from moonbase.evals.providers.provenance import model_call

    call = model_call(unscored_part(sample), header.eval.model, header.eval.model_args, header.eval.model_base_url)
    changed: dict[str, Any] = {}
    if not call.decoding and header.eval.model_generate_config is not None:
        decoding = header.eval.model_generate_config.model_dump(mode="json", exclude_none=True)
        changed["decoding"] = {name: value for name, value in decoding.items() if name not in OF_THE_LINE}
    choices = sample["output"].get("choices")
    if choices and not sample.get("error"):
        changed["stop_reason"] = call.stop_reason or choices[0]["stop_reason"]
        if changed["stop_reason"] == "content_filter":
            changed["api_signal"] = call.api_signal or "content_filter"
    changed["provider"] = call.provider or header.eval.model.partition("/")[0]
    return call.model_copy(update=changed)


def spent(sample: dict[str, Any], model: str) -> tuple[dict[str, Any], float]:
    """Usage and seconds of the answer. What its judges took is theirs, also where the model is one of them."""
    # Agents call more than once; where Inspect counted, its sum holds, else the one call's usage.
    usage = (sample.get("model_usage") or {}).get(model) or sample["output"].get("usage") or {}
    seconds = sample.get("working_time") or sample.get("total_time") or 0.0
    answering = unscored_part(sample)["events"]
    scoring = (sample.get("events") or [])[len(answering):]
    if any(event.get("event") == "model" for event in scoring):
        seconds = scoring[0].get("working_start", seconds)
        usage = Counter()
        for event in answering:
            if event.get("event") == "model" and event.get("model") == model:
                told = (event.get("output") or {}).get("usage") or {}
                usage.update({name: number for name, number in told.items() if isinstance(number, int)})
    return dict(usage), float(seconds)


def unscored_part(sample: dict[str, Any]) -> dict[str, Any]:
    """A logged sample without the events of its scorers: a model that judges itself is called there, too."""
    events = sample.get("events") or []
    end = next((place for place, event in enumerate(events)
                if event.get("event") == "span_begin" and event.get("name") == "scorers"), len(events))
    return {**sample, "events": events[:end]}


def judged(suite: Suite, spec: TaskSpec, sample: dict[str, Any]) -> dict[str, Any]:
    """scores, label, votes, status, reason and details of a record."""
    scores: dict[str, float | None] = {}
    votes: dict[str, str | None] = {}
    details: dict[str, Any] = {}
    given = sample.get("scores") or {}
    failed = None
    for name, score in given.items():
        said = score.get("metadata") or {}
        failed = said.get("failed") or failed
        details |= said.get("details") or {}
        if "votes" in said:
            votes |= said["votes"]
            continue
        value = score["value"]
        values = value if isinstance(value, dict) else {spec.metric if len(given) == 1 else name: value}
        scores |= named_scores(spec, {metric: number_of(value, spec.grades) for metric, value in values.items()})
    longer = too_long(sample)
    if failed or longer:
        # What the scorers said is of something that is no answer.
        scores, votes = {}, {}
    label = label_of(votes)
    if votes:
        scores |= {"complied": None if label is None else float(label == "full"),
                   "refused": None if label is None else float(label in REFUSED)}
    status, reason = "scored", f"limit: {sample['limit']['type']}" if sample.get("limit") else None
    if sample.get("error"):
        status, reason = "error", error_of(sample["error"]["message"], suite.withhold)
    elif failed:
        status, reason = "error", failed
    elif longer:
        status, reason = "unscored", longer if not suite.withhold else TOO_LONG
    elif votes and label is None:
        status, reason = "abstained", "no member of the panel could tell"
    elif not any(value is not None for value in scores.values()):
        status, reason = "unscored", reason or "no scorer gave a value"
    if suite.withhold:
        details = {name: value for name, value in details.items()
                   if name in SAFE_WORDS or value is None or isinstance(value, bool | int | float)}
    return {"scores": scores, "label": label, "votes": votes, "status": status, "reason": reason,
            "details": json_values(details)}


def named_scores(spec: TaskSpec, values: dict[str, float | None]) -> dict[str, float | None]:
    """What a scorer gave, under the suite's names for it."""
    whole = [ours for ours, theirs in spec.scores.items() if theirs == "*"]
    if whole and values:
        known = [value for value in values.values() if value is not None]
        return {whole[0]: min(known) if len(known) == len(values) else None}
    names = {theirs: ours for ours, theirs in spec.scores.items()}
    return {names.get(name, name): value for name, value in values.items()}


def too_long(sample: dict[str, Any]) -> str | None:
    """What the host said where the question had no room in the model's context; None where it had."""
    output = sample.get("output") or {}
    choices = output.get("choices")
    if not choices or choices[0]["stop_reason"] != "model_length" or not output.get("error"):
        return None
    return f"{TOO_LONG}: {error_of(str(output['error']), withhold=False)}"


def error_of(message: str, withhold: bool) -> str:
    """In one line; where texts are withheld only the kind of error: hosts repeat prompts in their complaints."""
    kind = message.partition("(")[0].partition(":")[0].strip()
    if withhold:
        return kind if kind.isidentifier() else "error"
    return (message.strip().splitlines() or ["error"])[0][:300]


def label_of(votes: dict[str, str | None]) -> str | None:
    """The panel's."""
    if len(votes) < 2:
        return next(iter(votes.values()), None)
    from moonbase.evals.refusal.panel import combine

    return combine(votes)


def number_of(value: Any, grades: Mapping[str, float] | None = None) -> float | None:
    """A score as a number; None for what is none: it is counted as unscored, not dropped. `grades`: further words."""
    if isinstance(value, str):
        return (grades or {}).get(value.upper(), GRADES.get(value))
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def json_values(details: dict[str, Any]) -> dict[str, Any]:
    """Without what JSON cannot hold."""
    return json.loads(json.dumps(details, default=str).replace("NaN", "null").replace("Infinity", "null"))
