"""From a run folder to its page: what is said, in which order, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.files import write_text
from moonbase.report import words
from moonbase.report.run_folder import Metrics, RunRecord, SampleBlock, dig, number, read_run_folder

_HERE = Path(__file__).parent
_EARLIER_BLOCKS = 8
_MAX_FIELDS = 1000
_MAX_NAMES = 200
_STATUS = {"running": "unfinished", "finished": "finished", "stopped": "stopped", "failed": "failed"}


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all, and return its path.

    Every part of the folder may be missing or cut short; the page says what is absent. The same folder content gives
    the same bytes. Raises UserError where the folder does not exist or cannot be written.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise UserError(f"{run_folder}: no such run folder")
    path = run_folder / "report.html"
    write_text(path, render_page(read_run_folder(run_folder)))
    return path


def render_page(run: RunRecord) -> str:
    """The whole page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        # Drawings and the style sheet are ours; everything else may hold anything.
        return value if isinstance(value, Markup) else words.visible(str(value))

    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, finalize=finalize,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["drawing"] = Markup
    style = Markup((_HERE / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("template.html.jinja").render(style=style, words=words, **page_content(run))


def page_content(run: RunRecord) -> dict[str, Any]:
    """Everything the template needs; no markup except the drawings."""
    metrics, facts = run.metrics, run.facts
    name = _text(facts.get("name")) or _text(dig(run.recipe, "name")) or run.folder_name
    notes = _status_notes(run) + run.notes
    if _bits(run)[1] is None:
        notes.append("No validation was recorded: there are no bits per byte.")
    return {
        "name": name, "status": _STATUS.get(_text(facts.get("status")), "status unknown"), "outcome": _outcome(run),
        "started": _moment(facts.get("started")), "finished": _moment(facts.get("finished")), "notes": notes,
        "tiles": _tiles(run), "skipped_steps": _skipped_steps(metrics), **_charts(run), **_samples(run.samples),
        "dialogues": run.dialogues, **_questions(facts), "base": _base(run.base),
        "corpus": _corpus(facts.get("corpus")),
        "configuration": _configuration(run.recipe), "recipe_text": run.recipe_text,
        "machine": _machine(facts), "versions": _pairs(facts.get("versions")), "results": _pairs(facts.get("results")),
        "command": _text(facts.get("command")), "next_commands": _strings(facts.get("next_commands")),
    }


def _text(value: Any) -> str:
    """A short text from outside; a list is a command's words."""
    if isinstance(value, list):
        value = " ".join(str(item) for item in value)
    return "" if value is None or isinstance(value, dict) else words.cut(str(value), 4000)[0]


def _strings(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [text for text in (_text(item) for item in items[:50]) if text]


def _moment(value: Any) -> str:
    """An ISO time as people write it: '2026-01-31 14:05:09 UTC'."""
    from datetime import datetime, timedelta

    text = _text(value)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = "" if moment.tzinfo is None else " UTC" if moment.utcoffset() == timedelta(0) else moment.strftime(" %z")
    return moment.strftime("%Y-%m-%d %H:%M:%S") + zone


def _last_step(metrics: Metrics) -> int:
    return int(metrics.step[-1]) if len(metrics) else 0


def _bits(run: RunRecord) -> tuple[float | None, float | None]:
    """(first, last) bits per byte; the last one from the results where they name it."""
    recorded = run.metrics.scalars.get("validation_bits_per_byte")
    first = last = None
    if recorded is not None:
        finite = recorded[recorded == recorded]
        first, last = float(finite[0]), float(finite[-1])
        first = first if len(finite) > 1 else None
    final = number(dig(run.facts, "results", "validation_bits_per_byte"))
    return first, last if final is None else final


def _outcome(run: RunRecord) -> str:
    """One sentence: how large, how long, how well."""
    facts, parts = run.facts, []
    parameters, active = number(facts.get("parameters")), number(facts.get("active_parameters"))
    if parameters is not None:
        of_these = f" ({words.compact(active)} active)" if active is not None else ""
        parts.append(f"{words.compact(parameters)} parameters{of_these}")
    parts.append(words.plural(_last_step(run.metrics), "step") if len(run.metrics) else "no training step recorded")
    first, last = _bits(run)
    xz = number(dig(facts, "results", "xz_bits_per_byte"))
    if last is not None:
        change = f"{words.fixed(first)} → " if first is not None else ""
        comparison = f" (xz\u00a0−9:\u00a0{words.fixed(xz)})" if xz is not None else ""
        parts.append(f"{change}{words.fixed(last)} bits per byte on {_held_out(run)}{comparison}")
    right = number(dig(facts, "results", "tool_questions", "right"))
    if right is not None:
        parts.append(f"{right:.1%} of held-out tool questions right")
    return " · ".join(parts)


def _held_out(run: RunRecord) -> str:
    """What a run is measured on."""
    return "held-out replies" if dig(run.recipe, "stage") == "sft" else "held-out files"


def _questions(facts: dict[str, Any]) -> dict[str, Any]:
    """How many of the held-out questions went right, in one sentence and kind by kind."""
    found = dig(facts, "results", "tool_questions")
    total, right, calls = (number(dig(found, name)) for name in ("questions", "right", "right_calls"))
    if total is None or right is None:
        return {"questions": "", "question_kinds": []}
    sentence = f"{words.count(total)} questions that are in no training dialogue, answered greedily: {right:.1%} right"
    if calls is not None:
        sentence += f", through the right tool call in {calls:.1%}"
    groups = list((dig(found, "by_kind") or {}).items())[:20] if isinstance(dig(found, "by_kind"), dict) else []
    groups.append(("asked in new words", dig(found, "new_phrasings")))
    kinds = [(words.cut(str(kind), 100)[0], words.count(asked), f"{share:.1%}") for kind, group in groups
             if (asked := number(dig(group, "questions"))) and (share := number(dig(group, "right"))) is not None]
    return {"questions": sentence + ".", "question_kinds": kinds}


def _base(run: RunRecord | None) -> dict[str, Any] | None:
    """The run that this one started from: its sentence and how it learnt."""
    if run is None or not len(run.metrics):
        return None
    import re
    from dataclasses import replace

    def renamed(drawing: str | None) -> str | None:
        """The names inside a drawing, which must differ from those of this run's own chart of the same kind."""
        return drawing and re.sub(r'(\bid="|#)(?=[a-z-]+-[wc]-\d)', r"\1base-", drawing)

    charts = [replace(chart, key=f"base-{chart.key}", wide=renamed(chart.wide), compact=renamed(chart.compact))
              for chart in _charts(run)["learning"]]
    return {"folder": run.folder_name, "outcome": _outcome(run), "charts": charts}


def _status_notes(run: RunRecord) -> list[str]:
    status, reason = _text(run.facts.get("status")), _text(run.facts.get("reason"))
    planned = number(dig(run.recipe, "steps"))
    last, notes = _last_step(run.metrics), []
    of_planned = f" of {words.count(planned)}" if planned is not None else ""
    if status == "running":
        notes.append(f"The run had not ended when this page was written: step {words.count(last)}{of_planned}.")
    elif status in ("stopped", "failed"):
        ended = "was stopped" if status == "stopped" else "failed"
        notes.append(f"The run {ended} at step {words.count(last)}{of_planned}" + (f": {reason}" if reason else "."))
    elif reason:
        notes.append(reason)
    return notes


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """(label, value, note) of the key figures that are known."""
    metrics, facts, tiles = run.metrics, run.facts, []

    def add(label: str, value: float | None, write: Any, note: str = "") -> None:
        if value is not None:
            tiles.append((label, write(value), note))

    results = facts.get("results")
    xz, uniform = number(dig(results, "xz_bits_per_byte")), number(dig(results, "uniform_bits_per_byte"))
    best = number(dig(results, "best_step"))
    beside = [f"xz\u00a0−9:\u00a0{words.fixed(xz)}"] if xz is not None else []
    beside += [f"uniform:\u00a0{words.fixed(uniform)}"] if uniform is not None else []
    beside += [f"best at step {words.count(best)}"] if best is not None and not beside else []
    right = number(dig(results, "tool_questions", "right"))
    add("Tool questions", right, lambda value: f"{value:.1%}", "held out, right call and answer")
    add("Bits per byte", _bits(run)[1], words.fixed, ", ".join(beside) or _held_out(run))
    add("Held-out loss", metrics.last("validation_loss"), words.fixed, "nats per token")
    active = number(facts.get("active_parameters"))
    add("Parameters", number(facts.get("parameters")), words.compact,
        f"{words.compact(active)} active per token" if active is not None else "")
    planned = number(dig(run.recipe, "steps"))
    about_steps = [f"of {words.count(planned)} planned"] if planned is not None else []
    about_steps += [f"{words.count(len(metrics.skipped)) if metrics.skipped else 'none'} skipped"] if metrics else []
    add("Steps", float(_last_step(metrics)), words.count, ", ".join(about_steps))
    add("Tokens seen", metrics.last("tokens"), words.compact)
    seconds = number(facts.get("seconds"))
    cores = number(dig(facts, "machine", "cores"))
    add("Time", metrics.last("seconds") if seconds is None else seconds, words.duration,
        _text(dig(facts, "machine", "gpu")) or (words.plural(cores, "core") if cores is not None else ""))
    speeds = metrics.scalars.get("tokens_per_second")
    utilisation = metrics.last("mfu")
    if speeds is not None:
        import numpy as np

        add("Tokens per second", float(np.nanmedian(speeds)), words.compact,
            f"median; MFU {utilisation:.0%}" if utilisation is not None else "median")
    logits, load = metrics.per_layer.get("max_logit"), metrics.per_layer.get("expert_load")
    if logits is not None:
        tau = _tau(run)
        # Up to τ a bound is recorded, the largest log-sum-exp: nobody needs to know more exactly.
        add("Largest logit", float(logits[logits == logits].max()), words.compact,
            f"at most; τ = {words.compact(tau)}" if tau is not None else "")
    add("Experts in INT4", _int4_from(run), lambda step: f"step {words.count(step)} on",
        _text(dig(run.recipe, "qat", "rule")))
    if load is not None:
        last = load[(load == load).any(axis=1)][-1]
        add("Expert load", float(last[last == last].max()), words.fixed, "busiest ÷ mean, at the end")
    return tiles


def _int4_from(run: RunRecord) -> float | None:
    """The first step, counted from one as the charts do, whose experts compute in INT4."""
    first = number(dig(run.recipe, "qat", "start_step"))
    return None if first is None else first + 1


def _tau(run: RunRecord) -> float | None:
    return number(dig(run.recipe, "optimizer", "qk_clip"))


def _charts(run: RunRecord) -> dict[str, Any]:
    """The charts, and for each that cannot be drawn what was not recorded."""
    from moonbase.report import figures

    metrics = run.metrics
    layers = int(number(dig(run.recipe, "model", "num_hidden_layers")) or 0)
    modules = int(number(dig(run.recipe, "model", "num_nextn_predict_layers")) or 0)
    dense = int(number(dig(run.recipe, "model", "first_k_dense_replace")) or 0)

    def names(number_of_rows: int, first: int) -> list[str]:
        """Layers by their number in the checkpoint; rows beyond the last decoder layer are MTP modules."""
        rows = range(first, first + number_of_rows)
        return [f"MTP {row - layers}" if layers <= row < layers + modules else f"layer {row}" for row in rows]

    def width(name: str) -> int:
        return metrics.per_layer[name].shape[1] if name in metrics.per_layer else 0

    xz = number(dig(run.facts, "results", "xz_bits_per_byte"))
    share_rows = len(metrics.expert_share[1]) if metrics.expert_share else 0
    drawn = (
        ("loss", figures.loss_chart(metrics, _held_out(run), _int4_from(run))),
        ("bits per byte", figures.bits_chart(metrics, xz, _held_out(run))),
        ("attention logits", figures.logit_chart(metrics, _tau(run), names(width("max_logit"), 0))),
        ("expert load", figures.load_chart(metrics, names(width("expert_load"), dense))),
        ("expert share", figures.share_chart(metrics, names(share_rows, dense))),
    )
    small = figures.small_charts(metrics)
    absent = [name for name, chart in drawn if chart is None]
    expected = {"lr": "learning rate", "grad_norm": "gradient norm", "update_rms": "update RMS",
                "tokens_per_second": "throughput"}
    absent += [title for key, title in expected.items() if key not in metrics.scalars]
    charts = {name: chart for name, chart in drawn if chart is not None}
    return {"learning": [charts[name] for name in ("loss", "bits per byte") if name in charts],
            "inside": [charts[name] for name in ("attention logits", "expert load", "expert share") if name in charts],
            "small_charts": small, "absent_charts": absent}


def _skipped_steps(metrics: Metrics) -> list[tuple[str, int, str]]:
    """(reason, how often, which steps), the commonest reason first."""
    by_reason: dict[str, list[int]] = {}
    for step, reason in metrics.skipped:
        by_reason.setdefault(words.cut(reason, 300)[0], []).append(step)
    ordered = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))[:50]
    return [(reason, len(steps), words.enumerate_briefly([words.count(step) for step in steps], 12))
            for reason, steps in ordered]


def _samples(blocks: list[SampleBlock]) -> dict[str, Any]:
    """The last block, and evenly chosen earlier ones, latest first."""
    earlier = blocks[:-1]
    if len(earlier) > _EARLIER_BLOCKS:
        spread = {round(index * (len(earlier) - 1) / (_EARLIER_BLOCKS - 1)) for index in range(_EARLIER_BLOCKS)}
        earlier = [earlier[index] for index in sorted(spread)]
    return {"last_samples": blocks[-1] if blocks else None, "earlier_samples": earlier[::-1],
            "samples_left_out": max(0, len(blocks) - 1 - len(earlier))}


def _corpus(corpus: Any) -> dict[str, Any] | None:
    if not isinstance(corpus, dict) or not corpus:
        return None
    known = (("documents", "Documents", words.count), ("bytes", "Text", words.byte_size),
             ("tokens", "Tokens", words.compact), ("bytes_per_token", "Bytes per token", words.fixed),
             ("validation_documents", "Held-out documents", words.count),
             ("validation_bytes", "Held-out text", words.byte_size))
    totals = [(label, write(value)) for key, label, write in known if (value := number(corpus.get(key))) is not None]
    listed = corpus.get("sources") if isinstance(corpus.get("sources"), list) else []
    sources = []
    for source in listed[:200]:
        columns = [number(dig(source, key)) for key in ("documents", "bytes", "tokens")]
        writers = (words.count, words.byte_size, words.compact)
        written = ["–" if value is None else write(value) for write, value in zip(writers, columns, strict=True)]
        sources.append((_text(dig(source, "path")) or "unnamed", written))
    return {"totals": totals, "sources": sources, "sources_left_out": max(0, len(listed) - 200),
            "skipped": _skipped_files(corpus.get("skipped"))}


def _skipped_files(skipped: Any) -> list[dict[str, Any]]:
    reasons = []
    for reason, entry in list(skipped.items())[:100] if isinstance(skipped, dict) else []:
        listed = dig(entry, "names")
        names = [words.cut(str(item), 500)[0] for item in listed] if isinstance(listed, list) else []
        total = number(dig(entry, "count")) if isinstance(entry, dict) else number(entry)
        total = len(names) if total is None else total
        shown = names[:_MAX_NAMES]
        reasons.append({"reason": _text(reason), "count": total, "names": shown,
                        "left_out": max(0, int(total) - len(shown))})
    return sorted(reasons, key=lambda item: (-item["count"], item["reason"]))


def _configuration(recipe: dict[str, Any] | None) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every field of the recipe, flattened to dotted names and grouped by its first part."""
    groups: dict[str, list[tuple[str, str]]] = {}
    budget = _MAX_FIELDS

    def visit(group: str, name: str, value: Any, depth: int) -> None:
        nonlocal budget
        if budget <= 0:
            return
        if isinstance(value, dict) and value and depth < 8:
            for key, item in value.items():
                visit(group, f"{name}.{key}" if name else str(key), item, depth + 1)
            return
        if isinstance(value, list) and any(isinstance(item, dict) for item in value) and depth < 8:
            for index, item in enumerate(value):
                visit(group, f"{name}.{index}", item, depth + 1)
            return
        budget -= 1
        groups.setdefault(group, []).append((name, _plain(value)))

    for key, value in (recipe or {}).items():
        nested = isinstance(value, dict) and value
        visit(str(key) if nested else "run", "" if nested else str(key), value, 0)
    return list(groups.items())


def _plain(value: Any) -> str:
    """A field's value as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        written = ", ".join(repr(item) if isinstance(item, str) else str(item) for item in value[:100])
        return words.cut(written, 1000)[0] or "none"
    return words.cut(repr(value) if isinstance(value, str) and value != value.strip() else str(value), 1000)[0]


def _machine(facts: dict[str, Any]) -> list[tuple[str, str]]:
    machine = facts.get("machine")
    memory = number(dig(machine, "memory_bytes"))
    rows = [("Processor", _text(dig(machine, "cpu"))), ("Cores", _text(dig(machine, "cores"))),
            ("Memory", f"{memory / 2**30:.1f} GiB" if memory is not None else ""), ("GPU", _text(dig(machine, "gpu"))),
            ("System", _text(dig(machine, "os"))), ("Commit", _text(facts.get("commit")))]
    return [(label, value) for label, value in rows if value]


def _pairs(values: Any) -> list[tuple[str, str]]:
    """The simple entries of an object from outside, in its order."""
    if not isinstance(values, dict):
        return []
    return [(str(key), words.compact(value) if isinstance(value, float) else _text(value))
            for key, value in list(values.items())[:100] if not isinstance(value, dict) and _text(value)]
