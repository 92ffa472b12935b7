"""The charts of a run report. Each function returns None where the run recorded nothing to draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moonbase.report.charts import (
    Chart,
    Frame,
    Key,
    line,
    pad_limits,
    quiet_axes,
    raw_and_smooth,
    reference_line,
    render,
)
from moonbase.report.run_folder import Metrics
from moonbase.report.series import bin_max, first_finite, last_finite, smooth
from moonbase.report.svg import COLOUR, DEPTH_LEVELS
from moonbase.report.words import compact, count, enumerate_briefly, fixed, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAT_EDGES = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0)
"""Upper ends of the colour steps of the load map; fixed, so that two runs can be compared by eye."""
HEAT_LABELS = ("1", *(f"{edge:g}" for edge in HEAT_EDGES))
_HEAT_CELLS = 4000
_MAX_MARKS = 100
_MAX_DOTS = 800
_FEW_LAYERS = 8
_STRETCHES = 100
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def loss_chart(
    metrics: Metrics, held_out_text: str = "held-out files", int4_from: float | None = None
) -> Chart | None:
    """Training loss, raw and smoothed, with the validation points and a tick for every skipped step. `held_out_text`:
    what the run is measured on. `int4_from`: the first step whose experts compute in INT4."""
    loss, held_out = metrics.scalars.get("loss"), metrics.scalars.get("validation_loss")
    if loss is None and held_out is None:
        return None
    steps = metrics.step
    known = np.isin(steps, [step for step, _ in metrics.skipped])
    cropped = _steep_start(loss) if loss is not None else 0
    turns = int4_from is not None and len(steps) > 0 and steps[0] < int4_from <= steps[-1]

    def paint(axes: Axes, frame: Frame) -> None:
        if loss is not None:
            raw_and_smooth(axes, steps, loss, known)
        if held_out is not None:
            _points(axes, steps, held_out, "second")
        shown = [values for values in (loss, held_out) if values is not None]
        pad_limits(axes, *(values[cropped:] for values in shown))
        if cropped:
            axes.annotate(f"↑ {fixed(loss[first_finite(loss)])} at step {count(steps[first_finite(loss)])}", xy=(0, 1),
                          xycoords="axes fraction", xytext=(26, 0), textcoords="offset points", ha="left", va="center",
                          color=COLOUR["accent"])
        if turns:
            axes.axvline(int4_from, color=COLOUR["ink"], linewidth=1.1, linestyle=(0, (4, 3)))
            on_the_left = int4_from > (steps[0] + steps[-1]) / 2
            axes.annotate("INT4", xy=(int4_from, 1), xycoords=("data", "axes fraction"),
                          xytext=(-4 if on_the_left else 4, -2), textcoords="offset points",
                          ha="right" if on_the_left else "left", va="top", color=COLOUR["ink"], zorder=5)
        if known.any():
            _rug(axes, steps[known], steps, "^")
        quiet_axes(axes, frame, steps)

    wide, small = render("loss", paint, heights=(320, 240), left=38)
    words, legend = [], []
    if loss is not None:
        first, last = first_finite(loss), last_finite(loss)
        smoothed = smooth(np.where(known, np.nan, loss))[last]
        smoothed = smoothed if np.isfinite(smoothed) else loss[last]
        words.append(f"Training loss went from {fixed(loss[first])} at step {count(steps[first])} to {fixed(smoothed)} "
                     f"(smoothed) at step {count(steps[last])}." if first != last else
                     f"Training loss was {fixed(loss[first])} at step {count(steps[first])}.")
        legend += [Key("line", "accent-soft", "training, every step"), Key("line", "accent", "training, smoothed")]
    if held_out is not None:
        last = last_finite(held_out)
        words.append(f"Held-out loss was {fixed(held_out[last])} at step {count(steps[last])}.")
        legend.append(Key("dot", "second", held_out_text))
    else:
        words.append("No validation was recorded.")
    if turns:
        words.append(f"From step {count(int4_from)} on the routed experts compute in INT4.")
    if known.any():
        words.append(f"{plural(int(known.sum()), 'step')} {'was' if known.sum() == 1 else 'were'} skipped.")
        legend.append(Key("mark", "alarm", "skipped step"))
    return Chart("loss", "Loss", "nats per token", " ".join(words), small, wide, tuple(legend))


def bits_chart(metrics: Metrics, xz: float | None, held_out_text: str = "held-out files") -> Chart | None:
    """Bits per byte on held-out text beside what xz -9 makes of the same bytes."""
    bits = metrics.scalars.get("validation_bits_per_byte")
    if bits is None:
        return None
    steps = metrics.step

    def paint(axes: Axes, frame: Frame) -> None:
        _points(axes, steps, bits, "second")
        pad_limits(axes, bits, xz if xz is not None else np.nan, share=0.12)
        if xz is not None:
            reference_line(axes, xz, f"xz \u22129: {fixed(xz)}")
        last = last_finite(bits)
        axes.annotate(fixed(bits[last]), xy=(steps[last], bits[last]), xytext=(0, 8), textcoords="offset points",
                      ha="right", va="bottom", color=COLOUR["second"], fontweight="bold", zorder=5)
        quiet_axes(axes, frame, steps)

    wide, small = render("bits", paint, heights=(230, 220), left=38)
    first, last = first_finite(bits), last_finite(bits)
    words = f"{fixed(bits[last])} bits per byte at step {count(steps[last])}"
    if first != last:
        words += f", from {fixed(bits[first])} at step {count(steps[first])}"
        best = int(np.nanargmin(bits))
        if best != last:
            words += f"; the best was {fixed(bits[best])} at step {count(steps[best])}"
    words += "."
    if xz is not None:
        words += (f" xz \u22129 needs {fixed(xz)} for the same bytes: the model is "
                  f"{abs(1 - bits[last] / xz):.0%} {'below' if bits[last] <= xz else 'above'} it.")
    return Chart("bits", "Bits per byte", f"on {held_out_text}; lower is better", words, small, wide)


def logit_chart(metrics: Metrics, tau: float | None, names: list[str]) -> Chart | None:
    """Largest attention logit of every layer, with τ and the heads that QK-Clip scaled back."""
    logits = metrics.per_layer.get("max_logit")
    if logits is None:
        return None
    steps, layers = metrics.step, logits.shape[1]
    clipped = metrics.per_layer.get("clipped_heads")
    hits = np.argwhere(clipped > 0) if clipped is not None else np.empty((0, 2), dtype=int)
    hits = hits[hits[:, 1] < layers]
    highest = float(np.nanmax(logits))
    # A threshold far above every value would press the curves flat; it is then named instead of drawn.
    tau_in_view = tau is not None and highest > 0.4 * tau
    few = layers <= _FEW_LAYERS
    starts, highs = bin_max(logits, _STRETCHES)

    def paint(axes: Axes, frame: Frame) -> None:
        for layer in range(layers):
            x, y = (steps, logits[:, layer]) if few else (steps[starts], highs[:, layer])
            line(axes, x, y, _depth(layer, layers), width=1.4 if few else 1.0)
        pad_limits(axes, logits, tau if tau_in_view else np.nan, floor=0.0)
        if tau_in_view:
            reference_line(axes, tau, f"τ = {compact(tau)}", "alarm")
        elif tau is not None:
            axes.annotate(f"τ = {compact(tau)}, above this frame ↑", xy=(1, 1), xycoords="axes fraction", ha="right",
                          va="top", color=COLOUR["alarm"], zorder=5)
        if len(hits):
            _rug(axes, steps[np.unique(hits[:, 0])], steps, "v")
        quiet_axes(axes, frame, steps)

    wide, small = render("logits", paint, heights=(280, 230), left=42)
    peak = np.unravel_index(int(np.nanargmax(logits)), logits.shape)
    words = [f"The largest attention logit was {compact(highest)}, in {names[peak[1]]} at step "
             f"{count(steps[peak[0]])}; values up to τ are upper bounds."]
    if not few and len(steps) > _STRETCHES:
        words.append("A point of a line is the highest value of its stretch of steps.")
    if len(hits):
        at, where = steps[hits[:, 0]], [names[layer] for layer in np.unique(hits[:, 1])]
        total = int(np.nansum(clipped[hits[:, 0], hits[:, 1]]))
        words.append(f"QK-Clip scaled heads back {plural(total, 'time')} in {plural(len(np.unique(at)), 'step')} "
                     f"(first at step {count(at.min())}, last at step {count(at.max())}): {enumerate_briefly(where)}.")
    elif clipped is not None:
        words.append("QK-Clip never had to act." if tau is not None else "QK-Clip was off.")
    legend, scale = _depth_legend(names)
    if len(hits):
        legend += (Key("mark", "alarm", "head scaled back"),)
    return Chart("logits", "Largest attention logit", "per layer", " ".join(words), small, wide, legend, scale)


def load_chart(metrics: Metrics, names: list[str]) -> Chart | None:
    """Load of the busiest expert over the mean load, layers × steps."""
    load = metrics.per_layer.get("expert_load")
    if load is None:
        return None
    steps, layers = metrics.step, load.shape[1]

    def paint(axes: Axes, frame: Frame) -> None:
        columns = int(np.clip(_HEAT_CELLS // layers, 40, 120 if frame.wide else 60))
        starts, cells = bin_max(load, columns)
        edges = np.append(steps[starts], steps[-1] + 1).astype(float)
        if starts[0] == 0:
            edges[0] = min(edges[0], 0.0) if edges[0] <= 1 else edges[0]
        quiet_axes(axes, frame, steps)
        _paint_cells(axes, edges, np.digitize(cells, HEAT_EDGES), np.isfinite(cells))
        axes.set_xlim(edges[0], edges[-1])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        _layer_axis(axes, names)

    rows = np.clip(layers * 34, 80, 360) + 40
    wide, small = render("load", paint, heights=(int(rows), int(min(rows, 300))), left=_label_width(names))
    last = load[_last_row(load)]
    low = f"{fixed(np.nanmin(last))} to " if np.isfinite(last).sum() > 1 else ""
    words = [f"At the end the busiest expert of a layer carried {low}{fixed(np.nanmax(last))} times the mean load."]
    peak = np.unravel_index(int(np.nanargmax(load)), load.shape)
    words.append(f"The worst moment was {fixed(load[peak])} times, in {names[peak[1]]} at step "
                 f"{count(steps[peak[0]])}. 1 is perfect balance; a cell is the highest value of its stretch of steps.")
    scale = tuple((f"heat-{level}", label) for level, label in enumerate(HEAT_LABELS))
    return Chart("load", "Expert load", "busiest expert ÷ mean, per layer over the run", " ".join(words), small, wide,
                 scale=scale)


def share_chart(metrics: Metrics, names: list[str]) -> Chart | None:
    """Share of every expert at the end of the run, one row a layer."""
    if metrics.expert_share is None:
        return None
    step, shares = metrics.expert_share
    shares = [share[np.isfinite(share)] for share in shares]
    layers = len(shares)
    dots = sum(len(share) for share in shares) <= _MAX_DOTS
    everything = np.concatenate(shares)

    def paint(axes: Axes, frame: Frame) -> None:
        for layer, share in enumerate(shares):
            if len(share) == 0:
                continue
            axes.plot([share.min(), share.max()], [layer, layer], color=COLOUR["accent-soft"], linewidth=1.2)
            if dots:
                axes.plot(np.sort(share), np.full(len(share), layer), linestyle="none", marker="o", markersize=6,
                          color=COLOUR["accent"], markeredgecolor=COLOUR["paper"], markeredgewidth=0.8, alpha=0.75,
                          clip_on=False)
            else:
                low, high = np.quantile(share, [0.1, 0.9])
                axes.plot([low, high], [layer, layer], color=COLOUR["accent"], linewidth=3.2, solid_capstyle="butt")
        quiet_axes(axes, frame, np.array([0, 1]))
        axes.axvline(1.0, color=COLOUR["ink"], linewidth=1.1, linestyle=(0, (4, 3)))
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(nbins=frame.num_ticks, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlim(0, max(1.05, float(everything.max())) * 1.04)
        axes.grid(False)
        _layer_axis(axes, names[:layers])

    rows = int(np.clip(layers * (30 if dots else 11), 60, 640) + 44)
    wide, small = render("share", paint, heights=(rows, rows), left=_label_width(names))
    words = (f"At step {count(step)} the shares ran from {fixed(everything.min())} to {fixed(everything.max())}, "
             "where 1 is an even share.")
    unused = int((everything == 0).sum())
    if unused:
        words += f" {plural(unused, 'expert')} received nothing."
    legend = (Key("dot", "accent", "one expert"),) if dots else (Key("line", "accent", "middle 80% of experts"),
                                                                Key("line", "accent-soft", "all experts"))
    return Chart("share", "Final share of each expert", "1 = even", words, small, wide, legend)


_SMALL = (("lr", "Learning rate", ""), ("grad_norm", "Gradient norm", "before clipping"),
          ("update_rms", "Update RMS", "of the optimizer's step"),
          ("tokens_per_second", "Throughput", "tokens per second"),
          ("balance_loss", "Balance loss", "sequence-wise"),
          ("mtp_loss", "Multi-token prediction loss", "nats per token"),
          ("memory_bytes", "Memory", "GB"), ("mfu", "Model FLOPs utilisation", "%"))
_FACTOR = {"memory_bytes": 1e-9, "mfu": 100.0}


def small_charts(metrics: Metrics) -> list[Chart]:
    """One chart each for the quantities that need a glance only."""
    return [_small_chart(name, title, unit, metrics.step, metrics.scalars[name] * _FACTOR.get(name, 1.0))
            for name, title, unit in _SMALL if name in metrics.scalars]


def _small_chart(name: str, title: str, unit: str, steps: np.ndarray, values: np.ndarray) -> Chart:
    finite = values[np.isfinite(values)]
    # Norms that explode or vanish are read by their order of magnitude.
    log = name in ("grad_norm", "balance_loss") and finite.min() > 0 and finite.max() > 50 * finite.min()
    exact = name in ("lr", "memory_bytes")
    exponent = int(np.floor(np.log10(np.abs(finite).max()))) if finite.any() and not log else 0
    # Tick labels like 0.00015 are hard to read; the power of ten goes into the unit.
    exponent = exponent if exponent < -2 else 0
    drawn = values * 10.0**-exponent

    def paint(axes: Axes, frame: Frame) -> None:
        line(axes, steps, drawn, "accent", width=1.8) if exact else raw_and_smooth(axes, steps, drawn)
        if log:
            axes.set_ylim(finite.min() / 1.3, finite.max() * 1.3)
        else:
            pad_limits(axes, drawn, floor=0.0)
        quiet_axes(axes, frame, steps, log=log)

    _, small = render(f"small-{name.replace('_', '-')}", paint, heights=(0, 200), left=44, wide=False)
    middle, low, high = (compact(float(value)) for value in (np.median(finite), finite.min(), finite.max()))
    words = (f"Highest {high}, at the end {compact(finite[-1])}." if name == "lr" else
             f"Median {middle}, lowest {low}, highest {high}.")
    remarks = [unit] if unit else []
    remarks += ["× 10" + str(exponent).translate(_SUPERSCRIPT)] if exponent else []
    remarks += ["logarithmic"] if log else []
    return Chart(name.replace("_", "-"), title, ", ".join(remarks), words, small)


def _points(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Sparse measurements: dots joined by a line; a long series is a line only."""
    known = np.isfinite(values)
    line(axes, steps[known], values[known], colour, width=1.2)
    if known.sum() <= 60:
        axes.plot(steps[known], values[known], linestyle="none", marker="o", markersize=5.5, color=COLOUR[colour],
                  markeredgecolor=COLOUR["paper"], markeredgewidth=1.0, clip_on=False, zorder=4)


