"""Comparisons: alignment, refusal of other questions, verdicts against statsmodels, and what fine-tuning did."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportions_ztest
from statsmodels.stats.weightstats import ttost_paired

from moonbase.errors import UserError
from moonbase.evals import comparison
from moonbase.evals.comparison import Question, compare, hypotheses_of, interval_at, judge, smallest_alpha
from moonbase.evals.figures import Figure, FigureSpec, Table, compute, figures_of
from moonbase.evals.fine_tuning import answer_of, diff, dose_name, dose_numbers
from moonbase.evals.records import read_records
from moonbase.evals.report.phrases import say
from moonbase.evals.side_by_side import write_comparison, write_fine_tuning
from moonbase.evals.suite import Hypothesis, Suite, TaskSpec
from tests.evals.figure_samples import graded, politics, record, write_folder


def suite_with(*hypotheses: Hypothesis, smallest_n: int = 10) -> Suite:
    return Suite(name="s", title="s", tasks=(TaskSpec(name="t", source="builtin:t"),), metric="accuracy",
                 hypotheses=hypotheses, smallest_n=smallest_n)


def claim(kind: str, margin: float | None = None, name: str = "h", **figure) -> Hypothesis:
    facts = {"id": name, "function": "mean", "value": "score:accuracy"} | figure
    return Hypothesis(id=name, statement=name, kind=kind, margin=margin, figure=facts)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A model, a clearly worse one, and one that answers as the first does."""
    return [write_folder(tmp_path / name, graded(name, seed, chance, 400))
            for name, seed, chance in (("good", 1, 0.7), ("bad", 2, 0.4), ("same", 1, 0.7))]


def test_verdicts(folders: list[Path]) -> None:
    better = compare(folders[:2], suite=suite_with(claim("superiority")))
    assert [one.verdict for one in better.verdicts] == ["better"]
    assert compare(folders[1::-1], suite=suite_with(claim("superiority"))).verdicts[0].verdict == "worse"
    same = compare([folders[0], folders[2]], suite=suite_with(claim("equivalence", 0.05)))
    assert same.verdicts[0].verdict == "equivalent" and same.verdicts[0].figure.text.startswith("0.0 points")
    # A difference that is not found is not sameness, and too few pairs decide nothing.
    assert compare([folders[0], folders[2]], suite=suite_with(claim("superiority"))).verdicts[0].verdict == "undecided"
    # 400 pairs are enough where 400 are asked for, and not where it is one more.
    at, few = (compare(folders[:2], suite=suite_with(claim("superiority"), smallest_n=n)).verdicts[0]
               for n in (400, 401))
    assert at.verdict == "better" and few.verdict == "undecided" and "fewer than the 401" in few.reason


def test_three_models_and_holm(folders: list[Path]) -> None:
    found = compare(folders, suite=suite_with(claim("superiority")))
    assert found.models == ["good", "bad", "same"]
    assert [(one.first, one.second, one.verdict) for one in found.verdicts] == [
        ("good", "bad", "better"), ("good", "same", "undecided"), ("bad", "same", "worse")]
    p_values = [one.p_value for one in found.verdicts]
    assert [one.adjusted_p_value for one in found.verdicts] == pytest.approx(
        list(multipletests(p_values, method="holm")[1]))
    assert {"metric", "value", "low", "high", "n"} <= found.as_json()["rows"][0].keys()
    page = write_comparison(found, folders, folders[0].parent / "out").read_text()
    for part in ("differences", "capability", "conclusions", "hypotheses"):
        assert f'<section id="{part}"' in page
    # The verdict is of the first against the second, and the page says it in that order.
    assert re.search(r"better.*?<b class=\"side\">good against bad</b>", page, re.DOTALL)
    assert all(row.text in page for row in found.rows) and "moonbase verify" not in page


def shifted(mean: float, pairs: int = 50) -> Figure:
    """Pairs whose differences are `mean` ± 0.1, as many above as below: standard error 0.1 / √(pairs - 1)."""
    table = Table.of([record(f"i{item}", model=model, scores={"accuracy": 0.5 + (model == "a") * (
        mean + (0.1 if item % 2 else -0.1))}) for model in "ab" for item in range(pairs)])
    return compute(FigureSpec("x", "difference", {"model": "a"}, "score:accuracy", {"model": "b"}), table)


