"""From a matplotlib figure to inline SVG that takes its colours and its font from the page.

The figure is drawn in placeholder colours, each of which stands for one custom property of the style sheet (`--ink`,
`--accent`, ...), so one drawing serves the light, the dark and the printed page. Text stays text. Names inside are made
unique per figure, numbers are rounded to a hundredth of a pixel, and nothing depends on the time or on the machine.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEPTH_LEVELS = 7
HEAT_LEVELS = 8
_NAMES = ["ink", "muted", "grid", "accent", "accent-soft", "second", "alarm", "paper"]
_NAMES += [f"depth-{level}" for level in range(DEPTH_LEVELS)] + [f"heat-{level}" for level in range(HEAT_LEVELS)]
COLOUR = {name: f"#0102{index + 16:02x}" for index, name in enumerate(_NAMES)}
"""Property name -> placeholder colour to draw with."""
_PROPERTY = {placeholder: f"var(--{name})" for name, placeholder in COLOUR.items()}
_NUMBER = re.compile(r"-?\d+\.\d+(e-?\d+)?")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def draw(key: str, width: int, height: int, margins: tuple[int, int, int, int], font_size: float,
         paint: Callable[[Axes], None]) -> str:
    """An <svg> element of `width` × `height` CSS pixels with one pair of axes that `paint` fills.

    `margins` are left, right, top and bottom in pixels; `key` makes the names inside unique on the page.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    left, right, top, bottom = margins
    with matplotlib.rc_context():
        # A reader's own matplotlibrc must not change the page.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "svg.fonttype": "none", "svg.hashsalt": key, "font.size": font_size, "axes.linewidth": 1.0,
            "text.color": COLOUR["muted"], "axes.edgecolor": COLOUR["grid"], "axes.labelcolor": COLOUR["muted"],
            "xtick.color": COLOUR["grid"], "ytick.color": COLOUR["grid"], "xtick.labelcolor": COLOUR["muted"],
            "ytick.labelcolor": COLOUR["muted"], "grid.color": COLOUR["grid"], "text.parse_math": False,
        })
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((left / width, bottom / height,
                                (width - left - right) / width, (height - top - bottom) / height))
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), key, width, height)


def _inline(document: str, key: str, width: int, height: int) -> str:
    root = ElementTree.fromstring(document)
    references: dict[str, str] = {}
    for element in root.iter():
        for name, value in element.attrib.items():
            targets = [value[1:]] if name.endswith("href") else _REFERENCE.findall(value)
            for target in targets:
                references.setdefault(target, f"{key}-{len(references)}")
    parts: list[str] = []
    for child in root:
        _write(child, references, parts)
    # Hidden from assistive technology: the figure around it carries the description in words.
    return (f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
            f'{"".join(parts)}</svg>')


def _write(element: ElementTree.Element, references: dict[str, str], parts: list[str]) -> None:
    tag = element.tag.rpartition("}")[2]
    if tag in ("style", "metadata"):
        return
    attributes = _attributes(element, references)
    if tag == "path" and not element.get("id") and attributes.get("style") in ("fill:none", None):
        # Background rectangles and empty frames: nothing to be seen.
        return
    inside: list[str] = []
    for child in element:
        _write(child, references, inside)
    text = escape(element.text.strip()) if element.text else ""
    if tag in ("g", "defs") and not inside:
        return
    if tag == "g" and not attributes:
        parts.extend(inside)
        return
    opening = tag + "".join(f" {name}={quoteattr(value)}" for name, value in attributes.items())
    parts.append(f"<{opening}>{text}{''.join(inside)}</{tag}>" if inside or text else f"<{opening}/>")


def _attributes(element: ElementTree.Element, references: dict[str, str]) -> dict[str, str]:
    kept: dict[str, str] = {}
    for name, value in element.attrib.items():
        name = name.rpartition("}")[2]
        if name == "id":
            if value in references:
                kept["id"] = references[value]
        elif name == "href":
            kept["href"] = f"#{references[value[1:]]}"
        elif name == "style":
            kept["style"] = _style(value)
        elif name == "transform" and value.startswith("rotate(-0 "):
            continue
        elif name == "d":
            outline = " ".join(value.split()).replace(" L ", "L").replace(" M ", "M").replace("M ", "M")
            kept["d"] = _NUMBER.sub(_rounded, outline)
        elif value.startswith("url(#"):
            kept[name] = _REFERENCE.sub(lambda match: f"url(#{references[match.group(1)]})", value)
        else:
            kept[name] = _NUMBER.sub(_rounded, value)
    return kept


def _style(value: str) -> str:
    declarations = []
    for declaration in value.split(";"):
        name, _, content = (part.strip() for part in declaration.partition(":"))
        if name and name != "font-family":
            declarations.append(f"{name}:{_PROPERTY.get(content, content)}")
    return ";".join(declarations)


def _rounded(match: re.Match[str]) -> str:
    text = f"{float(match.group()):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
