"""The charts of an evaluation report, as inline SVG in two sizes.

A drawing holds marks, numbers and the names of what is measured, in the page's language and the page's fonts: its
letters are text, not outlines. Titles, axes in words and legends belong to the page. Each model has a shape and a dash
of its own besides its colour, so that a grey print reads the same. Every drawing carries a title and a description, and
the page puts its table below it.
"""

from __future__ import annotations

import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from moonbase.evals.report.read import Shown
from moonbase.evals.report.sorting import Group, at_dose, dose_of
from moonbase.report.charts import COMPACT_FONT, COMPACT_WIDTH, WIDE_FONT, WIDE_WIDTH
from moonbase.report.svg import COLOUR, draw
from moonbase.report.words import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 40
"""Rows of one drawing; the table below it has all."""
# Colour, marker and dash of matplotlib, and the same marker as the outline of a 10 × 10 key.
STYLES = (
    ("accent", "o", "-", "M10 5A5 5 0 1 1 0 5A5 5 0 1 1 10 5Z"),
    ("second", "s", (0, (5, 2)), "M.7 .7H9.3V9.3H.7Z"),
    ("ink", "^", (0, (1.2, 1.6)), "M5 0L10 10H0Z"),
    ("depth-4", "D", (0, (6, 2, 1.2, 2)), "M5 0L10 5L5 10L0 5Z"),
    ("alarm", "v", (0, (3, 1.2)), "M5 10L10 0H0Z"),
    ("depth-0", "P", (0, (8, 2)), "M3.3 0H6.7V3.3H10V6.7H6.7V10H3.3V6.7H0V3.3H3.3Z"),
    ("muted", "X", (0, (4, 1.5, 1.2, 1.5, 1.2, 1.5)), "M2.5 0L5 2.5L7.5 0L10 2.5L7.5 5L10 7.5L7.5 10L5 7.5L2.5 10L0 "
     "7.5L2.5 5L0 2.5Z"),
    ("depth-6", "h", (0, (2, 2)), "M5 0L9.4 2.5V7.5L5 10L.6 7.5V2.5Z"),
)


MOST_KEPT = 64
_DRAWN: dict[tuple[str, str], str] = {}
"""Drawings by name and content, the last few of them."""


@dataclass(frozen=True)
class Size:
    wide: bool

    @property
    def width(self) -> int:
        return WIDE_WIDTH if self.wide else COMPACT_WIDTH

    @property
    def font(self) -> float:
        return WIDE_FONT if self.wide else COMPACT_FONT

    @property
    def letter(self) -> float:
        """About the width of one letter, in pixels; system fonts are narrower or as wide."""
        return self.font * 0.61


@dataclass(frozen=True)
class Row:
    """One line of a forest: a heading where it has no points. A point is (figure, style, filled)."""

    label: str
    points: tuple[tuple[Shown, int, bool], ...] = ()
    text: str = ""


def breadth(text: str) -> float:
    """In letters; a Chinese character takes nearly two, capitals and a few others more than one."""
    return sum(1.75 if unicodedata.east_asian_width(letter) in "WF" else 1.25 if letter in "mwMW@%—…" else 1.0
               for letter in text)


def short(text: str, limit: float) -> str:
    """A name from outside on one line, cut where it is broader than `limit` letters."""
    text = " ".join(visible(text).split())
    if breadth(text) <= limit:
        return text
    while text and breadth(text) > limit - 1.25:
        text = text[:-1]
    return text + "…"


def short_name(text: str, limit: float) -> str:
    """The same, cut in the middle: versions of one model differ at their ends."""
    text = " ".join(visible(text).split())
    if breadth(text) <= limit:
        return text
    end = ""
    while len(end) < len(text) - 1 and breadth(text[-len(end) - 1] + end) <= (limit - 1.25) / 2:
        end = text[-len(end) - 1] + end
    return short(text, limit - breadth(end)) + end


def broken(text: str, limit: float) -> list[str]:
    """Lines of at most `limit` letters, broken at blanks, around Chinese characters, and within what is longer."""
    lines = [""]
    for piece in re.findall(r"\s*(?:[\u3000-\u9fff\uff00-\uffef]|[^\s\u3000-\u9fff\uff00-\uffef]+)", text):
        if lines[-1] and breadth(lines[-1] + piece) > limit:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
        while breadth(lines[-1]) > limit:
            fits = next(end for end in range(len(lines[-1]), 0, -1) if breadth(lines[-1][:end]) <= limit)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines


