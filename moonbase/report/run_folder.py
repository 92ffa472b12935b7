"""Reading what a run folder holds, however little that is.

A run may still be going, may have been killed in the middle of a line, or may never have reached its first step.
Nothing here fails on content: what is missing, unreadable or of the wrong kind is left out and named in
`RunRecord.notes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moonbase.report.dialogues import Dialogue, read_examples
from moonbase.report.words import count, cut, enumerate_briefly, plural

SCALARS = ("loss", "mtp_loss", "balance_loss", "lr", "grad_norm", "update_rms", "tokens", "tokens_per_second", "mfu",
           "memory_bytes", "seconds", "validation_loss", "validation_bits_per_byte")
PER_LAYER = ("max_logit", "clipped_heads", "expert_load")
TEXT_LIMIT = 1500
"""Characters of one sample that the page shows."""
LARGEST = 1e30
"""Values from here on count as infinite: no axis could show them beside others."""
SAMPLES_BYTES = 64 << 20
RECIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl in columns. A value that was not recorded, or not finite, is NaN."""

    step: np.ndarray
    """int64 [n], strictly increasing."""
    scalars: dict[str, np.ndarray]
    """Name -> float64 [n]; only names with at least one finite value."""
    per_layer: dict[str, np.ndarray]
    """Name -> float32 [n, layers]; only names with at least one finite value."""
    skipped: tuple[tuple[int, str], ...]
    expert_share: tuple[int, list[np.ndarray]] | None
    """Step and, per MoE layer, the share of each expert (mean 1) of the last line that has it."""
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.step)

    def last(self, name: str) -> float | None:
        """The last finite value of a scalar."""
        values = self.scalars.get(name)
        return None if values is None else float(values[np.flatnonzero(np.isfinite(values))[-1]])


@dataclass(frozen=True)
class Sample:
    """One prompt and what the model made of it; `*_left_out` count the characters beyond TEXT_LIMIT."""

    prompt: str
    continuation: str
    prompt_left_out: int = 0
    continuation_left_out: int = 0


@dataclass
class SampleBlock:
    """The samples of one step."""

    title: str
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """Everything the page is made of."""

    folder_name: str
    facts: dict[str, Any]
    recipe: dict[str, Any] | None
    recipe_text: str
    metrics: Metrics
    samples: list[SampleBlock]
    notes: list[str]
    dialogues: list[Dialogue] = field(default_factory=list)
    base: RunRecord | None = None
    """The run inside this folder that it started from, if `base_run` of run.json names one."""


def read_run_folder(folder: Path) -> RunRecord:
    """Read the parts of a run folder. Never raises on their content."""
    notes: list[str] = []
    facts = _read_facts(folder / "run.json", notes)
    recipe, recipe_text = _read_recipe(folder / "config.yaml", notes)
    metrics = _read_metrics(folder / "metrics.jsonl")
    samples = _read_samples(folder / "samples.txt", notes)
    dialogues = read_examples(folder / "examples.json", notes)
    base, name = None, facts.get("base_run")
    # A plain name, so that no page shows what lies outside its folder; a base has no base of its own.
    if isinstance(name, str) and name == Path(name).name and (folder / name).is_dir() and name not in ("", ".", ".."):
        inner = folder / name
        base = RunRecord(name, _read_facts(inner / "run.json", notes), *_read_recipe(inner / "config.yaml", notes),
                         _read_metrics(inner / "metrics.jsonl"), [], [])
    return RunRecord(folder.resolve().name, facts, recipe, recipe_text, metrics, samples, notes + list(metrics.notes),
                     dialogues, base)


def number(value: Any) -> float | None:
    """A finite float, or None for anything else. Truth values are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def dig(value: Any, *path: str) -> Any:
    """The value under a path of keys, or None where any part of it is missing."""
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _read_facts(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append("run.json is missing: status, machine, versions and corpus are unknown.")
        return {}
    except (OSError, ValueError, RecursionError):
        notes.append("run.json cannot be read: status, machine, versions and corpus are unknown.")
        return {}
    if not isinstance(facts, dict):
        notes.append("run.json does not hold an object: status, machine, versions and corpus are unknown.")
        return {}
    return facts


def _read_recipe(path: Path, notes: list[str]) -> tuple[dict[str, Any] | None, str]:
    import yaml

    try:
        with open(path, "rb") as file:
            text = file.read(RECIPE_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        notes.append("config.yaml is missing: the configuration is unknown.")
        return None, ""
    except OSError:
        notes.append("config.yaml cannot be read: the configuration is unknown.")
        return None, ""
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        notes.append("config.yaml is not readable as a recipe; its text is shown as it is.")
        return None, text
    return recipe, text


def _read_metrics(path: Path) -> Metrics:
    """Columns from metrics.jsonl.

    A run that went on from a checkpoint may have written some steps twice. The later line counts, and lines of an
    earlier life beyond the point of return are dropped.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    unreadable, cut_short, returns, not_finite = 0, False, [], 0
    try:
        for line, complete in _lines(path):
            row = _parse_row(line)
            if row is None:
                cut_short, unreadable = cut_short or not complete, unreadable + complete
                continue
            step, values, bad = row
            not_finite += bad
            if rows and step < rows[-1][0]:
                returns.append(step)
                while rows and rows[-1][0] > step:
                    rows.pop()
            if rows and rows[-1][0] == step:
                rows[-1][1].update(values)
            else:
                rows.append((step, values))
        notes = [] if rows else ["metrics.jsonl holds no training step: there are no curves to show."]
    except FileNotFoundError:
        notes = ["metrics.jsonl is missing: there are no curves to show."]
    except OSError as error:
        notes = [f"metrics.jsonl cannot be read to its end ({error.strerror})."]
    if cut_short:
        notes.append("The last line of metrics.jsonl is cut short, as a crash leaves it; it is left out.")
    if unreadable:
        verb = "is" if unreadable == 1 else "are"
        notes.append(f"{plural(unreadable, 'line')} of metrics.jsonl cannot be read and {verb} left out.")
    if returns:
        notes.append(f"The run went back to an earlier step {plural(len(returns), 'time')}, continuing at step "
                     f"{enumerate_briefly([count(step) for step in returns])}; superseded lines are left out.")
    if not_finite:
        notes.append(f"{plural(not_finite, 'recorded value')} {'is' if not_finite == 1 else 'are'} NaN or infinite and "
                     "left out of the curves.")
    return _columns(rows, tuple(notes))


