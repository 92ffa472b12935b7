"""How a figure is printed, in every language: one function of its numbers, so that all reports and cells print alike.

`text_of(figure, "en")` is `Figure.text`. The text that a figure carries is never read here, so whoever has the numbers
has the text in each language, and can compare it with what a page shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LANGUAGES = ("en", "zh")
_SAID: dict[str, dict[str, str]] = {
    "en": {
        "nothing": "no value", "unscored": "no value (0 of {missing:,} scored)", "no_interval": "(no interval)",
        "never": "0 of {n:,}{among} ({bound})", "always": "{n:,} of {n:,}{among} ({bound})",
        "among": " in {clusters:,} clusters", "upper": "upper bound {bound}", "lower": "lower bound {bound}",
        "no_bound": "no bound", "points": "{value} points", "none_left": "none after correction ({bound})",
        "all_left": "all after correction ({bound})", "not_corrected": "not corrected: {why}",
        "no_answer": "no answer",
        "missing": "{unscored:,} unscored, {abstained:,} abstained, {errors:,} failed of {n:,}",
        "no_price": "no price known for {unknown:,} of {n:,} answers", "none_right": "no correct answer for ${spent}",
        "effect": "{effect:.2f} ({n:,} answers count as {worth:,.0f})", "no_effect": "no variance to tell it from",
        "pairs": "pairs", "items": "items a side", "no_power": "cannot be told: no variance among {n:,} {unit}",
        "power": "differences below {smallest} are missed more often than {miss:.0%} of the time with {n:,} {unit}; "
                 "{margin} {need} {needed:,}",
        "slope": "{value} points per unit of dose", "need": "need", "would_need": "would need only",
    },
    "zh": {
        "nothing": "没有数值", "unscored": "没有数值（{missing:,} 条中 0 条已评分）", "no_interval": "（无区间）",
        "never": "{n:,} 条中 0 条{among}（{bound}）", "always": "{n:,} 条中 {n:,} 条{among}（{bound}）",
        "among": "，分属 {clusters:,} 簇", "upper": "上界 {bound}", "lower": "下界 {bound}",
        "no_bound": "无界限", "points": "{value} 个百分点", "none_left": "校正后为零（{bound}）",
        "all_left": "校正后为全部（{bound}）", "not_corrected": "未校正：{why}",
        "no_answer": "没有回答",
        "missing": "{n:,} 条中 {unscored:,} 条未评分，{abstained:,} 条弃权，{errors:,} 条失败",
        "no_price": "{n:,} 条回答中有 {unknown:,} 条价格不明", "none_right": "花费 ${spent}，没有正确回答",
        "effect": "{effect:.2f}（{n:,} 条回答相当于 {worth:,.0f} 条）", "no_effect": "没有方差，无从判断",
        "pairs": "对", "items": "题（每方）", "no_power": "无法判断：{n:,} {unit}之间没有方差",
        "power": "用 {n:,} {unit}时，小于 {smallest}的差异有 {miss:.0%} 以上的可能被漏掉；"
                 "{margin}{need} {needed:,} {unit}",
        "slope": "每单位剂量 {value} 个百分点", "need": "需要", "would_need": "只需要",
    },
}


def decimals_for(share: float) -> int:
    """Digits after the point of a percentage: one, or as many as it takes not to print 0 or 100 for what is neither."""
    distance = min(share, 1.0 - share) * 100.0
    digits = 1
    while 0.0 < distance < 0.5 * 10.0**-digits and digits < 8:
        digits += 1
    return digits


def percent(share: float) -> str:
    return f"{100 * share:.{decimals_for(share)}f}%"


def signed(value: float, form: str) -> str:
    """With its sign, a true minus, and no sign on what prints as zero."""
    text = format(abs(value), form)
    if not any(digit in "123456789" for digit in text):
        return text
    return ("+" if value > 0 else "−") + text


def minus(value: float, form: str = ".2f") -> str:
    """With a true minus where it is negative, and none on what prints as zero."""
    return signed(value, form).removeprefix("+")


def significant(value: float) -> str:
    """Three digits, and all digits before the point: 0.0123, 1.23, 12,345."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.10f}".rstrip("0") if "e" in text else text


def rate_text(value: float, low: float | None, high: float | None, n: int, clusters: int, language: str = "en",
              brief: bool = False) -> str:
    """Neither no event nor nothing but events is a bare 0% or 100%. `brief`, beside a drawn interval: `0 of 49
    (≤ 7.3%)`."""
    said = _SAID[language]
    among = said["among"].format(clusters=clusters) if 0 < clusters < n and not brief else ""
    if value in (0.0, 1.0):
        end = low if value else high
        bound = f"{'≥' if value else '≤'} {percent(end)}" if brief and end is not None else \
            _bound(value, low, high, said)
        return said["always" if value else "never"].format(n=n, among=among, bound=bound)
    return f"{percent(value)} {_ends(low, high, '{:.1f}', said, 100)}"


def _bound(value: float, low: float | None, high: float | None, said: Mapping[str, str]) -> str:
    """How far a share of 0 or 1 may truly be from it."""
    bound = low if value else high
    return said["no_bound"] if bound is None else said["lower" if value else "upper"].format(bound=percent(bound))


