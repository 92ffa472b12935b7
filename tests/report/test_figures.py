from __future__ import annotations

import re

import matplotlib
import numpy as np
import pytest

from moonbase.report import figures
from moonbase.report.charts import COMPACT_WIDTH, WIDE_WIDTH
from moonbase.report.run_folder import Metrics


def metrics(n: int = 50, **columns) -> Metrics:
    scalars = {name: np.asarray(value, dtype=float) for name, value in columns.items() if np.ndim(value) == 1}
    layers = {name: np.asarray(value, dtype=np.float32) for name, value in columns.items() if np.ndim(value) == 2}
    return Metrics(np.arange(1, n + 1), scalars, layers, (), None, ())


def path_points(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """Points of every stroked path of one colour."""
    found = re.findall(rf'<path d="([^"]+)"[^>]*stroke:var\(--{colour}\)', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)] for path in found]


def test_the_step_that_turns_to_int4_is_marked_where_it_is_in_view() -> None:
    data = metrics(loss=np.linspace(5, 2, 50))
    plain, marked = figures.loss_chart(data), figures.loss_chart(data, int4_from=data.step[20])
    assert "INT4" not in plain.gist + plain.wide and "From step" in marked.gist and ">INT4<" in marked.wide
    assert figures.loss_chart(data, int4_from=1e6) == plain


def test_a_curve_is_drawn_where_its_values_are():
    values = np.linspace(1.0, 0.0, 6)
    chart = next(chart for chart in figures.small_charts(metrics(6, lr=values)) if chart.key == "lr")
    (points,) = path_points(chart.compact, "accent")
    x, y = np.array(points).T
    assert len(points) == 6
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0], atol=0.02)
    # Higher values are higher on the page, in equal steps.
    np.testing.assert_allclose(np.diff(y), np.diff(y)[0], atol=0.02)
    assert np.diff(y)[0] > 0


def test_long_curves_are_thinned():
    chart = figures.loss_chart(metrics(100_000, loss=np.random.default_rng(0).normal(3, 1, 100_000)))
    for svg in (chart.wide, chart.compact):
        for colour in ("accent", "accent-soft"):
            assert sum(map(len, path_points(svg, colour))) <= 600


def test_both_sizes_are_drawn_for_their_width():
    chart = figures.loss_chart(metrics(loss=np.ones(50)))
    assert f'viewBox="0 0 {WIDE_WIDTH} ' in chart.wide and f'viewBox="0 0 {COMPACT_WIDTH} ' in chart.compact


def test_heat_map_covers_every_cell_once():
    load = np.random.default_rng(1).uniform(1, 9, size=(37, 5))
    chart = figures.load_chart(metrics(37, expert_load=load), [f"layer {i}" for i in range(5)])
    area, boxes, edges = 0.0, [], []
    for path in re.findall(r'<path d="([^"]+)"[^>]*fill:var\(--heat-\d\)', chart.wide):
        for box in path.split("M")[1:]:
            corners = np.array([[float(x), float(y)] for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", box)])
            width, height = np.ptp(corners, axis=0)
            boxes.append(height)
            edges.extend(corners[:, 0])
            area += width * height
    assert np.ptp(boxes) < 0.05
    assert max(edges) == pytest.approx(WIDE_WIDTH - 14, abs=0.1)
    assert area == pytest.approx(np.ptp(edges) * boxes[0] * 5, rel=0.01)


def test_tau_is_drawn_where_it_matters_and_named_otherwise():
    near = figures.logit_chart(metrics(max_logit=np.full((50, 2), 80.0)), 100.0, ["layer 0", "layer 1"])
    far = figures.logit_chart(metrics(max_logit=np.full((50, 2), 8.0)), 100.0, ["layer 0", "layer 1"])
    assert "τ = 100<" in near.wide and "stroke-dasharray" in near.wide
    assert "τ = 100, above this frame" in far.wide and "stroke-dasharray" not in far.wide


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 1e30])
def test_constant_and_extreme_values(value):
    everything = metrics(3, loss=[value] * 3, validation_bits_per_byte=[value] * 3, grad_norm=[value] * 3,
                         lr=[value] * 3, max_logit=[[value] * 2] * 3, expert_load=[[value] * 2] * 3)
    assert figures.loss_chart(everything) and figures.bits_chart(everything, 1.7)
    assert figures.logit_chart(everything, 100.0, ["a", "b"]) and figures.load_chart(everything, ["a", "b"])
    assert len(figures.small_charts(everything)) == 2


def test_nothing_recorded_gives_no_chart():
    empty = metrics(0)
    assert figures.loss_chart(empty) is None and figures.bits_chart(empty, 1.7) is None
    assert figures.logit_chart(empty, 100.0, []) is None and figures.load_chart(empty, []) is None
    assert figures.share_chart(empty, []) is None and figures.small_charts(empty) == []


def test_a_readers_own_settings_change_nothing():
    data = metrics(loss=np.linspace(5, 3, 50))
    before = figures.loss_chart(data)
    with matplotlib.rc_context({"font.size": 40, "lines.linewidth": 9, "axes.grid": True, "svg.fonttype": "path"}):
        settings = dict(matplotlib.rcParams)
        assert figures.loss_chart(data) == before
        assert dict(matplotlib.rcParams) == settings
