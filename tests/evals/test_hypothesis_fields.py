"""What `eval` accepts of a hypothesis, `compare` and `diff-ft` bear, too; and a rate of one model decides nothing."""

from __future__ import annotations

import json
import random
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from moonbase.errors import UserError
from moonbase.evals.comparison import compare, hypotheses_of
from moonbase.evals.evaluation import check_hypotheses, summarise
from moonbase.evals.figure_functions import FUNCTIONS
from moonbase.evals.figures import FigureSpec, Table, compute
from moonbase.evals.fine_tuning import diff
from moonbase.evals.records import Record
from moonbase.evals.suite import Hypothesis, Suite, TaskSpec
from tests.evals.figure_samples import record, write_folder

KINDS = (("superiority", None, 0.05), ("superiority", 0.1, 0.05), ("non_inferiority", 0.1, 0.05),
         ("non_inferiority", 0.0, 0.9), ("equivalence", 0.1, 0.9), ("equivalence", 2.0, 1e-6))
VERSUS = (None, {}, {"condition.language": "en"}, {"group": "us"}, {"model": "b"}, {"model": "nobody"}, {"task": "t"})
SELECT = ({}, {"group": "china", "condition.language": "zh"}, {"model": "a"}, {"group": "nobody"})
VALUES = ("score:accuracy", "label:full", "vote:judge=full", "cost", "")
PARAMS = ({}, *({"pair": pair} for pair in ("none", "item", "cluster", "group", "task", "nothing")), {"reference": 0.5},
          {"cluster": "item"}, {"cluster": "nothing"}, {"confidence": 0.8}, {"confidence": 2}, {"expects": "worse"},
          {"higher_is_better": False}, {"second": {"group": "us"}, "second_control": {"group": "china"}}, {"k": 9},
          {"metric": 5}, {"member": "rules"}, {"judges": ["rules", "judge"]}, {"threshold": 0.5}, {"within": True})
NEEDED = {"difference_in_differences": {"control": {"group": "us"}}, "pass_at_k": {"k": 1}, "pass_hat_k": {"k": 1},
          "corrected_rate": {"true_positives": 9, "positives": 10, "true_negatives": 8, "negatives": 9},
          "members": {"against": "vote:judge=full"}, "bootstrap": {"resamples": 9},
          "agreement": {"kind": "raw"}, "slope": {"along": "condition.language", "doses": {"en": 0, "zh": 1}}}
TRIED = 500


def answers(model: str, seed: int, items: int = 8) -> list[Record]:
    rng = np.random.default_rng(seed)
    return [record(f"{group}{item}", model=model, group=group, cluster=f"form{item}", sample=sample, cost=0.01,
                   condition={"language": language}, label="full" if rng.random() < 0.7 else "refusal",
                   votes={"rules": "full", "judge": "full" if rng.random() < 0.7 else "evasive"},
                   scores={"accuracy": float(rng.random() < 0.6)})
            for item in range(items) for group in ("us", "china") for language in ("en", "zh") for sample in range(2)]


def suite_with(*hypotheses: Hypothesis) -> Suite:
    return Suite(name="s", title="s", tasks=(TaskSpec(name="t", source="builtin:t"),), metric="accuracy",
                 hypotheses=hypotheses, smallest_n=3)


def test_what_eval_accepts_compare_bears(tmp_path: Path) -> None:
    """Some of all combinations of what can be written; the same ones each time."""
    both = {model: answers(model, seed) for seed, model in enumerate("ab")}
    folders = [write_folder(tmp_path / model, records) for model, records in both.items()]
    one, two = Table.of(both["a"]), Table.of(both["a"] + both["b"])
    written = list(product(FUNCTIONS, KINDS, VERSUS, SELECT, VALUES, PARAMS))
    accepted = []
    for function, (kind, margin, alpha), versus, select, value, params in random.Random(1).sample(written, TRIED):
        figure = {"id": "f", "function": function, "select": select, "versus": versus, "value": value,
                  "params": NEEDED.get(function, {}) | params}
        hypothesis = Hypothesis(id=f"h{len(accepted)}", statement="s", kind=kind, margin=margin, alpha=alpha,
                                figure=figure)
        try:
            check_hypotheses(suite_with(hypothesis))
            for table in (one, two):
                hypotheses_of(suite_with(hypothesis), table)
        except UserError:
            continue
        accepted.append(hypothesis)
    assert len(accepted) > TRIED / 3
    suite = suite_with(*accepted)
    found = compare(folders, suite=suite)
    json.dumps(found.as_json(), allow_nan=False)
    for verdict in found.verdicts:
        spec = verdict.figure.spec
        held = spec.function in ("difference", "contamination", "difference_in_differences", "members", "slope")
        if verdict.p_value is None or not (held or "reference" in spec.params):
            assert verdict.verdict == "undecided", verdict.text
    json.dumps(diff(folders[0], folders[1:], suite=suite).as_json(), allow_nan=False)


