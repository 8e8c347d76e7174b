# SPDX-License-Identifier: MIT
"""The picture of `--growth`: time and memory over each thing that grows. Needs matplotlib, but no display."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from training.benchmark.growth import Point
from training.run_figure import DPI, PANEL_SIZE, STYLE

TITLES = {
    "batch": "images in a pass",
    "resolution": "side of the images, pixels",
    "classes": "classes",
    "processes": "processes",
}
MEASURES: dict[str, Callable[[Point], float]] = {
    "ms per image": lambda point: 1000 * (point.seconds or 0) / point.images,
    "peak memory of a process, GiB": lambda point: (point.peak_bytes or 0) / 2**30,
}
MIN_RATIO = 4  # of the ends of a vertical axis: what hardly grows should look so


def draw_growth(points: Sequence[Point]) -> Figure:
    """A column per axis, a row per measure, all scales logarithmic. Points that ran out of memory are left out."""
    axes_names = list(dict.fromkeys(point.axis for point in points))
    with matplotlib.rc_context(STYLE):
        size = PANEL_SIZE[0] * len(axes_names), PANEL_SIZE[1] * len(MEASURES)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        panels = figure.subplots(len(MEASURES), len(axes_names), squeeze=False)
        for column, axis in enumerate(axes_names):
            shown = [p for p in points if p.axis == axis and p.seconds is not None]
            values = [p.value for p in shown]
            for row, (title, measure) in enumerate(MEASURES.items()):
                panel = panels[row, column]
                panel.plot(values, [measure(p) for p in shown], marker="o", markersize=3)
                panel.set_xscale("log", base=10 if axis == "classes" else 2)
                show_logarithmic_y(panel)
                panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
                panel.xaxis.set_minor_formatter(NullFormatter())
                panel.set_title(title if column == 0 else "")
                if row == len(MEASURES) - 1:
                    panel.set_xlabel(TITLES[axis])
    return figure


def show_logarithmic_y(panel: Axes) -> None:
    """Numbers as they are read, at 1, 2 and 5 times powers of ten, and at least `MIN_RATIO` in view."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    missing = max(MIN_RATIO * low / high, 1.0) ** 0.5
    panel.set_ylim(low / missing, high * missing)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
