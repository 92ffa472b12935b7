"""Reading answers: what is the same number in other words is read as it, and nothing else is."""

from __future__ import annotations

import string
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.evals.fresh import answers


@pytest.mark.parametrize(("text", "value"), [
    ("1234", "1234"), ("1,234", "1234"), ("1 234", "1234"), ("1'234", "1234"), ("-7", "-7"), ("−7", "-7"),
    ("负七", "-7"),
    ("+12", "12"), ("3/4", "3/4"), ("-3/4", "-3/4"), ("6/8", "3/4"), ("0.75", "3/4"), (".75", "3/4"), ("75%", "3/4"),
    ("1 1/2", "3/2"), ("-1 1/2", "-3/2"), (r"\frac{3}{4}", "3/4"), (r"-\dfrac{3}{4}", "-3/4"), ("$12$", "12"),
    ("**12**", "12"), ("12.", "12"), ("12.0", "12"), ("1.2e3", "1200"), ("12 km", "12"), ("12 marks.", "12"),
    ("x = 12", "12"),
    ("12345678901234567890", "12345678901234567890"), ("1{,}234", "1234"), ("１２", "12"), ("(5)", "5"),
    ("十二", "12"), ("二十", "20"), ("三百二十一", "321"), ("两万零五", "20005"), ("一亿三千万", "130000000"),
    ("3万", "30000"),
    ("1.5万", "15000"), ("2亿", "200000000"), ("一二三", "123"), ("四分之三", "3/4"), ("百分之七十五", "3/4"),
    ("百分之12.5", "1/8"),
    ("三点一四", "157/50"), ("12个", "12"), ("12 元", "12"), ("十二个", "12"), ("负四分之三", "-3/4"),
    ("4分之3", "3/4"),
    # The same number twice, and words before it that name no other.
    ("229/4 (57.25)", "229/4"), ("229/4（57.25）", "229/4"), ("229/4 (= 57.25).", "229/4"),
    ("229/4（即57.25）", "229/4"),
    ("57 1/4 (≈57.25)", "229/4"), (r"$\frac{229}{4}$ (57.25)", "229/4"), (r"x = \frac{229}{4} \approx 57.25", "229/4"),
    ("-7 (-7)", "-7"), ("十二 (12)", "12"), ("x ≈ 57.25", "229/4"), ("about 57.25", "229/4"), ("≈57.25", "229/4"),
    ("approximately -3 km", "-3"), ("约57.25", "229/4"), ("大约为十二", "12"), ("约等于 3/4", "3/4"),
    ("= 57.25", "229/4"), ("$1,234", "1234"), ("-$5", "-5"), ("= $1,234.50", "2469/2"), ("¥12", "12"),
])
def test_numbers_in_many_forms(text: str, value: str) -> None:
    assert answers.read_number(text) == Fraction(value)


@pytest.mark.parametrize("text", [
    "", "twelve", "12 or 13", "12, 13", "between 3 and 4", "1/0", "12/", "--3", "1,23", "12 not", "12 不是", "3/4/5",
    "9" * 200, "1e999999", "1e400", "十二或十三", "NaN", "inf", "½ or 1", "12\x0013", "分之三", "0分之三", "5 to 6",
    "{}",
    # Two numbers that are not equal, a product, a range, a few.
    "229/4 (57.2)", "1/3 (0.33)", "1/3 ≈ 0.33", "12 (13)", "5 (-5)", "50 (50%)", "5 (not 5)", "5 (5 or 6)", "5 ()",
    "() (5)", "3(3)", "(3)(3)", "x = (3)(3)", "3 (3) (3)", "about", "about 12 or 13", "约三五个", "约3-5", "3~5", "≈",
    "not ≈ 5",
])
def test_what_is_no_single_number_is_refused(text: str) -> None:
    assert answers.read_number(text) is None


@given(st.integers(0, 10**9))
def test_chinese_numerals_agree_with_a_writer_of_them(number: int) -> None:
    assert answers.chinese_number(write_chinese(number)) == number


def write_chinese(number: int) -> str:
    """The textbook rule, four digits at a time."""
    if number == 0:
        return "零"
    sections, out, gap = [], "", False
    while number:
        number, section = divmod(number, 10_000)
        sections.append(section)
    for place in range(len(sections) - 1, -1, -1):
        section = sections[place]
        if section == 0:
            gap = bool(out)
            continue
        if out and (gap or section < 1000):
            out += "零"
        gap = False
        text, zero = "", False
        for digit, unit in zip(f"{section:04d}", "千百十 ", strict=True):
            if digit == "0":
                zero = bool(text)
                continue
            text += ("零" if zero else "") + "零一二三四五六七八九"[int(digit)] + unit.strip()
            zero = False
        out += text + ("", "万", "亿")[place]
    return out


@given(st.fractions(max_denominator=10**6), st.sampled_from([" km", "", "%", " 元", "."]))
def test_written_fractions_are_read_back(value: Fraction, unit: str) -> None:
    if unit == "%":
        unit = ""
    assert answers.read_number(f"{value}{unit if value.denominator == 1 else ''}") == value


@given(*2 * [st.fractions(-10**6, 10**6, max_denominator=100)], st.sampled_from(["{} ({})", "{} ≈ {}"]))
def test_a_number_written_twice_is_read_where_both_are_equal(one: Fraction, two: Fraction, form: str) -> None:
    assert answers.read_number(form.format(one, one)) == one
    assert answers.read_number(form.format(one, two)) == (one if one == two else None)


@given(st.fractions(max_denominator=10**6), st.sampled_from(["about ", "≈", "~", "约", "大约 ", "= ", r"\approx "]))
def test_words_before_a_number_change_nothing(value: Fraction, ahead: str) -> None:
    assert answers.read_number(f"{ahead}{value}") == value


@pytest.mark.parametrize(("text", "found"), [
    ("thinking 4\nAnswer: 5", "5"), ("Answer: 3\nno wait\nAnswer: 5", "5"), ("答案：五", "五"), ("**Answer:** 5", "5"),
    ("so the answer is 5", "5"), (r"thus \boxed{5}", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), ("5", "5"),
    (r"Answer: $\boxed{5}$", "5"), ("Answer:\n5", "5"), ("最终答案: 5", "5"), (r"\boxed{4}" + "\nAnswer: 5", "5"),
    ("Answer: 4, but " + r"\boxed{5}", "5"), ("", ""), ("答案是 5", "5"),
])
def test_the_final_answer(text: str, found: str) -> None:
    assert answers.final(text).strip("$ ") == found


@pytest.mark.parametrize("text", ["A, B, C", "A、B、C", "A; B; C", "[A, B, C]", '["A", "B", "C"]', "A B C",
                                  "A -> B -> C",
                                  "A，B，C", "A, B and C", "A、B 和 C", "1. A, 2. B, 3. C", "**A, B, C**", "A > B > C"])
def test_lists_in_many_forms(text: str) -> None:
    assert answers.read_items(text) == ["A", "B", "C"]


def test_json_is_found_in_fences_and_prose() -> None:
    assert answers.read_json('So: [{"a": 1}] is it') == [{"a": 1}]
    assert answers.read_json('```json\n[1]\n```\nor rather\n```json\n[2]\n```') == [2]
    assert answers.read_json("nothing [here") is None
    assert answers.read_json("[" * 100_000) is None


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.sampled_from(string.printable + "答案：分之万亿一二三\\{}$²½"), st.characters()),
               max_size=300))
def test_no_text_raises(text: str) -> None:
    for read in (answers.final, answers.read_number, answers.read_items, answers.read_json, answers.read_code):
        read(text)
        read(f"Answer: {text}")