def key_icon(style: int, filled: bool = True, line: bool = False) -> str:
    """The mark of a legend, as it is drawn."""
    colour, _, dash, outline = STYLES[style % len(STYLES)]
    fill = f"var(--{colour})" if filled else "var(--paper)"
    dashes = "" if dash == "-" else f' stroke-dasharray="{" ".join(f"{part * 1.6:g}" for part in dash[1])}"'
    stroke = f'<path d="M0 6H34" fill="none" stroke="var(--{colour})" stroke-width="1.6"{dashes}/>' if line else ""
    width, shift = (34, 12) if line else (12, 1)
    return (f'<svg class="key" viewBox="0 0 {width} 12" width="{width}" height="12" aria-hidden="true">{stroke}'
            f'<path transform="translate({shift} 1)" d="{outline}" fill="{fill}" stroke="var(--{colour})" '
            'stroke-width="1.4"/></svg>')


def both_sizes(key: str, title: str, description: str, content: str,
               one: Callable[[str, Size], str]) -> tuple[str, str]:
    """(wide, compact) drawings with their text alternatives. `content` says in full what is drawn: the page in the next
    language has the same drawings."""
    drawn = []
    for size in (Size(True), Size(False)):
        name = f"{key}-{'w' if size.wide else 'c'}"
        drawing = _DRAWN.get((name, content))
        if drawing is None:
            with warnings.catch_warnings():
                # matplotlib looks letters up in its own font; the page shows them in the reader's.
                warnings.simplefilter("ignore", UserWarning)
                drawing = one(name, size)
            if len(_DRAWN) >= MOST_KEPT:
                _DRAWN.pop(next(iter(_DRAWN)))
            _DRAWN[name, content] = drawing
        drawn.append(_described(drawing, name, title, description))
    return drawn[0], drawn[1]


def _described(drawing: str, name: str, title: str, description: str) -> str:
    words = (f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc">'
             f'<title id="{name}-title">{escape(visible(title))}</title>'
             f'<desc id="{name}-desc">{escape(visible(description))}</desc>')
    return drawing.replace('aria-hidden="true">', words, 1)


def in_percent(figures: Sequence[Shown]) -> bool:
    """Shares and differences of shares are drawn in percent, as they are written."""
    return bool(figures) and all(figure.unit in ("rate", "share", "points") for figure in figures)


def _bounds(figure: Shown) -> tuple[float, float, float] | None:
    """(value, low, high); a bound that is not known is the value itself, a value that is not known its middle."""
    ends = [end for end in (figure.low, figure.high) if end is not None]
    if figure.value is None:
        return (sum(ends) / 2, *ends) if len(ends) == 2 else None
    return (figure.value, figure.value if figure.low is None else figure.low,
            figure.value if figure.high is None else figure.high)


def _limits(figures: Sequence[Shown], percent: bool, reference: float | None = None) -> tuple[float, float]:
    ends = [end for figure in figures if (bounds := _bounds(figure)) for end in bounds]
    ends += [reference] if reference is not None else []
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 0.05
    # The ends of the scale stay where they are: nothing is below 0 % or above 100 %.
    left = 0.0 if percent and 0 <= low < 0.15 else low - air
    right = 1.0 if percent and 0.85 < high <= 1 else high + air
    if percent and low >= 0:
        left = max(left, 0.0)
    return left, right


def _write_value(percent: bool, money: bool = False, signed: bool = False) -> Callable[[float, int], str]:
    def write(value: float, _: int = 0) -> str:
        number = f"{value * 100:.4g}" if percent else f"{value:.4g}"
        number = "0" if number in ("-0", "0") else number.replace("-", "\u2212")
        sign = "+" if signed and value > 1e-12 else ""
        return f"{sign}{'$' if money else ''}{number}{'%' if percent and not signed else ''}"

    return write


