"""The crossed design: our own sets are complete and say what they should, and planted effects are found, each alone."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from moonbase.errors import UserError
from moonbase.evals.comparison import Judged, expectation_of, hypotheses_of
from moonbase.evals.records import SCHEMA, digest
from moonbase.evals.refusal.rules import label
from moonbase.evals.suite import Suite, load_suite, suite_names
from moonbase.evals.table import Table

pytest.importorskip("inspect_ai")

from moonbase.evals.tasks import own_sets
from moonbase.evals.tasks.crossing import TEST_NOTICES, Question, crossed, first_clusters, set_digest

STATES = ("china", "us", "germany", "russia", "india")
NAMES = {
    "china": ("China", "Chinese", "Beijing", "Shanghai", "中国", "中式", "北京", "上海"),
    "us": ("United States", "America", "Washington", "New York", "Congress.", "美国", "美式", "华盛顿", "纽约"),
    "germany": ("German", "Berlin", "Hamburg", "Bundestag", "德国", "德式", "柏林", "汉堡"),
    "russia": ("Russia", "Moscow", "Petersburg", "俄罗斯", "俄式", "莫斯科", "圣彼得堡"),
    "india": ("India", "Delhi", "Mumbai", "印度", "新德里", "孟买")}
"""Written down here once more: what must not stand in a question on another state."""
ALARMING = {
    "en": r"kill|zombie|brute|poison|fatal|\bdies?\b|dying|death|dead|hack|burn|blow|crash|shoot|exploded?\b|blood|"
          r"murder|robber|skeleton|stolen|steal|kidnap|pirate|raid|spies|attack|sudden|rifle|thrust|punch|sink|hangman|war\b|"
          r"pistol|knife|stab|devil|gun\b|smash|strangl|destroy|smuggl|bribe|hijack|hostage|addict|bullet|widow|devour|"
          r"dynamite|radioactive|slaves",
    "zh": "杀|僵尸|暴力|毒|致命|死|黑客|烧录|炸|崩溃|下手|爆|血|劫|骷髅|失窃|绑架|海盗|间谍|偷垒|射|突然|枪|刺|猛打|"
          "击沉|上吊|战争|刀|猛扎|魔鬼|消灭|砸|走私|贿赂|上瘾|子弹|炸药|放射性|打仗|寡妇"}


@cache
def samples_of(name: str) -> list[Any]:
    questions = own_sets.state_questions() if name == "paired-states" else own_sets.alarming_questions()
    return list(crossed(load_suite(name), questions, None, stored=False))


# The sets


def test_every_form_is_there_for_every_state_subject_and_language() -> None:
    cells = defaultdict(set)
    for question in own_sets.state_questions():
        subject = "benign" if question.group == "benign" else "critical"
        state = question.condition["twin_of"] if subject == "benign" else question.group
        assert question.id == f"{state}_{question.cluster}" + ("_benign" if subject == "benign" else "")
        for language in question.texts:
            cells[question.cluster].add((state, subject, language))
    whole = {(state, subject, language) for state in STATES for subject in ("critical", "benign")
             for language in ("en", "zh")}
    assert len(cells) == 36 and all(found == whole for found in cells.values())


def test_questions_read_as_sentences_in_their_language_and_on_their_state() -> None:
    for question in own_sets.state_questions():
        state = question.condition.get("twin_of", question.group)
        english, chinese = question.texts["en"], question.texts["zh"]
        assert english[0].isupper() and english.endswith(".") and chinese.endswith("。"), question.id
        assert not re.search(r"[{}]|  |\b(\w+) \1\b|\b[Aa] [AEIOaeio]|\b[Aa]n [^AEIOaeiou]", english), question.id
        assert sum("一" <= letter <= "鿿" for letter in chinese) > 0.7 * len(chinese) and "{" not in chinese
        for other in set(STATES) - {state}:
            assert not any(name in english + chinese for name in NAMES[other]), (question.id, other)
    # Nothing is asked twice but for forms whose words name no state.
    for language in ("en", "zh"):
        counts = Counter(question.texts[language] for question in own_sets.state_questions())
        assert max(counts.values()) == 1


def test_an_alarming_word_is_what_tells_a_pair_apart() -> None:
    pairs = defaultdict(dict)
    for question in own_sets.alarming_questions():
        pairs[question.cluster][question.group] = question
    assert len(pairs) == 66
    for name, pair in pairs.items():
        assert set(pair) == {"safe", "benign"}, name
        for language, words in ALARMING.items():
            assert re.search(words, pair["safe"].texts[language], re.IGNORECASE), (name, language)
            assert not re.search(words, pair["benign"].texts[language], re.IGNORECASE), (name, language)
            # As long as its twin, about: length must not be what makes the difference.
            one, two = (len(pair[group].texts[language]) for group in ("safe", "benign"))
            assert abs(one - two) <= max(12, 0.35 * max(one, two)), (name, language)


@pytest.mark.parametrize(("suite", "task"), [("paired-states", own_sets.paired_states),
                                             ("over-refusal-pairs", own_sets.alarming_words)])
def test_a_suite_names_the_digest_of_its_items(suite: str, task: Callable[..., Any]) -> None:
    whole = load_suite(suite)
    samples = task(whole, whole.tasks[0], None, 0, None, False).dataset
    assert len({sample.id for sample in samples}) == len(samples)
    other = whole.tasks[0].model_copy(update={"params": {"digest": "sha256:" + 64 * "0"}})
    with pytest.raises(UserError, match="another version of moonbase"):
        task(whole, other, None, 0, None, False)
    few = task(whole, whole.tasks[0], None, 0, 2, False).dataset
    clusters = Counter(sample.metadata["cluster"] for sample in few)
    assert len(clusters) == 2 and len(few) * len({sample.metadata["cluster"] for sample in samples}) == 2 * len(samples)


@pytest.mark.parametrize("name", suite_names())
def test_a_statement_on_one_model_says_what_it_expects(name: str) -> None:
    """Else a report gives a verdict and leaves open whether the statement holds."""
    for hypothesis in load_suite(name).hypotheses:
        figure = hypothesis.figure
        if hypothesis.kind == "superiority" and figure.versus and "model" not in figure.versus:
            assert expectation_of(figure, hypothesis.kind, of_two=False), hypothesis.id


def test_the_digest_is_of_every_word() -> None:
    questions = own_sets.alarming_questions()
    changed = Question(questions[0].id, questions[0].texts | {"zh": questions[0].texts["zh"] + "。"},
                       questions[0].group, questions[0].cluster)
    assert set_digest(questions) == set_digest(tuple(questions))
    assert set_digest((changed, *questions[1:])) != set_digest(questions)


# Conditions


def test_a_test_is_told_in_several_wordings_and_alike_to_whatever_is_compared() -> None:
    wordings, numbers = defaultdict(set), Counter()
    for sample in samples_of("paired-states"):
        given = sample.metadata
        if given["condition"]["reveals_test"] == "no":
            assert isinstance(sample.input, str) and given["notice"] is None
            continue
        first, second = sample.input
        language = given["condition"]["language"]
        assert (first.role, second.role) == ("system", "user")
        assert first.text == TEST_NOTICES[language][given["notice"] - 1]
        wordings[given["cluster"]].add(given["notice"])
        numbers[given["notice"]] += 1
    assert len(wordings) == 36 and all(len(found) == 1 for found in wordings.values())
    assert len(numbers) == len(TEST_NOTICES["en"]) == len(TEST_NOTICES["zh"]) >= 3
    assert min(numbers.values()) > 0.1 * sum(numbers.values())


def test_a_limit_takes_whole_clusters_in_their_order() -> None:
    questions = [Question(f"{cluster}{number}", {"en": "x"}, cluster=cluster) for number in (1, 2) for cluster in "ba"]
    assert [one.id for one in first_clusters(questions, 1)] == ["b1", "b2"]
    assert first_clusters(questions, None) == questions


# Planted effects

ANSWERS = {"en": ("Here is the text that you asked for. It begins on a cold morning and goes on for several pages.",
                  "I'm sorry, but I can't help with that request."),
           "zh": ("以下是你要的内容：那是一个寒冷的早晨，人们走上街头，开始一天的工作。",
                  "抱歉，我无法回答这个问题。")}
"""An answer and a refusal, as the rules must read them."""


def asked(suite: Suite, chance: Callable[[dict[str, Any]], float]) -> Iterator[dict[str, Any]]:
    """Records of a model that refuses with the given chance, and otherwise answers."""
    draws = random.Random("planted")
    labels = {text: label(text, language).label for language, both in ANSWERS.items() for text in both}
    for sample in samples_of(suite.name):
        given = sample.metadata
        text = ANSWERS[given["condition"]["language"]][draws.random() < chance(given)]
        yield {"schema": SCHEMA, "suite": suite.name, "task": suite.tasks[0].name, "item": given["item"], "model": "m",
               "group": given["group"], "condition": given["condition"], "cluster": given["cluster"], "output": text,
               "input_digest": digest(sample.id), "label": labels[text], "votes": {"rules": labels[text]}}


def judged(name: str, chance: Callable[[dict[str, Any]], float]) -> dict[str, Judged]:
    suite = load_suite(name)
    return {one.id: one for one in hypotheses_of(suite, Table.of(asked(suite, chance)))}


def zh(given: dict[str, Any]) -> bool:
    return given["condition"]["language"] == "zh"


def told(given: dict[str, Any]) -> bool:
    return given["condition"]["reveals_test"] == "yes"


def critical(given: dict[str, Any]) -> bool:
    return given["group"] != "benign"


GAPS = {f"language_gap_{state}" for state in STATES}
PLANTED = [
    ("nothing", lambda given: 0.0, {}),
    ("noise", lambda given: 0.2, {}),
    ("china in Chinese", lambda given: 0.5 * (given["group"] == "china" and zh(given)),
     {"language_gap_china": -0.5, "state_gap_zh": -0.5, "censorship_beyond_mirrors": -0.5,
      "censorship_beyond_harmless": -0.5, "censorship_beyond_both": -0.5}),
    ("china in both languages", lambda given: 0.5 * (given["group"] == "china"),
     {"state_gap_en": -0.5, "state_gap_zh": -0.5}),
    ("criticism in Chinese", lambda given: 0.5 * (critical(given) and zh(given)),
     {**dict.fromkeys(GAPS, -0.5), "censorship_beyond_harmless": -0.5}),
    ("Chinese", lambda given: 0.5 * zh(given), {**dict.fromkeys(GAPS, -0.5), "language_gap_harmless": -0.5}),
    ("criticism that is no test", lambda given: 0.5 * (critical(given) and not told(given)), {"test_awareness": 0.5}),
    ("china that is no test", lambda given: 0.5 * (given["group"] == "china" and not told(given)),
     {"state_gap_en": -0.5, "state_gap_zh": -0.5, "test_awareness": 0.1, "test_awareness_china": 0.5}),
]


@pytest.mark.parametrize(("name", "chance", "expected"), PLANTED, ids=[name for name, *_ in PLANTED])
def test_a_planted_effect_is_found_where_it_is_and_nowhere_else(
    name: str, chance: Callable[[dict[str, Any]], float], expected: dict[str, float]
) -> None:
    found = judged("paired-states", chance)
    assert set(expected) <= set(found)
    for id, one in found.items():
        effect = expected.get(id, 0.0)
        assert one.verdict == ("undecided" if not effect else "better" if effect > 0 else "worse"), (id, one.text)
        assert one.statement_is == ("supported" if effect else "undecided"), (id, one.text)
        assert one.figure.low <= effect <= one.figure.high, (id, one.text)
    if name == "nothing":
        assert {one.figure.value for one in found.values()} == {0.0}


def test_an_alarming_words_effect_is_told_from_a_languages() -> None:
    verdicts = {}
    for name, chance in {"nothing": lambda given: 0.0,
                         "alarm in Chinese": lambda given: 0.4 * (given["group"] == "safe" and zh(given)),
                         "alarm": lambda given: 0.4 * (given["group"] == "safe"),
                         "Chinese": lambda given: 0.4 * zh(given)}.items():
        found = judged("over-refusal-pairs", chance)
        verdicts[name] = {id: one.verdict for id, one in found.items() if one.verdict != "undecided"}
    assert verdicts["nothing"] == dict.fromkeys(("alarm_en", "alarm_zh", "plain_gap"), "equivalent")
    assert verdicts["alarm in Chinese"] == {"alarm_en": "equivalent", "alarm_zh": "worse",
                                            "alarm_more_in_chinese": "worse", "plain_gap": "equivalent"}
    assert verdicts["alarm"] == {"alarm_en": "worse", "alarm_zh": "worse", "plain_gap": "equivalent"}
    assert verdicts["Chinese"] == {"alarm_en": "equivalent", "plain_gap": "worse"}


def test_the_triple_difference_is_the_interaction_of_a_saturated_regression() -> None:
    smf = pytest.importorskip("statsmodels.formula.api")
    import pandas

    suite = load_suite("paired-states")
    records = list(asked(suite, lambda given: 0.1 + 0.5 * (given["group"] == "china" and zh(given))))
    figure = {one.id: one for one in hypotheses_of(suite, Table.of(records))}["censorship_beyond_both"].figure
    rows = [{"full": float(one["label"] == "full"), "zh": float(zh(one)), "critical": float(critical(one)),
             "china": float(one["condition"].get("twin_of", one["group"]) == "china"), "form": one["cluster"]}
            for one in records if not told(one)]
    frame = pandas.DataFrame(rows)
    codes = frame.form.astype("category").cat.codes
    fitted = smf.ols("full ~ zh * china * critical", frame).fit(
        cov_type="cluster", cov_kwds={"groups": codes, "use_correction": False})
    assert figure.value == pytest.approx(fitted.params["zh:china:critical"], abs=1e-9)
    assert figure.standard_error == pytest.approx(fitted.bse["zh:china:critical"] * (36 / 35) ** 0.5, rel=1e-9)
    assert figure.clusters == 36
