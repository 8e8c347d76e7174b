# SPDX-License-Identifier: MIT
"""The figure of the synthetic experiment as SVG text: samples over time, and the directions' cosine over time.

SVG is plain text, so that the figure needs no plotting library; browsers, editors and code hosts show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import torch

from san.toy_ring import NEAR_STDS, Ring
from san.toy_training import Record

COLORS = {"GAN": "#c4451c", "SAN": "#1c6fb5"}
NUM_PANELS = 6  # times at which samples are shown
MAX_POINTS = 400  # per panel
PANEL, GAP, LEFT, TOP, CHART = 110, 8, 130, 46, 300  # sizes in pixels
VIEW = 1.4  # half the side of a panel, in radii of the ring

Runs = Mapping[str, Sequence[Record]]  # kind -> measurements over time


def draw_figure(results: Mapping[str, Runs], ring: Ring, seed: int) -> str:
    """SVG text: for each objective a row of panels per kind, with the samples of the first seed, and two charts.

    The charts show the mean over seeds of the cosine between direction and optimal direction, and of the modes
    covered, with a band from the lowest to the highest seed. seed: name of the first one, for the caption.
    """
    parts, y = [], TOP
    for name, runs in results.items():
        top = y
        for kind, records in runs.items():
            parts.append(_text(LEFT - 10, y + PANEL / 2, f"{name} {kind}", "end"))
            for column, record in enumerate(pick_times(records)):
                x = LEFT + column * (PANEL + GAP)
                parts.append(_panel(x, y, record, ring, COLORS[kind]))
                parts.append(_text(x + 4, y + 11, str(record.iteration), "start", 9))
            y += PANEL + GAP
        x = LEFT + NUM_PANELS * (PANEL + GAP) + 40
        height = y - top - GAP - 18
        parts.append(_chart(x, top, height, runs, "cosine", (-0.25, 1.0), (0.0, 0.5, 1.0)))
        modes = tuple(float(i) for i in range(0, ring.num_modes + 1, max(ring.num_modes // 4, 1)))
        parts.append(_chart(x + CHART + 40, top, height, runs, "modes", (0.0, ring.num_modes * 1.02), modes))
    width = LEFT + NUM_PANELS * (PANEL + GAP) + 2 * (CHART + 40) + 20
    x = LEFT + NUM_PANELS * (PANEL + GAP) + 40
    titles = [
        _text(LEFT, 20, f"Samples of seed {seed}; number of generator steps in the corner", "start", 13),
        _text(x, 20, "Cosine of direction and optimal direction", "start", 13),
        _text(x + CHART + 40, 20, "Modes covered", "start", 13),
    ]
    for i, (kind, color) in enumerate(COLORS.items()):
        titles.append(
            _text(x + 70 * i, 36, kind + " (mean, lowest to highest seed)" * (i == 1), "start", 11, color)
        )
    size = f'width="{width}" height="{y + 8}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 8}" {size}>'
    style = "<style>text{font-family:sans-serif}path{stroke-linecap:round}</style>"
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, style, paper, *titles, *parts, "</svg>"]) + "\n"


def pick_times(records: Sequence[Record]) -> list[Record]:
    """At most NUM_PANELS records, evenly spaced, with the last one and without the untrained networks'.

    >>> pick_times(list(range(0, 1300, 100)))
    [200, 400, 600, 800, 1000, 1200]
    """
    trained = records[1:] or records
    count = min(NUM_PANELS, len(trained))
    return [trained[round((i + 1) * len(trained) / count) - 1] for i in range(count)]


def _panel(x: float, y: float, record: Record, ring: Ring, color: str) -> str:
    """Samples of the first seed over circles around the modes; what lies outside is left out."""
    to_px = PANEL / (2 * VIEW * ring.radius)
    points = record.samples[0, :MAX_POINTS]
    points = points[(points.abs() <= VIEW * ring.radius).all(1)] * to_px
    radius = max(NEAR_STDS * ring.std * to_px, 1.5)
    circles = "".join(
        f'<circle cx="{cx:.1f}" cy="{-cy:.1f}" r="{radius:.1f}" fill="#e4e4e4"/>'
        for cx, cy in (ring.centres() * to_px).tolist()
    )
    dots = "".join(f"M{px:.1f} {-py:.1f}h0" for px, py in points.tolist())
    frame = f'<rect x="{x:.1f}" y="{y:.1f}" width="{PANEL}" height="{PANEL}" fill="none" stroke="#bbb"/>'
    middle = f"{x + PANEL / 2:.1f} {y + PANEL / 2:.1f}"
    return (
        f'{frame}<g transform="translate({middle})">{circles}'
        f'<path d="{dots}" stroke="{color}" stroke-width="1.8" stroke-opacity="0.6" fill="none"/></g>'
    )


def _chart(
    x: float,
    y: float,
    height: float,
    runs: Runs,
    measure: str,
    limits: tuple[float, float],
    ticks: Sequence[float],
) -> str:
    """Curves of one measure over iterations, a band and a mean per kind."""
    low, high = limits
    last = max(max(record.iteration for record in records) for records in runs.values()) or 1

    def place(iteration: int, value: float) -> str:
        share = (min(max(value, low), high) - low) / (high - low)
        return f"{x + CHART * iteration / last:.1f} {y + height * (1 - share):.1f}"

    parts = []
    for tick in ticks:
        level = y + height * (1 - (tick - low) / (high - low))
        parts.append(f'<path d="M{x} {level:.1f}h{CHART}" stroke="#ddd"/>')
        parts.append(_text(x - 5, level + 3, f"{tick:g}", "end", 9))
    for kind, records in runs.items():
        times = [record.iteration for record in records]
        values = torch.stack([getattr(record, measure) for record in records])  # (times, seeds)
        upper = [place(*pair) for pair in zip(times, values.amax(1).tolist(), strict=True)]
        lower = [place(*pair) for pair in zip(times, values.amin(1).tolist(), strict=True)]
        mean = [place(*pair) for pair in zip(times, values.mean(1).tolist(), strict=True)]
        band = "L".join([*upper, *reversed(lower)])
        parts.append(f'<path d="M{band}Z" fill="{COLORS[kind]}" fill-opacity="0.15"/>')
        parts.append(f'<path d="M{"L".join(mean)}" fill="none" stroke="{COLORS[kind]}" stroke-width="1.6"/>')
    parts.append(_text(x, y + height + 12, "0", "start", 9))
    parts.append(_text(x + CHART, y + height + 12, f"{last} steps", "end", 9))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, size: int = 12, color: str = "black") -> str:
    look = f'font-size="{size}" text-anchor="{anchor}" fill="{color}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(text)}</text>'
