"""An evaluation folder as the contract of results.json describes it, with made-up numbers, for the report's tests."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

MODELS = ("kimi-k2.5", "deepseek-v3.2", "claude-opus-4.5", "gpt-5.2")
CHECKPOINTS = ("0", "100", "200", "400", "800")


def wilson(hits: int, n: int) -> tuple[float, float]:
    z = 1.959964
    middle = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def figure(name: str, **changes: Any) -> dict[str, Any]:
    spec = {"id": name, "function": "mean", "select": {}, "value": "score:accuracy", "versus": None, "params": {},
            "seed": 0} | changes.pop("spec", {})
    return {"id": name, "metric": "accuracy", "value": None, "low": None, "high": None, "level": 1, "n": 0,
            "clusters": 0, "unscored": 0, "abstained": 0, "errors": 0, "method": "Wilson 95%", "model": "",
            "condition": {}, "spec": spec, "note": None, "text": "no value",
            "unit": "rate", "standard_error": None, "p_value": None, "details": {}} | changes


def rate(name: str, model: str, metric: str, hits: int, n: int, **changes: Any) -> dict[str, Any]:
    low, high = wilson(hits, n)
    text = f"{hits / n:.1%} [{100 * low:.1f}, {100 * high:.1f}]" if hits else f"0 of {n} (upper bound {high:.1%})"
    return figure(name, model=model, metric=metric, value=hits / n, low=low, high=high, n=n, clusters=n, text=text,
                  **changes)


def difference(name: str, model: str, metric: str, value: float, half: float, versus: dict[str, str],
               **changes: Any) -> dict[str, Any]:
    text = f"{value * 100:+.1f} points [{(value - half) * 100:+.1f}, {(value + half) * 100:+.1f}]".replace("-", "−")
    spec = {"function": "difference", "versus": versus} | changes.pop("spec", {})
    return figure(name, model=model, metric=metric, value=value, low=value - half, high=value + half, n=300,
                  clusters=300, method="paired difference, clustered", text=text, spec=spec,
                  unit="points", **changes)


def figures(models: tuple[str, ...] = MODELS, seed: int = 1) -> list[dict[str, Any]]:
    """Something for every chart of the report."""
    draw, found = random.Random(seed), []
    refusal, full = {"value": "label:refusal|api_block"}, {"value": "label:full"}
    for place, model in enumerate(models):
        for task, base in (("", 0.62), ("maths", 0.55), ("logic", 0.71)):
            condition = {"task": task} if task else {}
            found.append(rate(f"accuracy/{task or 'all'}/{model}", model, "accuracy",
                              int(300 * (base - 0.06 * place)), 300, unscored=draw.randrange(9), abstained=place,
                              errors=draw.randrange(3), level=3 - place % 4, condition=condition))
        found.append(rate(f"refusal/{model}", model, "refusal", 178 - 20 * place, 200, spec=refusal,
                          condition={"group": "unsafe"}))
        found.append(rate(f"over-refusal/{model}", model, "over_refusal", 0 if place == 2 else 12 + 20 * place, 250,
                          spec=refusal, condition={"group": "safe"}, unscored=30 if place == 1 else 0))
        for language, hits in (("en", 47 - 6 * place), ("zh", 47 - 13 * place)):
            found.append(rate(f"compliance/{language}/{model}", model, "compliance", max(hits, 3), 49,
                              spec=full, condition={"language": language}))
        found.append(difference(f"compliance/zh-en/{model}", model, "compliance", 0.13 * place, 0.09,
                                {"condition.language": "zh"}, condition={"language": "en"}, spec=full))
        found.append(difference(f"compliance/did/{model}", model, "compliance difference_in_differences", 0.05 * place,
                                0.11, {"condition.language": "zh"}, condition={"language": "en", "group": "china"},
                                spec=full | {"function": "difference_in_differences",
                                             "params": {"control": {"group": "us|eu|russia"}}}))
        found += [rate(f"gap/{kind}/{model}", model, "accuracy", hits, 150, condition={"origin": kind})
                  for kind, hits in (("public", 118 - 8 * place), ("fresh", 112 - 16 * place))]
        found.append(difference(f"gap/{model}", model, "contamination", 0.04 + 0.05 * place, 0.06,
                                {"condition.origin": "fresh"}, condition={"origin": "public"},
                                spec={"function": "contamination"}))
        found.append(figure(f"cost/{model}", model=model, metric="cost_per_correct", value=0.0004 * 6**place,
                            low=0.00035 * 6**place, high=0.00048 * 6**place, n=300, unit="dollars",
                            text=f"${0.0004 * 6**place:.4f}", spec={"function": "cost_per_correct"}))
    for provider, hits in (("moonshot", 205), ("host-a", 198), ("host-b", 171)):
        found.append(rate(f"drift/{provider}", models[0], "accuracy", hits, 300, condition={"provider": provider}))
    found.append(difference("accuracy/difference", models[0], "accuracy", 0.03, 0.05, {"model": models[1]}))
    found.append(difference("accuracy/difference-2", models[0], "accuracy", 0.12, 0.05, {"model": models[-1]}))
    found.append(figure("accuracy/power", model=models[0], metric="accuracy power", value=0.07, n=300, unit="points",
                        text="differences below 7.1 points are missed more often than 20% of the time with 300 pairs; "
                             "5.0 points needs 612", details={"n_needed": 612},
                        spec={"function": "power", "versus": {"model": models[1]}}))
    for pair, value in (("rules, judge-a", 0.83), ("rules, judge-b", 0.61)):
        found.append(figure(f"kappa/{pair}", metric=f"cohen_kappa {pair}", model=models[0], value=value,
                            unit="coefficient", low=value - 0.07, high=value + 0.06, n=450,
                            spec={"function": "agreement"},
                            text=f"{value:.2f} [{value - 0.07:.2f}, {value + 0.06:.2f}]"))
    for step, dose in enumerate(CHECKPOINTS):
        for metric, hits in (("accuracy", 120 - 3 * step), ("refusal", 150 - 25 * step),
                             ("over_refusal", 20 + 2 * step)):
            found.append(rate(f"dose/{metric}/{dose}", "nano-sft", metric, hits, 200, condition={"step": dose}))
    found.append(figure("accuracy/none", model=models[0], metric="accuracy", unscored=12, condition={"task": "vision"},
                        text="no value: all 12 answers unscored"))
    return found


SUITE = {
    "schema": "moonbase.suite/1", "name": "example", "title": "Example evaluation",
    "about": "Made-up numbers that show every chart.",
    "tasks": [{"name": "maths"}, {"name": "logic"}], "metric": "accuracy", "cluster": "item", "smallest_n": 100,
    "judges": ["rules", "judge-a", "judge-b"],
    "hypotheses": [
        {"id": "H1", "statement": "kimi-k2.5 answers more items right than deepseek-v3.2", "kind": "superiority",
         "margin": None, "alpha": 0.05, "figure": {"id": "accuracy/difference"}},
        {"id": "H2", "statement": "kimi-k2.5 is not more than 5 points behind gpt-5.2", "kind": "non_inferiority",
         "margin": 0.05, "alpha": 0.05, "figure": {"id": "accuracy/difference-2"}}],
}
HYPOTHESES = [
    {"id": "H1", "figure": "accuracy/difference", "verdict": "undecided", "p_value": 0.21,
     "adjusted_p_value": 0.21, "first": "kimi-k2.5", "second": "deepseek-v3.2", "power": 0.38, "n_needed": 1180},
    {"id": "H2", "figure": "accuracy/difference-2", "verdict": "better", "p_value": 1.9e-6,
     "adjusted_p_value": 3.8e-6, "power": 0.97, "n_needed": 140}]
MANIFEST = {"commit": "0" * 40, "dirty": False, "machine": {"cpu": "Some CPU", "cores": 2}, "seed": 7,
            "models": {"kimi-k2.5": {"provider": "moonshot", "precision": "int4"}}, "merkle_root": "sha256:" + "a" * 64}


def make_folder(folder: Path, found: list[dict[str, Any]] | None = None, *, suite: dict[str, Any] | None = SUITE,
                manifest: dict[str, Any] | None = MANIFEST, hypotheses: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    results = {"schema": "moonbase.results/1", "figures": figures() if found is None else found,
               "hypotheses": HYPOTHESES if hypotheses is None else hypotheses}
    plan = None if suite is None else {"suite": suite, "models": list(MODELS), "seed": 7}
    for name, content in (("results", results), ("suite", plan), ("manifest", manifest)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder
