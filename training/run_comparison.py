# SPDX-License-Identifier: MIT
"""`python calc_metrics.py compare RUN...`: a table of the metrics of runs, and a picture of them over training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from torch_utils.errors import UserError
from training.plot import FORMATS, save_picture
from training.run_curves import METRIC_FILES, RunCurves, find_runs, read_run, short_labels
from training.run_panels import higher_is_better
from training.text_table import align_columns

DEFAULT_NAME = "metrics.png"


@dataclass(frozen=True)
class Standing:
    """One result of one run."""

    metric: str  # name of the result
    run: str  # short name of the run
    kimg: float | None  # thousands of images that the run has seen; None = not known
    best: float
    best_kimg: float | None  # where; None = not known
    last: float
    is_winner: bool  # the best one of all runs


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", metavar="FILE", help="Picture to write, .png, .pdf or .svg  [default: metrics.png in the run's "
              "folder, or in the working folder for several runs]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, everything else to stderr")
def compare(runs: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Table of the best and last values of every metric, and a picture of them over images seen.

    RUN is the folder of a run, ours or an official one, a folder that holds runs, or a pattern such as 'runs/*san*'.
    """
    try:
        standings, path, notes = compare_runs(runs, out)
    except UserError as error:
        raise click.ClickException(str(error)) from error
    for note in notes:
        click.echo(f"Note: {note}", err=True)
    if as_json:
        content = {"metrics": [dataclasses.asdict(s) for s in standings], "picture": path and str(path)}
        click.echo(json.dumps(content))
        return
    click.echo(format_standings(standings))
    if path is not None:
        click.echo(f"Wrote {path}")


def compare_runs(arguments: Sequence[str], out: str | None) -> tuple[list[Standing], Path | None, list[str]]:
    """The table's lines, the picture's path (None = nothing can be placed in it), what the files lack. UserError."""
    folders = find_runs(arguments, METRIC_FILES)
    path = Path(out) if out else (folders[0] if len(folders) == 1 else Path()) / DEFAULT_NAME
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out {path} does not end in {', '.join(FORMATS)}; choose one of these formats")
    labels = short_labels(folders)
    runs = [read_run(folder) for folder in folders]
    notes = [f"{label}: {remark}" for label, run in zip(labels, runs, strict=True) for remark in run.remarks]
    standings = find_standings(runs, labels)
    if not standings:
        raise UserError(f"{' '.join(arguments)}: the metric files hold no values yet; compute some first")
    drawn = [
        (run, label) for run, label in zip(runs, labels, strict=True) if any(map(len, run.metrics.values()))
    ]
    if not drawn:
        notes.append("no value says how many images its network had seen, so there is no picture")
        return standings, None, notes
    without_stats = [dataclasses.replace(run, stats={}) for run, _ in drawn]
    save_picture(path, without_stats, [label for _, label in drawn], "kimg", 0.0)
    return standings, path, notes


def find_standings(runs: Sequence[RunCurves], labels: Sequence[str]) -> list[Standing]:
    """A line for each metric and run that has it, metric by metric."""
    names = dict.fromkeys(name for run in runs for name in [*run.metrics, *run.unplaced])
    lines: list[Standing] = []
    for name in names:
        of_metric = [s for run, label in zip(runs, labels, strict=True) if (s := _standing(name, run, label))]
        if not of_metric:
            continue
        pick = max if higher_is_better(name) else min
        winner = pick(standing.best for standing in of_metric)
        lines += [
            dataclasses.replace(s, is_winner=s.best == winner and len(of_metric) > 1) for s in of_metric
        ]
    return lines


def _standing(name: str, run: RunCurves, label: str) -> Standing | None:
    curve = run.metrics.get(name)
    points: list[tuple[float, float | None]] = []
    if curve is not None:
        points = list(zip(curve.values.tolist(), curve.kimg.tolist(), strict=True))
    points += [(value, None) for value in run.unplaced.get(name, ()) if np.isfinite(value)]
    if not points:
        return None
    pick = max if higher_is_better(name) else min
    best, best_kimg = pick(points, key=lambda point: point[0])
    places = [*run.kimg[-1:].tolist(), *(place for _, place in points if place is not None)]
    last = curve.values[-1] if curve is not None and len(curve) else points[-1][0]
    return Standing(name, label, max(places, default=None), best, best_kimg, float(last), is_winner=False)


def format_standings(standings: Sequence[Standing]) -> str:
    """The table; a star marks the best run of a metric."""
    rows = [["metric", "run", "kimg seen", "best", "at kimg", "last", ""]]
    for s in standings:
        direction = "higher" if higher_is_better(s.metric) else "lower"
        places = ["?" if place is None else f"{place:.6g}" for place in (s.kimg, s.best_kimg)]
        mark = f"* {direction} is better" if s.is_winner else ""
        rows.append([s.metric, s.run, places[0], f"{s.best:.5g}", places[1], f"{s.last:.5g}", mark])
    widest = max(len(row[-1]) for row in rows)
    return align_columns([[*row[:-1], row[-1].ljust(widest)] for row in rows], num_left=2)
