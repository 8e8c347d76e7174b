# SPDX-License-Identifier: MIT
"""Tables and the plot of san_evidence.py, from the runs that it has measured. Needs Pillow 10.1 for its font.

In a document they stand between the lines `<!-- digits: begin -->` and `<!-- digits: end -->`, and are replaced there.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

BEGIN, END = "<!-- digits: begin -->", "<!-- digits: end -->"
FORMATS = {"fd": ".0f", "accuracy": ".2f", "diversity": ".2f", "cosine": ".2f"}  # measures of a run
COLORS = {"gan": "#c4451c", "san": "#1c6fb5"}  # other last layers: OTHER_COLOR
OTHER_COLOR = "#6a6a6a"
SCALE = 2  # pixels of the file per unit below
LINE, LEFT, TOP, BOTTOM, SPACE = 18, 270, 50, 26, 34
PANELS = (  # measure, title, width, first and last value, ticks; what lies outside is drawn at the border
    ("fd", "fd_lite0, lower is better", 430, 300, 2100, (500, 1000, 1500, 2000)),
    ("accuracy", "class accuracy", 200, 0, 1, (0, 0.5, 1)),
    ("diversity", "diversity, 1 = real", 200, 0.3, 1.2, (0.5, 1)),
)


@dataclass(frozen=True)
class Result:
    """One run. fd: lower is better; accuracy, diversity (within classes, 1 = real) and cosine: higher."""

    objective: str
    variant: str
    seed: int
    fd: float
    accuracy: float
    diversity: float
    cosine: float
    seconds: float  # of training


Groups = dict[tuple[str, str], list[Result]]  # (objective, variant) -> its runs by seed


def read_results(path: Path) -> list[Result]:
    """Results of earlier calls."""
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def group(results: list[Result], objectives: tuple[str, ...], variants: tuple[str, ...]) -> Groups:
    """Runs by objective and variant, in the order given; without those that have none."""
    groups = {}
    for key in [(objective, variant) for objective in objectives for variant in variants]:
        runs = sorted((r for r in results if (r.objective, r.variant) == key), key=lambda r: r.seed)
        if runs:
            groups[key] = runs
    return groups


def spread(runs: list[Result], measure: str) -> str:
    """Mean ± sample standard deviation over seeds."""
    values = [getattr(run, measure) for run in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{FORMATS[measure]}} ± {deviation:{FORMATS[measure]}}"


def count_lower(groups: Groups, objective: str, variant: str) -> str:
    """In how many seeds the variant's fd is below that of the plain GAN of the same seed."""
    fds = {run.seed: run.fd for run in groups.get((objective, "gan"), [])}
    pairs = [(run.fd, fds[run.seed]) for run in groups[objective, variant] if run.seed in fds]
    return f"{sum(ours < theirs for ours, theirs in pairs)} of {len(pairs)}"