def _scale(axes: Axes, size: Size, limits: tuple[float, float], write: Callable[[float, int], str],
           horizontal: bool = True, log: bool = False) -> None:
    """Few round ticks, hairlines, no frame."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axis = axes.xaxis if horizontal else axes.yaxis
    (axes.set_xlim if horizontal else axes.set_ylim)(*limits)
    if log:
        (axes.set_xscale if horizontal else axes.set_yscale)("log")
        decades = range(math.floor(math.log10(limits[0])), math.ceil(math.log10(limits[1])) + 1)
        subs = (1, 2, 5) if len(decades) < 4 and size.wide else (1,)
        ticks = [part * 10.0**decade for decade in decades for part in subs]
        axis.set_major_locator(FixedLocator([tick for tick in ticks if limits[0] <= tick <= limits[1]]))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(nbins=7 if size.wide else 4, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(write))
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.grid(axis="x" if horizontal else "y", linewidth=1.0)
    axes.set_axisbelow(True)


def _mark(axes: Axes, x: float, y: float, style: int, filled: bool = True, **more: object) -> None:
    colour, marker, _, _ = STYLES[style % len(STYLES)]
    axes.plot([x], [y], linestyle="none", marker=marker, markersize=7.5, color=COLOUR[colour],
              markerfacecolor=COLOUR[colour if filled else "paper"], markeredgecolor=COLOUR[colour],
              markeredgewidth=1.4, clip_on=False, zorder=4, **more)


def forest(key: str, title: str, description: str, rows: Sequence[Row], *, reference: float | None = None,
           bounds: tuple[float, ...] = (), money: bool = False, signed: bool = False,
           joined: bool = False) -> tuple[str, str]:
    """Intervals under one another. `reference` is a line that is always in view, `bounds` are lines that are drawn
    where they fall inside; `joined`: points of a row are connected."""
    figures = [figure for row in rows for figure, _, _ in row.points]
    percent = in_percent(figures)
    limits = _limits(figures, percent and not signed, reference)
    lines = [line for line in (reference, *bounds) if line is not None and limits[0] <= line <= limits[1]]
    ends = [end for figure in figures if (found := _bounds(figure)) for end in found]
    log = money and min(ends, default=0) > 0 and max(ends) > 20 * min(ends)
    if log:
        limits = (min(ends) / 1.4, max(ends) * 1.4)

    def one(name: str, size: Size) -> str:
        names, texts = (36, 40) if size.wide else (26, 34)
        left = right = 16
        if size.wide:
            longest = max((breadth(short_name(row.label, names)) for row in rows if row.points), default=0)
            left = int(longest * size.letter) + 26
            right = int(max((breadth(short(row.text, texts)) for row in rows), default=0) * size.letter) + 30
        step = 27 if size.wide else 42
        step += 11 if any(len(row.points) > 1 for row in rows) else 0
        height = len(rows) * step + 40
        return draw(name, size.width, height, (left, right, 6, 34), size.font,
                    lambda axes: _paint_forest(axes, size, rows, limits, (names, texts), lines, joined,
                                               _write_value(percent, money, signed), log))

    return both_sizes(key, title, description, repr((rows, reference, bounds, money, signed, joined)), one)


def _paint_forest(axes: Axes, size: Size, rows: Sequence[Row], limits: tuple[float, float], cuts: tuple[int, int],
                  lines: Sequence[float], joined: bool, write: Callable[[float, int], str], log: bool) -> None:
    names, texts = cuts
    _scale(axes, size, limits, write, log=log)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    # On a phone the name stands above its interval, beside the number.
    lift = 0.0 if size.wide else -0.24
    for place, row in enumerate(rows):
        at = place if size.wide else place + 0.22
        beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        if not row.points:
            line = 100 if size.wide else 46
            wrapped = broken(short(row.label, line if size.wide else 2 * line - 4), line)
            axes.annotate("\n".join(wrapped[:2]), xy=(0, place + 0.1), ha="left", fontweight="bold",
                          color=COLOUR["ink"], xytext=(-axes.figure.bbox.width * axes.get_position().x0 + 4, 0)
                          if size.wide else (-8, 0), **beside)
            continue
        for line in lines:
            # Beside the intervals only, not through headings and numbers.
            axes.plot([line, line], [place - 0.5, place + 0.5] if size.wide else [place + 0.02, place + 0.44],
                      color=COLOUR["ink"], linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        room = names if size.wide else max(8.0, (size.width - 40) / size.letter - breadth(short(row.text, texts)))
        axes.annotate(short_name(row.label, room), xy=(0, place + lift), xytext=(-12 if size.wide else -8, 0),
                      ha="right" if size.wide else "left", color=COLOUR["ink"], **beside)
        axes.annotate(short(row.text, texts), xy=(1, place + lift), xytext=(14 if size.wide else 8, 0),
                      ha="left" if size.wide else "right", **beside)
        spread = 0.0 if len(row.points) < 2 else 0.34 if size.wide else 0.2
        drawn = []
        for number, (figure, style, filled) in enumerate(row.points):
            y = at + spread * (number / max(1, len(row.points) - 1) - 0.5)
            if (bounds := _bounds(figure)) is None:
                continue
            _, low, high = bounds
            # The interval and its two ends in one line, which the gaps break.
            axes.plot([low, high, math.nan, low, low, math.nan, high, high],
                      [y, y, math.nan, y - 0.1, y + 0.1, math.nan, y - 0.1, y + 0.1],
                      color=COLOUR[STYLES[style % len(STYLES)][0]], linewidth=1.6, solid_capstyle="butt", zorder=3)
            if figure.value is not None:
                _mark(axes, figure.value, y, style, filled)
                drawn.append((figure.value, y))
        if joined and len(drawn) == 2:
            axes.plot(*zip(*drawn, strict=True), color=COLOUR["muted"], linewidth=1.1, linestyle=(0, (2, 2)), zorder=2)


def _apart(wanted: Sequence[float], least: float) -> list[float]:
    """Heights near the wanted ones, at least `least` apart, in the same order."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [wanted[index] for index in order]
    for _ in range(60):
        moved = False
        for above in range(1, len(placed)):
            lack = least - (placed[above] - placed[above - 1])
            if lack > 1e-9:
                placed[above - 1] -= lack / 2
                placed[above] += lack / 2
                moved = True
        if not moved:
            break
    result = [0.0] * len(wanted)
    for index, height in zip(order, placed, strict=True):
        result[index] = height
    return result


