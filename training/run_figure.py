# SPDX-License-Identifier: MIT
"""One picture of the curves of several runs: a panel per question, a colour per run, panels without data left out.

Which panels there are: `run_panels.py`. Needs matplotlib, of which only the file formats are used: no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from training.run_curves import Curve, RunCurves
from training.run_panels import (
    LOG_RATIO,
    PANELS,
    Panel,
    best_point,
    curves_in,
    has_data,
    higher_is_better,
    layers_in,
    metric_panels,
)

NUM_COLUMNS = 4
PANEL_SIZE = (3.7, 2.5)  # inches, width and height
DPI = 110
MAX_POINTS = 800  # of a drawn line: what a panel's pixels can show
MAX_RUNS_WITH_LAYERS = 2  # beyond this, lines of single layers would hide the others
MAX_VALUES = 4  # runs whose best value of a metric is written in its panel
MIN_FOR_OUTLIERS = 40  # points of a panel from which its view may leave out the farthest ones
STYLES = ("-", "--", ":", "-.")  # of the statistics of a panel, where colours tell runs apart
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.solid_joinstyle": "round",
}
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}  # under text over curves
XAxis = Literal["kimg", "hours"]


def draw_figure(
    runs: Sequence[RunCurves], labels: Sequence[str], x: XAxis = "kimg", smooth_kimg: float = 0.0
) -> Figure:
    """The picture. Runs need at least one curve between them.

    smooth_kimg: half-life of an exponential moving average over the statistics, with what was measured lightly below
    it; 0 = none. Metrics are never smoothed.
    """
    panels = [panel for panel in [*metric_panels(runs), *PANELS] if has_data(panel, runs)]
    num_columns = min(NUM_COLUMNS, len(panels))
    num_rows = -(-len(panels) // num_columns)
    colors = pick_colors(len(runs))
    with matplotlib.rc_context(STYLE):
        width, height = num_columns * PANEL_SIZE[0], num_rows * PANEL_SIZE[1]
        figure = Figure(dpi=DPI, layout="constrained")
        has_layers = len(runs) <= MAX_RUNS_WITH_LAYERS and any(layers_in(p, r) for p in panels for r in runs)
        legend_height = _add_legend(figure, [*labels, *["single layers"] * has_layers], colors, width)
        figure.set_size_inches(width, height + legend_height)
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(num_rows, num_columns, index + 1)
            _draw_panel(axes, panel, runs, colors, x, smooth_kimg)
            axes.set_title(panel.title)
            axes.set_xlim(*_x_limits(runs, x))
            if index + num_columns >= len(panels):
                axes.set_xlabel("thousands of real images seen" if x == "kimg" else "hours of training")
    return figure


def pick_colors(count: int) -> list[tuple[float, ...]]:
    """As many colours that can be told apart, as far as that goes."""
    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["turbo"](value) for value in np.linspace(0.03, 0.97, count)]


def smooth(curve: Curve, halflife_kimg: float) -> np.ndarray:
    """Exponential moving average by images seen, without the pull towards 0 at the start. (n,).

    >>> smooth(Curve(np.array([1.0, 2.0]), np.zeros(2), np.array([0.0, 3.0])), halflife_kimg=1.0)
    array([0., 2.])
    """
    betas = 0.5 ** (np.diff(curve.kimg, prepend=curve.kimg[:1]) / halflife_kimg)
    total, weight, result = 0.0, 0.0, np.empty(len(curve))
    for i, (beta, value) in enumerate(zip(betas, curve.values, strict=True)):
        total, weight = total * beta + value, weight * beta + 1
        result[i] = total / weight
    return result


def thin_out(values: np.ndarray, max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lowest and highest of neighbours, so that at most `max_points` groups are left. (n,) -> three (m,).

    >>> thin_out(np.array([1.0, 3.0, 5.0]), max_points=2)
    (array([2., 5.]), array([1., 5.]), array([3., 5.]))
    """
    size = max(-(-len(values) // max_points), 1)
    starts = np.arange(0, len(values), size)
    counts = np.diff(starts, append=len(values))
    sums, low, high = (op.reduceat(values, starts) for op in (np.add, np.minimum, np.maximum))
    return sums / counts, low, high


def _draw_panel(
    axes: Axes,
    panel: Panel,
    runs: Sequence[RunCurves],
    colors: Sequence[tuple[float, ...]],
    x: XAxis,
    smooth_kimg: float,
) -> None:
    """Curves, marks, legend and limits. A single run has a colour per statistic instead."""
    if panel.target is not None:
        axes.axhline(panel.target, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    labels = list(dict.fromkeys(label for run in runs for label, _ in curves_in(panel, run)))
    shades = pick_colors(len(labels))
    handles, drawn = {}, []
    for run, color in zip(runs, colors, strict=True):
        for curve in layers_in(panel, run) if len(runs) <= MAX_RUNS_WITH_LAYERS else ():
            values = smooth(curve, smooth_kimg) if smooth_kimg else curve.values
            places = thin_out(getattr(curve, x))[0]
            axes.plot(places, thin_out(values)[0], color=color, linewidth=0.6, alpha=0.4, zorder=2)
        for label, curve in curves_in(panel, run):
            index = labels.index(label)
            look = {"color": color, "linestyle": STYLES[index % len(STYLES)]}
            if len(runs) == 1:
                look = {"color": shades[index], "linestyle": "-"}
            _draw_curve(axes, panel, curve, x, smooth_kimg, **look)
            drawn.append(curve.values)
            handles.setdefault(label, Line2D([], [], **(look if len(runs) == 1 else look | {"color": "0.2"})))
            if panel.is_metric:
                _mark_best(axes, curve, panel.names[0], x, color)
    if panel.is_metric and len(runs) <= MAX_VALUES:
        _list_best(axes, runs, colors, panel.names[0], x)
    _set_view(axes, panel, np.concatenate(drawn))
    if len(labels) > 1 or panel.names[0].endswith("*"):
        axes.legend(handles.values(), handles.keys(), fontsize=7, ncols=-(-len(labels) // 4), borderpad=0.1)


def _draw_curve(
    axes: Axes,
    panel: Panel,
    curve: Curve,
    x: XAxis,
    smooth_kimg: float,
    color: tuple[float, ...],
    linestyle: str,
) -> None:
    """A line, over the range of what it stands for where it was smoothed or thinned out."""
    places = thin_out(getattr(curve, x))[0]
    raw, low, high = thin_out(curve.values)
    values = high if panel.is_event else raw
    if smooth_kimg and not (panel.is_metric or panel.is_event):
        axes.plot(places, raw, color=color, linestyle=linestyle, linewidth=0.6, alpha=0.3, zorder=2)
        values = thin_out(smooth(curve, smooth_kimg))[0]
    if len(raw) < len(curve) and not panel.is_event:
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0, zorder=1)
    mark = {"marker": "o", "markersize": 2.5} if len(values) <= 30 else {}
    axes.plot(places, values, color=color, linestyle=linestyle, linewidth=1.3, zorder=3, **mark)


def _mark_best(axes: Axes, curve: Curve, metric: str, x: XAxis, color: tuple[float, ...]) -> None:
    best = best_point(curve, metric)
    place, value = getattr(curve, x)[best], curve.values[best]
    axes.plot([place], [value], marker="*", markersize=10, color=color, markeredgecolor="white", zorder=4)


def _list_best(
    axes: Axes, runs: Sequence[RunCurves], colors: Sequence[tuple[float, ...]], metric: str, x: XAxis
) -> None:
    """Best values in the runs' colours, in the corner that curves of this metric leave."""
    is_high = higher_is_better(metric)
    curves = [
        (run.metrics[metric], color)
        for run, color in zip(runs, colors, strict=True)
        if run.metrics.get(metric)
    ]
    for row, (curve, color) in enumerate(reversed(curves) if is_high else curves):
        best = best_point(curve, metric)
        y = 0.03 + 0.09 * row if is_high else 0.97 - 0.09 * row
        text = f"best {curve.values[best]:.4g} at {getattr(curve, x)[best]:.5g} {x}"
        axes.text(
            0.99,
            y,
            text,
            transform=axes.transAxes,
            ha="right",
            va="bottom" if is_high else "top",
            color=color,
        )


def _set_view(axes: Axes, panel: Panel, values: np.ndarray) -> None:
    """Vertical scale and limits. Where few values lie far outside, the view is that of the others, and says so."""
    if (
        panel.is_metric
        and not higher_is_better(panel.names[0])
        and 0 < LOG_RATIO * values.min() < values.max()
    ):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        return
    low, high = np.percentile(values, [1, 99])
    reach = 2 * (high - low) if len(values) >= MIN_FOR_OUTLIERS and high > low else np.inf
    inside = values[(values >= low - reach) & (values <= high + reach)]
    outside = len(values) - len(inside)
    if panel.starts_at_zero:
        axes.set_ylim(0, 1.05 * inside.max() or 1)
    elif outside and not panel.is_event:
        marks = [inside.min(), inside.max()] + [panel.target] * (panel.target is not None)
        axes.set_ylim(min(marks) - 0.05 * np.ptp(marks), max(marks) + 0.05 * np.ptp(marks))
    if outside and not panel.is_event:
        text = f"{outside} point{'s' * (outside > 1)} outside"
        axes.text(0.99, 0.98, text, transform=axes.transAxes, ha="right", va="top", color="0.4", bbox=PAPER)


def _x_limits(runs: Sequence[RunCurves], x: XAxis) -> tuple[float, float]:
    curves = [curve for run in runs for curve in (*run.stats.values(), *run.metrics.values()) if len(curve)]
    last = max(getattr(curve, x)[-1] for curve in curves) or 1.0
    return -0.02 * last, 1.02 * last


def _add_legend(
    figure: Figure, labels: Sequence[str], colors: Sequence[tuple[float, ...]], width: float
) -> float:
    """The runs, above all panels; returns the inches that this takes."""
    handles = [Line2D([], [], color=color, linewidth=2.5) for color in colors]
    handles += [Line2D([], [], color="0.5", linewidth=0.6)] * (len(labels) - len(colors))
    num_columns = max(min(int(width / (0.07 * max(map(len, labels)) + 0.6)), len(labels)), 1)
    figure.legend(handles, labels, loc="outside upper left", ncols=num_columns, fontsize=9)
    return 0.2 * -(-len(labels) // num_columns) + 0.1
