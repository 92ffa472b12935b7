"""Figures: the golden numbers through the whole pipeline, how they are printed, and what is never dropped."""

from __future__ import annotations

import json
import math
import random
import re
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import statsmodels.formula.api as smf

from moonbase.errors import UserError
from moonbase.evals.columns import NumberColumn, WordColumn
from moonbase.evals.figure_functions import sides_of
from moonbase.evals.figure_plan import by_members
from moonbase.evals.figures import Figure, FigureSpec, Table, compute, figures_of
from moonbase.evals.printing import percent, rate_text, signed, significant
from moonbase.evals.records import write_records
from tests.evals.figure_samples import graded, politics, record

EN, ZH = {"condition.language": "en"}, {"condition.language": "zh"}


def spec(function: str, select: dict | None = None, value: str = "score:accuracy", versus: dict | None = None,
         **params) -> FigureSpec:
    return FigureSpec("test", function, select or {}, value, versus, params, 1)


@pytest.fixture(scope="module")
def table(shared_data: Path) -> Table:
    return Table.of(politics(shared_data))


@pytest.mark.parametrize(("model", "text", "pairs", "one", "two", "errors"), [
    ("deepseek/deepseek-chat-v3-0324", "+40.8 points", 49, 20, 0, 1),
    ("qwen/qwen3-235b-a22b", "+30.0 points", 50, 16, 1, 0),
    ("anthropic/claude-3-7-sonnet-20250219", "+20.0 points", 50, 10, 0, 0),
    ("openai/gpt-4.1-2025-04-14", "0.0 points", 49, 2, 2, 1)])
def test_golden_through_the_pipeline(table: Table, model: str, text: str, pairs: int, one: int, two: int,
                                     errors: int) -> None:
    select = {"model": model, "group": "china"} | EN
    figure = compute(spec("difference", select, "label:full", ZH, cluster="item"), table)
    assert figure.text.startswith(text)
    assert (figure.n, figure.details["only_first"], figure.details["only_second"]) == (pairs, one, two)
    assert (figure.errors, figure.unscored, figure.abstained) == (errors, 0, 0)
    if "deepseek" in model:
        assert figure.p_value == pytest.approx(1.9e-6, rel=0.01) and round(100 * figure.standard_error, 1) == 7.1
        assert "1 of 50 pairs left out" in figure.note