def plane(key: str, title: str, description: str, points: Sequence[tuple[str, Shown, Shown, int]]) -> tuple[str, str]:
    """(model, upward, rightward, style): one mark a model with an interval each way."""
    rightward, upward = [point[2] for point in points], [point[1] for point in points]

    def one(name: str, size: Size) -> str:
        height = 400 if size.wide else 300

        def paint(axes: Axes) -> None:
            percent = in_percent([*rightward, *upward])
            write = _write_value(percent)
            _scale(axes, size, _limits(rightward, percent), write)
            _scale(axes, size, _limits(upward, percent), write, horizontal=False)
            axes.grid(axis="both", linewidth=1.0)
            known = [(point, _bounds(point[2]), _bounds(point[1])) for point in points]
            known = [(point, x, y) for point, x, y in known if x and y]
            room = (axes.get_ylim()[1] - axes.get_ylim()[0]) * (size.font + 3) / (height - 50)
            heights = _apart([y[0] for _, _, y in known], room)
            for (point, x, y), label in zip(known, heights, strict=True):
                colour = COLOUR[STYLES[point[3] % len(STYLES)][0]]
                axes.plot(x[1:], [y[0]] * 2, color=colour, linewidth=1.3)
                axes.plot([x[0]] * 2, y[1:], color=colour, linewidth=1.3)
                _mark(axes, x[0], y[0], point[3])
                left = (x[0] - axes.get_xlim()[0]) / (axes.get_xlim()[1] - axes.get_xlim()[0]) > 0.6
                axes.annotate(short_name(point[0], 28 if size.wide else 18), xy=(x[0], label),
                              textcoords="offset points", xytext=(-9 if left else 9, 8),
                              ha="right" if left else "left", va="center", color=COLOUR["ink"], zorder=5)

        return draw(name, size.width, height, (46, 18, 12, 30), size.font, paint)

    return both_sizes(key, title, description, repr(points), one)