def asked(kind: str, margin: float | None, figure: Figure) -> Question:
    return Question("h", "h", kind, margin, 0.05, True, "a", "b", figure, 1.0)


REACH = 0.1 / 7 * float(stats.t.ppf(1 - 0.035, 49))
"""What a test of `shifted` at 3.5% just bears: below α, above α halved."""


def test_what_holm_does_not_order_is_held_to_the_family() -> None:
    """One verdict alone is decided at p = 0.035, by either of two tests; one of two is not."""
    even, ahead = shifted(0.0), shifted(0.1 / 7 * float(stats.t.ppf(1 - 0.035 / 2, 49)))
    assert smallest_alpha(even, 1.0, REACH, both_sides=True) == pytest.approx(0.035, rel=1e-6)
    assert ahead.p_value == pytest.approx(0.035, rel=1e-6)
    for question, alone, of_two in ((asked("superiority", REACH, even), "equivalent", "undecided"),
                                    (asked("superiority", None, ahead), "better", "undecided"),
                                    (asked("non_inferiority", 0.1, ahead), "better", "equivalent")):
        other = asked("superiority", None, shifted(0.0))
        assert [one.verdict for one in judge([question])] == [alone]
        assert [one.verdict for one in judge([question, other])] == [of_two, "undecided"]


def test_a_fall_that_is_not_shown_is_no_fall() -> None:
    """Capability fell with p = 0.035: one checkpoint lost it, of two none is shown to have; change is held alike."""
    fell, even = shifted(-0.1 / 7 * float(stats.t.ppf(1 - 0.035 / 2, 49))), shifted(0.0)
    kept, slight = asked("non_inferiority", 0.001, fell), asked("non_inferiority", 0.001, shifted(-0.003))
    assert [answer_of(kept, kept.p_value, family)[0] for family in (1, 2)] == ["no", "undecided"]
    assert answer_of(slight, slight.p_value, 1)[0] == "undecided"
    changed = asked("superiority", REACH, even)
    assert [answer_of(changed, 1.0, family)[0] for family in (1, 2)] == ["no", "undecided"]


def test_a_rate_of_one_model_decides_nothing_and_of_two_what_compare_decides(folders: list[Path]) -> None:
    """That a rate is above -5 points is no news: a statement on a first and a second model needs both."""
    kinds = [claim("superiority", name="more"), claim("non_inferiority", 0.05, "as often")]
    records = [one for folder in folders[:2] for one in read_records(folder / "records.jsonl")]
    alone = hypotheses_of(suite_with(*kinds), Table.of(records[:400]))
    assert [(one.verdict, one.p_value, one.statement_is, one.n_needed) for one in alone] == [
        ("undecided", None, "", None)] * 2
    assert all("moonbase compare A B" in one.reason for one in alone)
    both = hypotheses_of(suite_with(*kinds), Table.of(records))
    assert [(one.first, one.second, one.verdict, one.statement_is) for one in both] == [
        ("good", "bad", "better", "supported")] * 2
    # Right alone, by either: McNemar's exact test is the binomial one.
    right = [{one.item for one in records if one.model == model and one.scores["accuracy"]}
             for model in ("good", "bad")]
    fewer, more = sorted((len(right[0] - right[1]), len(right[1] - right[0])))
    assert both[0].p_value == pytest.approx(stats.binomtest(fewer, fewer + more).pvalue, rel=1e-9)
    laid = compare(folders[:2], suite=suite_with(*kinds)).verdicts
    assert [(one.p_value, one.verdict, one.figure.text) for one in both] == [
        (one.p_value, one.verdict, one.figure.text) for one in laid]
    figures = [figure for figure in figures_of(suite_with(*kinds), Table.of(records)) if "hypothesis/" in figure.id]
    assert [figure.id for figure in figures] == ["hypothesis/more/good minus bad", "hypothesis/as often/good minus bad"]


@pytest.mark.parametrize(("sides", "items", "said", "chinese"), [
    ({"versus": {"group": "b"}, "function": "difference"}, 7, "7 pairs are", "7 对，少于评测集要求的 500 对"),
    ({"versus": {"group": "b"}, "function": "difference"}, 1, "1 pair is", "1 对，少于评测集要求的 500 对"),
    ({"versus": {"group": "b"}, "function": "difference", "params": {"pair": "none"}}, 7, "14 answers are",
     "14 条回答，少于评测集要求的 500 条"),
    ({"params": {"reference": 0.5}}, 7, "7 answers are", "7 条回答，少于评测集要求的 500 条"),
    ({"params": {"reference": 0.5}}, 1, "1 answer is", "1 条回答，少于评测集要求的 500 条")])