@pytest.mark.parametrize("triple", [False, True])
def test_differences_of_differences_between_different_items(triple: bool) -> None:
    """`pair: none` takes the means of all sides; with a cluster for each answer their variances add up (Welch)."""
    records = [one for seed, model in enumerate("ab") for one in answers(model, seed, 20)]
    table = Table.of(one.model_copy(update={"cluster": str(place)}) for place, one in enumerate(records))
    control, second = {"condition.language": "en"}, {"model": "b"}
    params = {"pair": "none", "control": control} | (
        {"second": second, "second_control": second | control} if triple else {})
    spec = FigureSpec("f", "difference_in_differences", {"model": "a", "group": "china", "condition.language": "zh"},
                      "score:accuracy", {"group": "us"}, params)
    found, value, variance, count = compute(spec, table), 0.0, 0.0, 0
    for model, group, language in product("ab" if triple else "a", ("china", "us"), ("zh", "en")):
        side = np.array([one.scores["accuracy"] for one in records
                         if (one.model, one.group, one.condition["language"]) == (model, group, language)])
        sign = (1 if model == "a" else -1) * (1 if group == "china" else -1) * (1 if language == "zh" else -1)
        value, variance, count = value + sign * side.mean(), variance + side.var() / len(side), count + len(side)
    error = np.sqrt(variance * count / (count - 1))
    assert (found.value, found.standard_error, found.n) == pytest.approx((value, error, count), rel=1e-9)
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(value) / error, count - 1), rel=1e-8)


def test_a_rate_by_itself_has_no_verdict_anywhere_and_takes_no_part_in_holm(tmp_path: Path) -> None:
    """Of one evaluated model, in every kind: beside it, what is held against something is corrected as if alone."""
    rate = {"id": "rate", "function": "mean", "value": "score:accuracy"}
    alone = [Hypothesis(id=kind, statement=f"often, {kind}", kind=kind, margin=0.05, figure=rate)
             for kind in ("superiority", "non_inferiority", "equivalence")]
    named = Hypothesis(id="named", statement="often, it", kind="non_inferiority", margin=0.05,
                       figure=rate | {"select": {"model": "a"}})
    held = [Hypothesis(id=f"held {rate_}", statement=f"held {rate_}", figure=rate | {"params": {"reference": rate_}})
            for rate_ in (0.5, 0.7)]
    suite = suite_with(*alone, *held, named)
    folder = write_folder(tmp_path / "a", answers("a", 1, 20))
    (folder / "suite.json").write_text(json.dumps({"suite": suite.canonical(), "models": ["a"]}))
    verdicts = {one["id"]: one for one in summarise(folder)["verdicts"]}
    assert json.loads((folder / "results.json").read_text())["hypotheses"] == list(verdicts.values())
    raw = [verdicts[one.id]["p_value"] for one in held]
    assert [verdicts[one.id]["adjusted_p_value"] for one in held] == pytest.approx(
        list(multipletests(raw, method="holm")[1]), rel=1e-9)
    for one in (*alone, named):
        found = verdicts[one.id]
        assert (found["verdict"], found["p_value"], found["adjusted_p_value"]) == ("undecided", None, None), found
    for page in ("report.html", "report.zh.html"):
        shown = re.findall('class="(?:ruling|verdict) (better|worse|equivalent)"', (folder / page).read_text())
        assert sorted(shown) == sorted({one["verdict"] for one in verdicts.values()} - {"undecided"}) == ["better"]
    # Of two models the statement about the first and second is decided; the one about a named model is not.
    other = write_folder(tmp_path / "b", answers("b", 2, 20))
    laid = {one.id: one for one in compare([folder, other], suite=suite).verdicts}
    assert (laid["named"].verdict, laid["named"].p_value, laid["named"].second) == ("undecided", None, "")
    decided = [one for name, one in laid.items() if name != "named"]
    assert all(one.second == "b" and one.p_value is not None for one in decided)
    assert [one.adjusted_p_value for one in decided] == pytest.approx(
        list(multipletests([one.p_value for one in decided], method="holm")[1]), rel=1e-9)
    # A distance from a number says nothing about which of two has more.
    assert [laid[one.id].statement_is for one in held] == ["", ""]


@pytest.mark.parametrize("margin", [-0.01, float("nan"), float("inf")])
def test_a_margin_is_a_finite_number_that_is_not_negative(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        Hypothesis(id="h", statement="h", kind="equivalence", margin=margin, figure={"id": "f", "function": "mean"})


@pytest.mark.parametrize("confidence", [0, 1, 2, -0.5, "much"])
def test_a_confidence_lies_between_0_and_1(confidence: float) -> None:
    spec = FigureSpec("f", "mean", {}, "score:accuracy", None, {"confidence": confidence})
    with pytest.raises(UserError, match=r"figure 'f': .*(between 0 and 1|could not convert)"):
        compute(spec, Table.of(answers("a", 1, 2)))