def slopes(key: str, title: str, description: str, groups: Sequence[tuple[Group, int]], ends: tuple[str, str],
           marks: tuple[str, str]) -> tuple[str, str]:
    """One line a group from its member `ends[0]` to `ends[1]`, under the `marks`."""

    def one(name: str, size: Size) -> str:
        height = max(300, 80 + 22 * len(groups))
        # Names stand at the right end only: the shape says which line begins where.
        longest = max(breadth(short_name(group.model, 32 if size.wide else 16)) for group, _ in groups)
        right = int(longest * size.letter) + 26

        def paint(axes: Axes) -> None:
            figures = [group[end] for group, _ in groups for end in ends]
            percent = in_percent(figures)
            write = _write_value(percent)
            _scale(axes, size, _limits(figures, percent), write, horizontal=False)
            axes.set_xlim(-0.12, 1.06)
            axes.set_xticks([0, 1], marks)
            axes.tick_params(axis="x", labelcolor=COLOUR["ink"])
            shown = [(group, style) for group, style in groups if all(group[end].value is not None for end in ends)]
            room = (axes.get_ylim()[1] - axes.get_ylim()[0]) * (size.font + 3) / (height - 50)
            heights = _apart([group[ends[1]].value for group, _ in shown], room)
            for number, ((group, style), label) in enumerate(zip(shown, heights, strict=True)):
                colour, _, dash, _ = STYLES[style % len(STYLES)]
                values = [group[end].value for end in ends]
                # Side by side, so that intervals of two models do not hide one another.
                shift = (number - (len(shown) - 1) / 2) * 0.012
                places = [shift, 1 + shift]
                axes.plot(places, values, color=COLOUR[colour], linewidth=1.7, linestyle=dash, zorder=3)
                for place, end in zip(places, ends, strict=True):
                    bounds = _bounds(group[end])
                    axes.plot([place] * 2, bounds[1:], color=COLOUR[colour], linewidth=1.0, alpha=0.7, zorder=2)
                    _mark(axes, place, bounds[0], style)
                axes.annotate(short_name(group.model, 32 if size.wide else 16), xy=(1.06, label), xytext=(10, 0),
                              textcoords="offset points", va="center", ha="left", color=COLOUR["ink"],
                              annotation_clip=False)

        return draw(name, size.width, height, (46, right, 12, 30), size.font, paint)

    return both_sizes(key, title, description, repr((groups, ends, marks)), one)


def curves(key: str, title: str, description: str, groups: Sequence[tuple[Group, int]]) -> tuple[str, str]:
    """Each group over its dose, with intervals."""

    def one(name: str, size: Size) -> str:
        def paint(axes: Axes) -> None:
            from matplotlib.ticker import FuncFormatter, MaxNLocator

            figures = [figure for group, _ in groups for _, figure in group.members]
            percent = in_percent(figures)
            _scale(axes, size, _limits(figures, percent), _write_value(percent), horizontal=False)
            places = {at_dose(label, figure): label for group, _ in groups for label, figure in group.members}
            width = (max(places) - min(places)) or 1.0
            for number, (group, style) in enumerate(groups):
                colour, _, dash, _ = STYLES[style % len(STYLES)]
                shift = (number - (len(groups) - 1) / 2) * width * 0.008
                known = [(at_dose(label, figure) + shift, bounds) for label, figure in group.members
                         if (bounds := _bounds(figure)) and figure.value is not None]
                axes.plot([x for x, _ in known], [bounds[0] for _, bounds in known], color=COLOUR[colour],
                          linewidth=1.7, linestyle=dash, zorder=3)
                for x, bounds in known:
                    axes.plot([x, x], bounds[1:], color=COLOUR[colour], linewidth=1.0, zorder=2)
                    _mark(axes, x, bounds[0], style)
            in_line = sorted(places) == list(range(len(places)))
            if in_line and any(dose_of(label) != dose for dose, label in places.items()):
                # Nobody told the doses, so that checkpoints stand one after the other, by name.
                room = (size.width - 64) / size.letter / len(places)
                axes.set_xticks(list(places), [short_name(label, max(room, 4.0)) for label in places.values()])
                return
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7 if size.wide else 4, steps=[1, 2, 2.5, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

        return draw(name, size.width, 320 if size.wide else 260, (46, 18, 12, 30), size.font, paint)

    return both_sizes(key, title, description, repr(groups), one)