def format_comparison(groups: Groups) -> str:
    """Markdown: GAN beside SAN, a row per objective that has both."""
    columns = ["fd_lite0, GAN", "SAN", "SAN lower in", "accuracy, GAN", "SAN", "diversity, GAN", "SAN"]
    columns += ["cosine, GAN", "SAN"]
    lines = [f"| objective | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for objective in dict.fromkeys(name for name, _ in groups):
        sides = [groups.get((objective, kind)) for kind in ("gan", "san")]
        if None not in sides:
            cells = {name: [spread(side, name) for side in sides] for name in FORMATS}
            cells["fd"].append(count_lower(groups, objective, "san"))
            lines.append(f"| {objective} | {' | '.join(cell for both in cells.values() for cell in both)} |")
    return "\n".join(lines) + "\n"


def format_ablation(groups: Groups) -> str:
    """Markdown: every last layer of the objectives that have more than these two."""
    lines = [
        "| objective | last layer of D | fd_lite0 | lower than GAN in | accuracy | diversity | cosine |",
        "|" + "---|" * 7,
    ]
    for objective in dict.fromkeys(name for name, _ in groups):
        variants = [variant for name, variant in groups if name == objective]
        for variant in variants if set(variants) - {"gan", "san"} else []:
            cells = [spread(groups[objective, variant], name) for name in FORMATS]
            cells.insert(1, "" if variant == "gan" else count_lower(groups, objective, variant))
            lines.append(f"| {objective} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_tables(groups: Groups) -> str:
    """Both, and how many runs there are."""
    runs = [run for group in groups.values() for run in group]
    seeds = sorted({run.seed for run in runs})
    count = f"{len(runs)} runs, seeds {', '.join(str(seed) for seed in seeds)}."
    return f"{count} Mean ± standard deviation.\n\n{format_comparison(groups)}\n{format_ablation(groups)}"


def draw_plot(groups: Groups, path: Path) -> None:
    """A line per row of the tables: a dot per run, a bar at the mean, in a panel per measure."""
    keys = list(groups)
    gaps = [
        objective != keys[i - 1][0] for i, (objective, _) in enumerate(keys)
    ]  # space before a new objective
    height = TOP + LINE * len(keys) + 8 * sum(gaps) + BOTTOM
    width = LEFT + sum(panel[2] + SPACE for panel in PANELS)
    image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(11 * SCALE)

    def write(x: float, y: float, text: str, color: str = "black", anchor: str = "lm") -> None:
        canvas.text((x * SCALE, y * SCALE), text, color, font=font, anchor=anchor)

    def draw_line(x0: float, y0: float, x1: float, y1: float, color: str, thickness: float = 1) -> None:
        ends = (x0 * SCALE, y0 * SCALE, x1 * SCALE, y1 * SCALE)
        canvas.line(ends, color, width=round(thickness * SCALE))

    write(10, 16, "A dot per run, a bar at the mean:")
    for x, kind in ((190, "gan"), (225, "san")):
        write(x, 16, kind.upper(), COLORS[kind])
    write(10, 34, "other last layers", OTHER_COLOR)
    x = LEFT
    for measure, title, panel_width, low, high, ticks in PANELS:

        def place(value: float, x=x, panel_width=panel_width, low=low, high=high) -> float:
            return x + panel_width * (min(max(value, low), high) - low) / (high - low)

        write(x, 16, title)
        for tick in ticks:
            draw_line(place(tick), TOP - 8, place(tick), height - BOTTOM, "#dddddd")
            write(place(tick), height - BOTTOM + 10, f"{tick:g}", anchor="mm")
        y = TOP - LINE / 2
        for key, is_first in zip(keys, gaps, strict=True):
            y += LINE + 8 * is_first
            color = COLORS.get(key[1], OTHER_COLOR)
            values = [getattr(run, measure) for run in groups[key]]
            for value in values:
                canvas.circle((place(value) * SCALE, y * SCALE), 3.5 * SCALE, color)
            mean = place(statistics.mean(values))
            draw_line(mean, y - 7, mean, y + 7, color, thickness=2)
            if measure == PANELS[0][0]:
                if is_first:
                    write(10, y, key[0])
                write(125, y, key[1], color)
        x += panel_width + SPACE
    image.quantize(32).save(path, optimize=True)


def write_report(
    results: list[Result], objectives: tuple[str, ...], variants: tuple[str, ...], outdir: Path
) -> str:
    """evidence.md and evidence.png; returns the tables."""
    groups = group(results, objectives, variants)
    tables = format_tables(groups)
    (outdir / "evidence.md").write_text(tables, encoding="utf-8")
    draw_plot(groups, outdir / "evidence.png")
    return tables


def put_tables(document: Path, tables: str) -> None:
    """Exchange what stands between the two marks of a document. Raises ValueError unless they are there, once."""
    text = document.read_text(encoding="utf-8")
    block = f"{BEGIN}\n{tables}{END}"
    text, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{document} has {count} blocks from {BEGIN} to {END}, and needs one")
    document.write_text(text, encoding="utf-8")