def test_difference_in_differences_is_the_interaction(table: Table) -> None:
    """Claude against Qwen, both languages: the interaction of a saturated regression, on complete pairs."""
    one, other = "anthropic/claude-3-7-sonnet-20250219", "qwen/qwen3-235b-a22b"
    figure = compute(spec("difference_in_differences", {"model": one, "group": "china"} | EN, "label:full", ZH,
                          control={"model": other}, cluster="item"), table)
    rows = [table.rows({"model": model, "group": "china"} | language)
            for model in (one, other) for language in (EN, ZH)]
    full = table.words["label"].index("full")
    data = {"y": [], "model": [], "zh": [], "item": []}
    for number, part in enumerate(rows):
        data["y"] += (table.codes["label"][part] == full).astype(float).tolist()
        data["model"] += [1.0 - number // 2] * len(part)
        data["zh"] += [1.0 - number % 2] * len(part)
        data["item"] += table.codes["item"][part].tolist()
    fit = smf.ols("y ~ model * zh", data).fit(
        cov_type="cluster", cov_kwds={"groups": np.array(data["item"]), "use_correction": False})
    assert figure.value == pytest.approx(fit.params["model:zh"])
    assert figure.standard_error == pytest.approx(fit.bse["model:zh"] * math.sqrt(50 / 49), rel=1e-6)


def test_figures_do_not_depend_on_the_order_of_records(shared_data: Path) -> None:
    records = [one for one in politics(shared_data) if one.model.startswith(("openai", "deepseek"))]
    shuffled = records.copy()
    random.Random(1).shuffle(shuffled)
    one, other = (figures_of(None, Table.of(part)) for part in (records, shuffled))
    assert [figure.model_dump() for figure in one] == [figure.model_dump() for figure in other]
    assert len({figure.id for figure in one}) == len(one) > 50


def test_a_figure_is_recomputed_from_its_own_json(table: Table) -> None:
    for figure in figures_of(None, table)[::17]:
        again = Figure.model_validate_json(figure.model_dump_json())
        assert compute(again.spec, table) == figure
        json.dumps(figure.model_dump(mode="json"), allow_nan=False)


def test_what_a_report_shows_is_there(table: Table) -> None:
    figures = {(figure.spec.function, figure.metric) for figure in figures_of(None, table)}
    for wanted in (("mean", "full"), ("mean", "refusal"), ("missing", "left_out"), ("difference", "full"),
                   ("agreement", "krippendorff_alpha"), ("power", "full power"), ("bootstrap", "full bootstrap")):
        assert wanted in figures


def test_zero_events_are_never_a_bare_zero(table: Table) -> None:
    for figure in figures_of(None, table):
        assert not re.match(r"0(\.0+)?%|100(\.0+)?%", figure.text), figure.text
    assert rate_text(0.0, 0.0, 0.0727, 49, 49) == "0 of 49 (upper bound 7.3%)"
    assert rate_text(1.0, 0.9273, 1.0, 49, 49) == "49 of 49 (lower bound 92.7%)"
    assert (percent(0.00004), percent(0.99996), percent(0.102)) == ("0.004%", "99.996%", "10.2%")
    assert (signed(-0.04, ".1f"), signed(-0.06, ".1f"), signed(3.0, ".1f")) == ("0.0", "−0.1", "+3.0")
    assert (significant(0.0000123), significant(12345.6), significant(1.234)) == ("0.0000123", "12,346", "1.23")


def test_every_selected_answer_is_counted_once() -> None:
    records = [record(f"i{number}", scores={"accuracy": value}, status=status) for number, (value, status) in enumerate(
        [(1.0, "scored"), (0.0, "scored"), (None, "unscored"), (None, "abstained"), (None, "error"), (1.0, "error"),
         (None, "scored")])] + [record("i9", scores={}, status="abstained")]
    figure = compute(spec("mean"), Table.of(records))
    assert (figure.n, figure.unscored, figure.abstained, figure.errors) == (2, 2, 2, 2)
    assert figure.n + figure.unscored + figure.abstained + figure.errors == len(records)
    left_out = compute(spec("missing"), Table.of(records))
    assert left_out.text == "2 unscored, 2 abstained, 2 failed of 8"
    nothing = compute(spec("mean", {"task": "t"}), Table.of(records[2:3]))
    assert nothing.value is None and nothing.text == "no value (0 of 1 scored)"


def test_nan_in_a_file_is_an_unscored_answer(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [record("a", scores={"accuracy": 1.0}), record("b", scores={"accuracy": 0.25})])
    path.write_text(path.read_text().replace("0.25", "NaN"))
    figure = compute(spec("mean"), Table.read(path))
    assert (figure.n, figure.unscored) == (1, 1)


def test_costs_and_repeats() -> None:
    records = [record(f"i{number // 4}", sample=number % 4, cost=0.5,
                      scores={"accuracy": float(number % 4 < number // 4)}) for number in range(20)]
    table = Table.of(records)
    # Items 0 to 4 are solved 0 to 4 times of 4.
    assert compute(spec("pass_at_k", k=4), table).value == pytest.approx(4 / 5)
    assert compute(spec("pass_hat_k", k=4), table).value == pytest.approx(1 / 5)
    assert compute(spec("pass_at_k", k=2), table).value == pytest.approx((0 + 1 / 2 + 5 / 6 + 1 + 1) / 5)
    assert compute(spec("cost_per_correct"), table).value == pytest.approx(10.0 / 10)
    free = Table.of([*records, record("free")])
    assert compute(spec("cost_per_correct"), free).text == "no price known for 1 of 21 answers"
    wrong = Table.of(records[:4])
    assert compute(spec("cost_per_correct"), wrong).text == "no correct answer for $2"


def test_a_correction_is_not_surer_than_no_correction() -> None:
    """Nothing refused, by a judge that errs on 6% of human labels: the bound is at least that of 0 of 50."""
    records = [record(f"i{item}", label="full") for item in range(50)]
    counts = {"true_positives": 209, "positives": 224, "true_negatives": 212, "negatives": 226}
    plain, corrected = (compute(spec(name, value="label:refusal", **params), Table.of(records))
                        for name, params in (("mean", {}), ("corrected_rate", counts)))
    assert corrected.value == 0.0 and corrected.high >= plain.high and "upper bound" in corrected.text
    many = Table.of([record(f"i{item}", label="full") for item in range(2000)])
    unfit = compute(spec("corrected_rate", value="label:refusal", **counts), many)
    assert unfit.value is None and unfit.text.startswith("not corrected")


def test_contamination_pairs_twins_by_cluster() -> None:
    records = [record(f"{origin}{number}", cluster=f"c{number}", condition={"origin": origin},
                      scores={"accuracy": float(origin == "public" or number % 2)})
               for number in range(40) for origin in ("public", "fresh")]
    figure = compute(spec("contamination", {"condition.origin": "public"}, versus={"condition.origin": "fresh"},
                          pair="cluster"), Table.of(records))
    assert (figure.value, figure.n, figure.details["only_first"]) == (0.5, 40, 20)
    assert [one.text for one in figures_of(None, Table.of(records)) if one.spec.function == "contamination"]


@pytest.mark.parametrize(("line", "problem"), [
    ("{", "line 3: not a record"), ('{"schema": "x"}', "its schema is 'x'"), ("[]", "line 3: not a record"),
    ('{"schema": "moonbase.record/1", "suite": "s", "task": "t", "item": 3}', "`item` is missing")])
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [record("a"), record("b")])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=problem):
        Table.read(path)


def test_a_repeated_sample_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [record("a"), record("b"), record("a")])
    with pytest.raises(UserError, match="item 'a', sample 0 of 'm' is recorded twice"):
        Table.read(path)


@pytest.mark.parametrize(("wrong", "problem"), [
    (spec("meen"), "did you mean 'mean'"), (spec("mean", {"modle": "m"}), "did you mean 'model'"),
    (spec("mean", value="accuracy"), "write score:NAME"), (spec("difference"), "needs `versus`"),
    (spec("pass_at_k"), "'k'"), (spec("mean", cluster="document"), "no column 'document'")])
def test_a_wrong_specification_is_named(wrong: FigureSpec, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        compute(wrong, Table.of([record("a", scores={"accuracy": 1.0})]))


def test_levels_come_from_the_records() -> None:
    kept = [record("a", call={"weights_digest": "sha256:1"}), record("b", call={"weights_digest": "sha256:1"})]
    plain = [one.model_copy(update={"call": one.call.model_copy(update={"weights_digest": None})}) for one in kept]
    salted = [one.model_copy(update={"input_digest": "hmac-sha256:0"}) for one in kept]
    hidden = [one.model_copy(update={"output": None}) for one in kept]
    assert [compute(spec("mean"), Table.of(part)).level for part in (kept, plain, salted, hidden)] == [3, 2, 1, 0]


def test_a_level_rests_on_every_side_of_a_figure() -> None:
    """All eight cells of a triple difference: whichever of them kept no output, the figure cannot be scored again."""
    cells = [(group, about, language) for group, about in (("china", ""), ("us", ""), ("benign", "china"),
                                                           ("benign", "us")) for language in ("en", "zh")]

    def level(spec: FigureSpec, hidden: int) -> int:
        return compute(spec, Table.of(
            record(f"{group}{about}{item}", label="full", group=group, output=None if place == hidden else "x",
                   condition={"language": language, "twin_of": about or "none"})
            for place, (group, about, language) in enumerate(cells) for item in range(3))).level

    base = {"group": "china"} | EN
    triple = spec("difference_in_differences", base, "label:full", ZH, control={"group": "us"},
                  second={"group": "benign", "condition.twin_of": "china"},
                  second_control={"group": "benign", "condition.twin_of": "us"})
    double, plain = spec("difference_in_differences", base, "label:full", ZH, control={"group": "us"}), \
        spec("difference", base, "label:full", ZH)
    for figure, used in ((triple, 8), (double, 4), (plain, 2)):
        assert [level(figure, place) for place in (*range(8), -1)] == [0] * used + [2] * (9 - used)
    assert sides_of(triple)[4:6] == [{"group": "benign", "condition.twin_of": "china", "condition.language": language}
                                     for language in ("en", "zh")]


def hosted(*shares: tuple[str, int]) -> Table:
    """100 items in two languages, English from one host; in Chinese so many of them from each host."""
    chinese = [host for host, count in shares for _ in range(count)]
    return Table.of(record(f"i{item}", label="full", condition={"language": language},
                           call={"provider": host}) for language, hosts in (("en", ["here"] * 100), ("zh", chinese))
                    for item, host in enumerate(hosts))


def test_every_host_of_a_model_has_its_figure() -> None:
    """Though one host answered all of a language: its cell is that language's, and is shown as the host's all the same.
    What nobody named is no host."""
    figures = [figure for figure in figures_of(None, hosted(("there", 100))) if "provider" in figure.spec.select]
    assert [(figure.function, figure.spec.select["provider"], figure.n) for figure in figures] == [
        ("mean", "here", 100), ("mean", "there", 100)]
    many = [figure for figure in figures_of(None, hosted(("there", 60), ("here", 30), ("", 10)))
            if "provider" in figure.spec.select]
    assert [(figure.spec.select.get("condition.language"), figure.spec.select["provider"], figure.n)
            for figure in many] == [(None, "here", 130), (None, "there", 60), ("zh", "here", 30), ("zh", "there", 60)]
    assert not [figure for figure in figures_of(None, hosted(("here", 100))) if "provider" in figure.spec.select]


def test_a_difference_says_where_its_sides_had_other_hosts() -> None:
    def note(table: Table, versus: dict[str, str], select: dict[str, str] = EN, **params: str) -> str | None:
        return compute(spec("difference", select, "label:full", versus, **params), table).note

    # One answer in ten from another host is said, nine in a hundred are not.
    said = "the sides had other mixes of hosts: "
    assert note(hosted(("there", 10), ("here", 90)), ZH) == f"{said}here 100:90, there 0:10"
    assert note(hosted(("there", 9), ("here", 91)), ZH) is None
    assert "there 0:10" in note(hosted(("there", 10), ("here", 90)), ZH, pair="none")
    several = hosted(*((name, 10) for name in "abcdefghij"))
    assert note(several, ZH) == f"{said}here 100:0, a 0:10, b 0:10, c 0:10, …"
    # Two models have hosts of their own, and hosts that are compared differ.
    models = hosted(("there", 100)).renamed("condition.language", {}).constant("condition.language", "x")
    assert note(models, {"provider": "there"}, {"provider": "here"}) is None
    two = Table.of(record("i", model=model, label="full", call={"provider": model}) for model in "ab")
    assert note(two, {"model": "b"}, {"model": "a"}) is None


def test_a_column_keeps_every_number_in_few_bytes() -> None:
    for values, width in (([0.0, 1.0, math.nan], 1), ([127.0, -127.0], 1), ([128.0, math.nan, 1.0], 2),
                          ([-128.0], 2), ([1e5, 2.0], 4), ([2.0**40, math.nan], 8), ([0.1, 3.0, math.nan], 8),
                          ([1.0, 2.0**53 + 2], 8), ([-(2.0**31)], 8), ([], 8)):
        column = NumberColumn()
        for row, value in enumerate(values):
            column.put(row + 2, None if math.isnan(value) and row % 2 else value)
        found = column.done(len(values) + 3)
        assert np.array_equal(found[:], [math.nan, math.nan, *values, math.nan], equal_nan=True)
        assert not values or found.nbytes == width * (len(values) + 3)
        assert np.array_equal(np.asarray(found)[::-1], found[::-1], equal_nan=True)
        places, size = found.places()
        assert places.min() >= 0 and places.max() < size
        there = np.isfinite(found[:])
        assert np.array_equal(np.argsort(places[there], kind="stable"), np.argsort(found[:][there], kind="stable"))


def test_words_widen_with_their_number() -> None:
    for count, width in ((1, 1), (128, 1), (129, 2), (32_768, 2), (32_769, 4)):
        column = WordColumn()
        names = [f"{number:06}" for number in range(count)][::-1]
        for row, name in enumerate(names):
            column.put(2 * row, name)
        words, codes = column.done(2 * count)
        assert words == names[::-1] and codes.itemsize == width
        assert codes[::2].tolist() == list(range(count))[::-1] and set(codes[1::2].tolist()) == {-1}


@pytest.mark.parametrize("number", [1_200, 4_800])
def test_memory_is_less_than_a_tenth_of_a_kilobyte_a_sample(tmp_path: Path, number: int) -> None:
    """At its highest, while the records are read; items, languages, repeats and models as `moonbase bench evals`."""
    line = json.dumps(record("ITEM", condition={"language": "LANG"}, group="china", label="full", seconds=1.25,
                             votes={"rules": "full"}, scores={"full": 1.0}, output_tokens=200, cost=0.001, sample=7,
                             output="word " * 200).canonical()).replace('"sample": 7', '"sample": SAMPLE')
    path = tmp_path / "records.jsonl"
    with path.open("w") as file:
        for place in range(number):
            item, rest = divmod(place, 24)
            file.write(line.replace("ITEM", f"item-{item}").replace("LANG", ("en", "zh")[rest % 2]).replace(
                "SAMPLE", str(rest // 2)) + "\n")
    Table.read(path)
    tracemalloc.start()
    Table.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * number + 2e5


def test_members_of_the_panel_are_counted_each_by_what_it_did() -> None:
    """Said, could not tell, gave nothing that could be read, was not asked, and a call that failed: five things."""
    records = [record("a", label="full", votes={"rules": "full", "judge": "refusal"}),
               record("b", label="full", votes={"rules": "full", "judge": None}),
               record("c", status="abstained", votes={"rules": None, "judge": None}, details={"judge: failed": True}),
               record("d", status="unscored"), record("e", status="error")]
    table = Table.of(records)
    rules, judge = (compute(spec("mean", value=f"vote:{name}=full"), table) for name in ("rules", "judge"))
    assert (rules.n, rules.abstained, rules.unscored, rules.errors) == (2, 1, 1, 1) and rules.value == 1.0
    assert (judge.n, judge.abstained, judge.unscored, judge.errors) == (1, 1, 2, 1) and judge.value == 0.0
    panel = compute(spec("mean", value="label:full"), table)
    assert (panel.n, panel.abstained, panel.unscored, panel.errors) == (2, 1, 1, 1)
    assert table.members(np.arange(5)) == ["judge", "rules"] and table.members(np.array([1]), spoke=True) == ["rules"]


def test_rates_and_gaps_by_every_member(table: Table) -> None:
    """The published labels of two judges: DeepSeek's gap by each, and who says `full` where the other does not."""
    name = "deepseek/deepseek-chat-v3-0324"
    figures = {figure.id: figure for figure in figures_of(None, table)}
    panel = figures[f"politics/{name}/language=en/group=china/full en minus zh"]
    own = {figure.spec.params["member"]: figure for figure in figures.values()
           if figure.spec.params.get("panel") == panel.id}
    assert {member: round(100 * one.value, 1) for member, one in own.items()} == {"grok": 40.8, "gpt-4o": 42.9}
    # By hand: labels of both judges on the answers where both gave one.
    rows = table.rows({"model": name, "group": "china", "condition.language": "zh"})
    said = [[table.word(f"vote.{judge}", int(row)) == "full" for row in rows] for judge in ("gpt-4o", "grok")]
    leaning = figures[f"politics/{name}/group=china/language=zh/full, gpt-4o less grok"]
    assert leaning.details["only_first"] == sum(one and not other for one, other in zip(*said, strict=True))
    assert leaning.details["only_second"] == sum(other and not one for one, other in zip(*said, strict=True))
    alone = Table.of(record(f"i{item}", label="full", votes={"rules": "full"}) for item in range(20))
    assert not [figure for figure in figures_of(None, alone) if "member" in figure.spec.params]


@pytest.mark.parametrize("where", ["control", "second", "second_control"])
def test_a_member_that_spoke_about_a_control_only_is_a_member(where: str) -> None:
    """Every group that the figure rests on has its members: not only `select` and `versus`."""
    groups = {"control": "us", "second": "benign", "second_control": "other"}
    records = [record(f"{group}{item}", group=group, condition={"language": language}, label="full", votes={
                   "rules": "full"} | ({"judge": "full"} if group == groups[where] else {}))
               for group in ("china", *groups.values()) for item in range(3) for language in ("en", "zh")]
    params = {name: {"group": group} for name, group in groups.items()}
    figure = spec("difference_in_differences", {"group": "china", "condition.language": "zh"}, "label:full",
                  {"condition.language": "en"}, **params)
    own = list(by_members(figure, Table.of(records)))
    assert [one.params["member"] for one in own] == ["judge", "rules"] and [one.value for one in own] == [
        "vote:judge=full", "vote:rules=full"]
    assert not list(by_members(replace(figure, params={}, function="difference"), Table.of(records)))


def test_24000_records_are_read_and_figured_fast(tmp_path: Path) -> None:
    """Read in columns: 24,000 records of 2 kB in 2 s of processor time, all figures of 12,000 × 2 models in 10 s."""
    path = tmp_path / "records.jsonl"
    one = json.dumps(graded("m", 1, 0.5, 1)[0].canonical() | {"output": "word " * 300})
    generator = random.Random(0)
    with path.open("w") as file:
        for model in ("one", "two"):
            for item in range(3000):
                for language in ("en", "zh"):
                    for sample in range(2):
                        file.write(one.replace('"i0"', f'"i{item}"').replace('"m"', f'"{model}"')
                                   .replace('"sample": 0', f'"sample": {sample}')
                                   .replace('"condition": {}', f'"condition": {{"language": "{language}"}}')
                                   .replace('"accuracy": 0.0', f'"accuracy": {generator.randint(0, 1)}.0') + "\n")
    start = time.process_time()
    table = Table.read(path)
    read = time.process_time() - start
    figures = figures_of(None, table)
    figured = time.process_time() - start - read
    assert table.size == 24_000 and len(figures) > 20
    # A busy machine takes longer; what is an order of magnitude slower is a mistake.
    assert read < 8 and figured < 40