def _lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Non-empty lines and whether each ends in a line break."""
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                yield line, line.endswith(b"\n")


def _parse_row(line: bytes) -> tuple[int, dict[str, Any], int] | None:
    """(step, the values that are of the right kind, how many were NaN or infinite), or None for an unreadable line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = number(record.get("step"))
    if step is None or step != int(step) or not 0 <= step < 2**53:
        return None
    values: dict[str, Any] = {}
    bad = 0
    for name in SCALARS:
        if name in record:
            value = number(record[name])
            if value is not None and abs(value) < LARGEST:
                values[name] = value
            elif isinstance(record[name], float):
                bad += 1
    for name in PER_LAYER:
        row = _floats(record.get(name))
        if row is not None:
            missing = len(row) - int(np.count_nonzero(np.isfinite(row)))
            bad += missing - record[name].count(None) if missing else 0
            values[name] = row
    if isinstance(record.get("expert_share"), list):
        shares = [_floats(layer) for layer in record["expert_share"]]
        values["expert_share"] = [share for share in shares if share is not None]
    if record.get("skipped"):
        values["skipped"] = str(record["skipped"])
        # A step is skipped because of such values; its reason says so already.
        bad = 0
    return int(step), values, bad


def _floats(value: Any) -> np.ndarray | None:
    """A flat list of numbers as float32, with NaN for anything that is not finite; None for anything but a list."""
    if not isinstance(value, list) or not value:
        return None
    try:
        row = np.asarray(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    if row.ndim != 1:
        return None
    return np.where(np.abs(row) < LARGEST, row, np.nan).astype(np.float32)


def _columns(rows: list[tuple[int, dict[str, Any]]], notes: tuple[str, ...]) -> Metrics:
    scalars, per_layer = {}, {}
    for name in SCALARS:
        column = np.array([values.get(name, np.nan) for _, values in rows], dtype=np.float64)
        if np.isfinite(column).any():
            scalars[name] = column
    for name in PER_LAYER:
        width = max((len(values[name]) for _, values in rows if name in values), default=0)
        matrix = np.full((len(rows), width), np.nan, dtype=np.float32)
        for index, (_, values) in enumerate(rows):
            if name in values:
                matrix[index, : len(values[name])] = values[name]
        if np.isfinite(matrix).any():
            per_layer[name] = matrix
    skipped = tuple((step, values["skipped"]) for step, values in rows if "skipped" in values)
    share = None
    for step, values in reversed(rows):
        if any(np.isfinite(layer).any() for layer in values.get("expert_share", [])):
            share = (step, values["expert_share"])
            break
    return Metrics(np.array([step for step, _ in rows], dtype=np.int64), scalars, per_layer, skipped, share, notes)


def _read_samples(path: Path, notes: list[str]) -> list[SampleBlock]:
    """Blocks of `=== step 123 | temperature 0.0` with `>>> PROMPT` and `... CONTINUATION` lines, both JSON strings."""
    try:
        with open(path, "rb") as file:
            content = file.read(SAMPLES_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError:
        notes.append("samples.txt cannot be read.")
        return []
    if len(content) > SAMPLES_BYTES:
        notes.append(f"samples.txt is longer than {count(SAMPLES_BYTES / 2**20)} MiB; only its beginning was read.")
    blocks: list[SampleBlock] = []
    prompt: str | None = None
    for line in content[:SAMPLES_BYTES].decode("utf-8", errors="replace").split("\n"):
        if line.startswith("=== "):
            blocks.append(SampleBlock(line[4:].strip()[:200].replace(" | ", ", ")))
            prompt = None
        elif line.startswith(">>> "):
            prompt = _string(line[4:])
        elif line.startswith("... ") and prompt is not None:
            if not blocks:
                blocks.append(SampleBlock("step unknown"))
            shown_prompt, prompt_left_out = cut(prompt, TEXT_LIMIT)
            shown, left_out = cut(_string(line[4:]), TEXT_LIMIT)
            blocks[-1].samples.append(Sample(shown_prompt, shown, prompt_left_out, left_out))
            prompt = None
    return [block for block in blocks if block.samples]


def _string(text: str) -> str:
    """A JSON string; text that is none (a crash cut it short, say) as it stands."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text.removeprefix('"')
    return value if isinstance(value, str) else text