def _ends(low: float | None, high: float | None, form: str, said: Mapping[str, str], scale: float = 1) -> str:
    if low is None or high is None:
        return said["no_interval"]
    return f"[{form.format(scale * low)}, {form.format(scale * high)}]"


def text_of(figure: Any, language: str = "en") -> str:
    """The exact string that every report in this language prints for a figure, told from its numbers alone.

    `figure`: a `Figure`, anything with the same fields, or such fields in a mapping.
    """
    if isinstance(figure, Mapping):
        from moonbase.evals.figures import Figure

        figure = Figure.model_validate(figure)
    said = _SAID[language]
    special = _SPECIAL.get(figure.function)
    if special is not None:
        return special(figure, said, language)
    value, low, high = figure.value, figure.low, figure.high
    if value is None:
        missing = figure.unscored + figure.abstained + figure.errors
        return said["unscored"].format(missing=missing) if missing and not figure.n else said["nothing"]
    if figure.unit == "rate":
        return rate_text(value, low, high, figure.n, figure.clusters, language)
    if figure.unit in ("points", "difference"):
        scale, form = (100, ".1f") if figure.unit == "points" else (1, ".4g")
        written = signed(scale * value, form)
        ends = said["no_interval"] if low is None or high is None else \
            f"[{signed(scale * low, form)}, {signed(scale * high, form)}]"
        return f"{said['points'].format(value=written) if figure.unit == 'points' else written} {ends}"
    if figure.unit == "coefficient":
        ends = said["no_interval"] if low is None or high is None else f"[{minus(low)}, {minus(high)}]"
        return f"{minus(value)} {ends}"
    prefix = "$" if figure.unit == "dollars" else ""
    ends = said["no_interval"] if low is None or high is None else \
        f"[{prefix}{significant(low)}, {prefix}{significant(high)}]"
    return f"{prefix}{significant(value)} {ends}"


def _corrected(figure: Any, said: Mapping[str, str], language: str) -> str:
    """A corrected rate is no count of events: its 0 carries the bound."""
    value, low, high = figure.value, figure.low, figure.high
    if value is None:
        from moonbase.evals.report.phrases import say

        missing = figure.unscored + figure.abstained + figure.errors
        if figure.n:
            return said["not_corrected"].format(why=say(figure.method, language))
        return said["unscored"].format(missing=missing) if missing else said["nothing"]
    if value in (0.0, 1.0) and low is not None and high is not None:
        return said["all_left" if value else "none_left"].format(bound=_bound(value, low, high, said))
    return f"{percent(value)} {_ends(low, high, '{:.1f}', said, 100)}"


def _missing(figure: Any, said: Mapping[str, str], _: str) -> str:
    if not figure.n:
        return said["no_answer"]
    return said["missing"].format(unscored=figure.unscored, abstained=figure.abstained, errors=figure.errors,
                                  n=figure.n)


def _cost(figure: Any, said: Mapping[str, str], _: str) -> str:
    if figure.value is None:
        if "spent" in figure.details:
            return said["none_right"].format(spent=f"{figure.details['spent']:,.4g}")
        return said["no_price"].format(unknown=figure.details.get("unknown", 0), n=figure.n)
    if figure.low is None or figure.high is None:
        return f"${significant(figure.value)} {said['no_interval']}"
    return f"${significant(figure.value)} [${significant(figure.low)}, ${significant(figure.high)}]"


def _design_effect(figure: Any, said: Mapping[str, str], _: str) -> str:
    if not figure.value:
        return said["no_effect"]
    # Clusters that mix easy and hard on purpose are less noisy than a random sample; no answer counts twice.
    return said["effect"].format(effect=figure.value, n=figure.n, worth=min(figure.n / figure.value, figure.n))


def _power(figure: Any, said: Mapping[str, str], _: str) -> str:
    unit, details = said["pairs" if figure.versus else "items"], figure.details
    if figure.value is None:
        return said["no_power"].format(n=figure.n, unit=unit)
    margin, needed = details.get("margin", 0.05), details.get("n_needed", 0)
    smallest, size = (said["points"].format(value=f"{100 * part:.1f}") if figure.unit == "points" else f"{part:.4g}"
                      for part in (figure.value, margin))
    return said["power"].format(smallest=smallest, miss=1 - details.get("power", 0.8), n=figure.n, unit=unit,
                                margin=size, need=said["need" if needed > figure.n else "would_need"], needed=needed)


def _slope(figure: Any, said: Mapping[str, str], _: str) -> str:
    """Three digits: a dose may be a step of a million."""
    if figure.value is None:
        return said["nothing"]
    scale = 100 if figure.details.get("bounded", True) else 1
    value, low, high = (None if part is None else signed(scale * part, ".3g")
                        for part in (figure.value, figure.low, figure.high))
    ends = said["no_interval"] if low is None or high is None else f"[{low}, {high}]"
    return f"{said['slope'].format(value=value) if scale == 100 else value} {ends}"


_SPECIAL = {"slope": _slope, "corrected_rate": _corrected, "missing": _missing, "cost_per_correct": _cost,
            "design_effect": _design_effect, "power": _power}
