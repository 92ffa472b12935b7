"""Tables as a picture, drawn by matplotlib in the font that comes with it, so that every machine shows the same.

Pictures are in Latin letters in both languages (the Chinese prompt says what the words mean): twins then look at the
very same picture, and no Chinese font has to be there. matplotlib draws each sign once, and a table is composed of
them: drawing every cell anew takes it a third of a second.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np

WIDTH, HEIGHT = 10, 20
"""Pixels of one sign of DejaVu Sans Mono at 12 points and 100 dots an inch (advance 10.03)."""
MARGIN = 12


@functools.cache
def _signs() -> np.ndarray:
    """Grey values of the printable ASCII signs, uint8 [95, HEIGHT, WIDTH]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(95 * WIDTH / 100, HEIGHT / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    for place in range(95):
        # $ begins mathematics in matplotlib.
        sign = chr(32 + place)
        figure.text(place / 95, 0.28, "\\$" if sign == "$" else sign, family="DejaVu Sans Mono", size=12)
    canvas.draw()
    strip = np.asarray(canvas.buffer_rgba())[:, :, 0]
    return strip.reshape(HEIGHT, 95, WIDTH).transpose(1, 0, 2).copy()


def draw_tables(tables: list[dict[str, Any]]) -> bytes:
    """PNG of tables (name, columns, rows), one below the other. Printable ASCII only."""
    lines: list[str] = []
    for table in tables:
        rows = [[str(cell) for cell in row] for row in (table["columns"], *table["rows"])]
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines += [*([""] if lines else []), table["name"].upper(), "", text[0], "-" * len(text[0]), *text[1:]]
    width = max(map(len, lines))
    codes = np.array([[ord(sign) - 32 for sign in line.ljust(width)] for line in lines])
    page = _signs()[codes].transpose(0, 2, 1, 3).reshape(len(lines) * HEIGHT, width * WIDTH)
    grey = np.pad(page, MARGIN, constant_values=255)

    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, np.repeat(grey[:, :, None], 3, axis=2), format="png", metadata={"Software": None},
           pil_kwargs={"compress_level": 3})
    return file.getvalue()