def test_too_few_of_what_was_counted(sides: dict, items: int, said: str, chinese: str) -> None:
    table = Table.of(record(f"i{item}", group=group, scores={"accuracy": float(item % 2)})
                     for item in range(items) for group in "ab")
    found, = hypotheses_of(suite_with(claim("superiority", select={"group": "a"}, **sides), smallest_n=500), table)
    assert found.reason == f"{said} fewer than the 500 that the suite asks for" and say(found.reason, "zh") == chinese


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_page_says_in_words_what_is_compared(language: str, tmp_path: Path) -> None:
    """Labels that are counted together are no words; and what a hypothesis and a task both ask is drawn once."""
    folders = [write_folder(tmp_path / model, [record(
        f"i{item}", model=model, group="safe", label="refusal" if (item + len(model)) % 3 == 0 else "full",
        votes={"rules": "full"}) for item in range(30)]) for model in ("one", "other")]
    fewer = claim("superiority", name="fewer", value="label:refusal|api_block", select={"group": "safe"})
    found = compare(folders, suite=suite_with(fewer))
    page = write_comparison(found, folders, tmp_path / "out").with_name(
        "report.html" if language == "en" else "report.zh.html").read_text()
    shown = re.sub(r"<(style|code|pre|data|desc)\b[^>]*>|<section id=.(made|everything).*?</section>", "", page,
                   flags=re.DOTALL)
    assert "api_block" not in shown and "over_refusal" not in shown
    assert ("refusals of harmless requests" if language == "en" else "对无害请求的拒答") in shown
    drawn, = re.findall(r'<section id="differences".*?</section>', page, re.DOTALL)
    row = next(row for row in found.rows if row.metric == "over_refusal")
    assert drawn.count(f'data-id="{row.id}"') > 0 and f'data-id="{found.verdicts[0].figure.id}"' not in drawn


@pytest.mark.parametrize("right", [0, 20, 23, 27, 30])
def test_a_rate_against_a_reference_is_the_score_test(right: int) -> None:
    """Wilson's interval inverted is the test with the variance under the hypothesis; both ask what is printed."""
    table = Table.of([record(f"i{item}", scores={"accuracy": float(item < right)}) for item in range(30)])
    suite = suite_with(claim("superiority", params={"reference": 0.9, "expects": "better"}),
                       claim("non_inferiority", 0.2, "not lower", params={"reference": 0.9}), smallest_n=30)
    two, one = hypotheses_of(suite, table)
    assert two.p_value == pytest.approx(proportions_ztest(right, 30, 0.9, prop_var=0.9)[1] if right != 27 else 1.0,
                                        rel=1e-6, abs=1e-11)
    above = max(proportions_ztest(right, 30, 0.7, alternative="larger", prop_var=0.7)[1], 1e-12)
    assert one.p_value == (pytest.approx(above, rel=1e-6) if above < 0.4999 else 1.0)
    plain = compute(two.figure.spec, table)
    assert (two.p_value < 0.05) == (not plain.low <= 0.9 <= plain.high)
    assert (two.figure.low, two.figure.high) == pytest.approx((plain.low - 0.9, plain.high - 0.9))
    assert two.verdict == ("worse" if right < 24 else "undecided") and plain.text in two.text


def test_a_mean_against_a_reference_is_the_t_test() -> None:
    values = np.random.default_rng(5).random(40).round(3)
    table = Table.of([record(f"i{item}", scores={"accuracy": float(value)}) for item, value in enumerate(values)])
    found, = hypotheses_of(suite_with(claim("superiority", params={"reference": 0.4})), table)
    assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0.4).pvalue, rel=1e-5)
    for wrong in ({"reference": "much"}, {"reference": math.nan}, {"reference": True}):
        with pytest.raises(UserError, match="no number"):
            hypotheses_of(suite_with(claim("superiority", params=wrong)), table)
    with pytest.raises(UserError, match="belongs to mean"):
        hypotheses_of(suite_with(claim("superiority", function="bootstrap", params={"reference": 0.5})), table)