def _rug(axes: Axes, marked: np.ndarray, steps: np.ndarray, marker: str) -> None:
    """Small triangles on the lower (^) or upper (v) edge; marks that would overlap are drawn once."""
    apart = (steps[-1] - steps[0]) / _MAX_MARKS
    shown: list[int] = []
    for step in marked:
        if not shown or step - shown[-1] >= apart:
            shown.append(int(step))
    axes.plot(shown, np.full(len(shown), 0.012 if marker == "^" else 0.988), transform=axes.get_xaxis_transform(),
              linestyle="none", marker=marker, markersize=6, color=COLOUR["alarm"], markeredgewidth=0, clip_on=False)


def _steep_start(loss: np.ndarray) -> int:
    """How many first steps to leave above the frame so that the rest of the curve has room; 0 where all fits well."""
    first = len(loss) // 33
    if first < 3 or not np.isfinite(loss[first:]).any():
        return 0
    everything, rest = np.ptp(loss[np.isfinite(loss)]), np.ptp(loss[first:][np.isfinite(loss[first:])])
    return first if everything > 1.3 * rest else 0


def _paint_cells(axes: Axes, edges: np.ndarray, levels: np.ndarray, known: np.ndarray) -> None:
    """One filled path per colour step, equal neighbours in a row joined: far smaller than a cell each.

    `levels` and `known` are [columns, layers].
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    rectangles: dict[int, list[Path]] = {}
    for layer in range(levels.shape[1]):
        start = 0
        for column in range(1, len(levels) + 1):
            here = (levels[start, layer], known[start, layer])
            if column < len(levels) and (levels[column, layer], known[column, layer]) == here:
                continue
            if here[1]:
                left, right, top, bottom = edges[start], edges[column], layer - 0.46, layer + 0.46
                corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
                rectangles.setdefault(int(here[0]), []).append(Path(corners, closed=True))
            start = column
    for level, paths in sorted(rectangles.items()):
        axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=COLOUR[f"heat-{level}"], edgecolor="none"))


def _layer_axis(axes: Axes, names: list[str]) -> None:
    """First layer on top; every layer named where there is room."""
    every = max(1, -(-len(names) // 12))
    positions = list(range(0, len(names), every))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(positions, [names[position] for position in positions])


def _label_width(names: list[str]) -> int:
    return 14 + max(len(name) for name in names) * 7


def _last_row(matrix: np.ndarray) -> int:
    return int(np.flatnonzero(np.isfinite(matrix).any(axis=1))[-1])


def _depth(layer: int, layers: int) -> str:
    level = round(layer * (DEPTH_LEVELS - 1) / max(1, layers - 1)) if layers > 1 else DEPTH_LEVELS // 2
    return f"depth-{level}"


def _depth_legend(names: list[str]) -> tuple[tuple[Key, ...], tuple[tuple[str, str], ...]]:
    if len(names) <= _FEW_LAYERS:
        return tuple(Key("line", _depth(layer, len(names)), name) for layer, name in enumerate(names)), ()
    labels = [""] * DEPTH_LEVELS
    labels[0], labels[-1] = names[0], names[-1]
    return (), tuple((f"depth-{level}", label) for level, label in enumerate(labels))