@pytest.mark.parametrize("seed", range(4))
def test_equivalence_is_two_one_sided_tests(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.random((2, 60)).round(3)
    values[1] = np.clip(values[0] + random.normal(0.01, 0.1, 60), 0, 1)
    table = Table.of([record(f"i{item}", model=model, scores={"accuracy": float(values[row, item])})
                      for row, model in enumerate("ab") for item in range(60)])
    figure = compute(FigureSpec("x", "difference", {"model": "a"}, "score:accuracy", {"model": "b"}), table)
    assert smallest_alpha(figure, 1.0, 0.05, both_sides=True) == pytest.approx(
        ttost_paired(values[0], values[1], -0.05, 0.05)[0], rel=1e-6)
    assert interval_at(figure, 0.95) == pytest.approx((figure.low, figure.high), abs=1e-8)


def test_three_equal_pairs_do_not_show_equivalence() -> None:
    """Where no pair disagrees the standard error is 0; the interval is not, and three pairs show nothing."""
    records = [record(f"i{item}", model=model, scores={"accuracy": 1.0}) for model in "ab" for item in range(3)]
    spec = FigureSpec("x", "difference", {"model": "a"}, "score:accuracy", {"model": "b"})
    assert smallest_alpha(compute(spec, Table.of(records)), 1.0, 0.05, both_sides=True) > 0.2
    many = [record(f"i{item}", model=model, scores={"accuracy": 1.0}) for model in "ab" for item in range(400)]
    assert smallest_alpha(compute(spec, Table.of(many)), 1.0, 0.05, both_sides=True) < 0.001


@pytest.mark.parametrize(("runs", "most"), [(60, 0.12), pytest.param(300, 0.08, marks=pytest.mark.slow)])
def test_error_rate_of_verdicts(runs: int, most: float) -> None:
    """Two equal models, many times: a superiority claim is wrongly decided in at most about 5%."""
    wrong = 0
    for seed in range(runs):
        random = np.random.default_rng(seed)
        right = random.random((2, 80)) < random.uniform(0.2, 0.9, 80)
        table = Table.of([record(f"i{item}", model=model, scores={"accuracy": float(right[row, item])})
                          for row, model in enumerate("ab") for item in range(80)])
        found = comparison.judge(comparison.questions_of([claim("superiority")], table, ["a", "b"]))
        wrong += found[0].verdict != "undecided"
    assert wrong / runs < most


def test_other_questions_are_refused(tmp_path: Path) -> None:
    first, second = graded("a", 1, 0.5, 20), graded("b", 2, 0.5, 20)
    second[3:11] = [one.model_copy(update={"input_digest": "sha256:other"}) for one in second[3:11]]
    with pytest.raises(UserError, match=r"t/i3, t/i4, t/i5, t/i6, t/i7 and 3 more"):
        compare([write_folder(tmp_path / "a", first), write_folder(tmp_path / "b", second)])
    with pytest.raises(UserError, match="two models at least"):
        compare([tmp_path / "a"])


def test_one_model_twice_and_items_of_one_side_only(tmp_path: Path) -> None:
    one, two = graded("m", 1, 0.6, 50), graded("m", 2, 0.6, 40)
    found = compare([write_folder(tmp_path / "monday", one), write_folder(tmp_path / "friday", two)])
    assert found.models == ["m (monday)", "m (friday)"]
    assert found.rows[0].n == 40 and any("asked on one side only: 10 and 0" in note for note in found.notes)
    assert not found.verdicts[0].pre_registered


def test_real_models(tmp_path: Path, shared_data: Path) -> None:
    records = list(politics(shared_data))
    names = ["deepseek/deepseek-chat-v3-0324", "anthropic/claude-3-7-sonnet-20250219", "openai/gpt-4.1-2025-04-14"]
    folders = [write_folder(tmp_path / str(place), [one for one in records if one.model == name])
               for place, name in enumerate(names)]
    gap = claim("superiority", name="gap", function="difference", value="label:full",
                select={"group": "china", "condition.language": "zh"}, versus={"condition.language": "en"},
                params={"cluster": "item"})
    found = compare(folders, suite=suite_with(gap))
    # The Chinese drop of DeepSeek is larger than that of the other two.
    assert found.models == names and found.verdicts[0].figure.spec.function == "difference_in_differences"
    assert [one.verdict for one in found.verdicts] == ["worse", "worse", "worse"]
    each = hypotheses_of(suite_with(gap), Table.of(one for one in records if one.model in names))
    assert {one.first: one.verdict for one in each} == {names[0]: "worse", names[1]: "worse", names[2]: "undecided"}


@pytest.mark.parametrize(("kind", "expects", "verdicts"), [
    ("superiority", "better", {"better": "supported", "worse": "contradicted", "equivalent": "contradicted"}),
    ("superiority", "worse", {"better": "contradicted", "worse": "supported", "equivalent": "contradicted"}),
    ("superiority", "different", {"better": "supported", "worse": "supported", "equivalent": "contradicted"}),
    ("non_inferiority", "better", {"better": "supported", "equivalent": "supported", "worse": "contradicted"}),
    ("equivalence", "better", {"better": "contradicted", "equivalent": "supported", "worse": "contradicted"})])
def test_a_verdict_and_what_it_says_of_the_statement(kind: str, expects: str, verdicts: dict) -> None:
    figure = compute(FigureSpec("x", "mean", {}, "label:full"), Table.of([record("a")]))
    question = comparison.Question("h", "s", kind, 0.05, 0.05, True, "a", "b", figure, 1.0, expects)
    assert {verdict: comparison.bearing(question, verdict) for verdict in verdicts} == verdicts
    assert comparison.bearing(question, "undecided") == "undecided"


def test_a_claimed_fall_is_supported_by_worse(tmp_path: Path, shared_data: Path) -> None:
    records = [one for one in politics(shared_data) if "deepseek-chat-v3-0324" in one.model or "gpt-4.1" in one.model]
    sides = {"select": {"group": "china", "condition.language": "zh"}, "versus": {"condition.language": "en"}}
    gap = claim("superiority", function="difference", value="label:full", params={"expects": "worse"}, **sides)
    fall, none = hypotheses_of(suite_with(gap), Table.of(records))
    assert (fall.verdict, fall.statement_is) == ("worse", "supported") and "worse; statement supported (" in fall.text
    assert (none.verdict, none.statement_is) == ("undecided", "undecided")
    # Without a word on what is claimed, nothing is said of it; nor where two models' gaps are compared.
    silent = claim("superiority", function="difference", value="label:full", **sides)
    assert {one.statement_is for one in hypotheses_of(suite_with(silent), Table.of(records))} == {""}
    folders = [write_folder(tmp_path / model[-4:], [one for one in records if one.model == model])
               for model in sorted({one.model for one in records})]
    both = compare(folders, suite=suite_with(gap)).verdicts[0]
    assert (both.verdict, both.statement_is) == ("worse", "") and "statement" not in both.text
    with pytest.raises(UserError, match="expects 'sideways'"):
        hypotheses_of(suite_with(claim("superiority", function="difference", value="label:full",
                                       params={"expects": "sideways"}, **sides)), Table.of(records))


@pytest.mark.parametrize(("cluster", "field", "method"), [
    (lambda item: "", "item", "Newcombe, paired; McNemar, exact"),
    (lambda item: f"c{item // 3}", "item", "t, cluster-robust"),
    (lambda item: "", "document", "t, cluster-robust")])
def test_one_rule_for_intervals_in_eval_compare_and_diff_ft(tmp_path: Path, cluster, field: str, method: str) -> None:
    """One question, asked in three places: the same estimator, and the same interval to the last digit."""
    records = {name: [record(f"i{item}", model=name, cluster=cluster(item), scores={"accuracy": float(
        np.random.default_rng([place, item]).random() < 0.5)}, condition={"document": f"d{item // 3}"})
        for item in range(60)] for place, name in enumerate(("m", "n"))}
    suite = suite_with(claim("superiority", function="difference", select={"model": "n"}, versus={"model": "m"}),
                       claim("superiority", name="between")).model_copy(update={"cluster": field})
    folders = [write_folder(tmp_path / name, found) for name, found in records.items()]
    together = Table.of([*records["n"], *records["m"]])
    found = [hypotheses_of(suite, together)[0].figure, *(one.figure for one in compare(
        folders[::-1], suite=suite).verdicts), *compare(folders[::-1], suite=suite).rows,
        diff(folders[0], [folders[1]], suite=suite).changes[0].figure]
    found += [one for one in figures_of(suite, together) if one.spec.function == "difference" and one.metric ==
              "accuracy" and one.model == "n"]
    assert len(found) >= 5 and {one.method for one in found} == {method}
    ends = {(abs(one.value), *sorted(map(abs, (one.low, one.high)))) for one in found}
    assert len(ends) == 1


def labelled(model: str, refused: float, over: float, items: int = 300) -> list:
    """The first so many of every 100 requests are declined."""
    return [record(f"{group}{item}", model=model, task="xstest", group=group,
                   label="refusal" if item % 100 < 100 * share else "full")
            for group, share in (("unsafe", refused), ("safe", over)) for item in range(items)]


def test_fine_tuning(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", graded("m", 1, 0.6, 600) + labelled("m", 0.9, 0.1))
    tuned = [write_folder(tmp_path / f"step-{step}", graded("m2", 1, 0.6, 600) + labelled("m2", refused, over))
             for step, refused, over in ((100, 0.9, 0.1), (200, 0.6, 0.2), (300, 0.3, 0.4))]
    found = diff(base, tuned)
    answers = {(one.question, one.dose): one.answer for one in found.changes}
    assert found.doses == ["base", "step-100", "step-200", "step-300"] and not found.notes
    assert all(answers["capability kept?", f"step-{step}"] == "yes" for step in (100, 200, 300))
    assert [answers["refusals kept?", f"step-{step}"] for step in (100, 200, 300)] == ["yes", "no", "no"]
    assert [answers["over-refusal changed?", f"step-{step}"] for step in (100, 200, 300)] == ["no", "yes", "yes"]
    curve = next(one for one in found.curves if one.subject == "refusal")
    assert curve.doses == [0, 100, 200, 300] and [round(one.value, 3) for one in curve.points] == [0.9, 0.9, 0.6, 0.3]
    # The slope of the means, as numpy fits it: items have all doses, so both are one number.
    assert curve.slope == pytest.approx(np.polyfit([0, 100, 200, 300], [0.9, 0.9, 0.6, 0.3], 1)[0])
    assert curve.high < 0 and curve.p_value < 1e-6
    assert curve.figure.text.startswith("−0.21 points per unit of dose [")
    # Doses in another order, and told: the base is 0 unless it is given, too.
    told = diff(base, tuned, doses=[4, 1, 2])
    assert told.curves[0].doses == [0, 4, 1, 2] and told.doses == found.doses
    curve = next(one for one in told.curves if one.subject == "refusal")
    assert curve.slope == pytest.approx(np.polyfit([0, 4, 1, 2], [0.9, 0.9, 0.6, 0.3], 1)[0])
    for wrong in ([1, 2], [1, 1, 2], [1, math.inf, 2]):
        with pytest.raises(UserError, match="doses"):
            diff(base, tuned, doses=wrong)
    page = write_fine_tuning(told, [base, *tuned], tmp_path / "out").read_text()
    for part in ("dose", "changes", "conclusions", "hypotheses"):
        assert f'<section id="{part}"' in page
    assert "−60.0 points" in page and "would need only" in page and "step-300" in page
    assert "每单位剂量" in (tmp_path / "out" / "report.zh.html").read_text()
    plan = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert plan["compared"] == ["base", "step-100", "step-200", "step-300"]


@pytest.mark.parametrize(("folder", "name", "dose"), [
    ("runs/tuned-step-300", "step-300", 300.0), ("epoch2", "epoch2", 2.0), ("ckpt_1.5", "ckpt_1.5", 1.5),
    ("deepseek-chat-v3-0324", "deepseek-chat-v3-0324", 1.0), ("gpt-4.1", "gpt-4.1", 1.0)])
def test_a_dose_is_what_a_name_calls_one(folder: str, name: str, dose: float) -> None:
    assert dose_name(folder, []) == name and dose_numbers(["base", name]) == [0.0, dose]


def test_few_items_leave_fine_tuning_undecided(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", graded("m", 1, 0.6, 12))
    found = diff(base, [write_folder(tmp_path / "tuned", graded("m", 3, 0.6, 12))])
    assert [one.answer for one in found.changes] == ["undecided"]
    assert len(found.notes) == 2 and not math.isnan(found.changes[0].figure.value)
    with pytest.raises(UserError, match="at least one"):
        diff(base, [])
