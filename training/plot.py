# SPDX-License-Identifier: MIT
"""Draw the curves of runs: `python -m training.plot RUN...` writes a PNG and prints a table of last and best values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError
from training.run_curves import RunCurves, find_runs, read_run, short_labels
from training.run_panels import best_point

FORMATS = (".png", ".pdf", ".svg")
DEFAULT_NAME = "curves.png"
COLUMNS = {  # statistics in the table, by their heading; their last values
    "G": "Loss/G/loss",
    "D": "Loss/D/loss",
    "sign real": "Loss/signs/real",
    "sign fake": "Loss/signs/fake",
    "cosine": "SAN/cosine",
}


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", metavar="FILE", help="Picture to write, .png, .pdf or .svg  [default: curves.png in the "
              "run's folder, or in the working folder for several runs]")  # fmt: skip
@click.option("--x", type=click.Choice(["kimg", "hours"]), default="kimg", help="Horizontal axis")
@click.option("--smooth", "smooth_kimg", type=float, default=0.0, metavar="KIMG",
              help="Half-life of a moving average over the statistics, in thousands of images; 0 = none")  # fmt: skip
def main(runs: tuple[str, ...], out: str | None, x: str, smooth_kimg: float) -> None:
    """Draw losses, metrics, SAN's directions and speed of one or several runs in one picture.

    RUN is the folder of a run, a folder that holds runs (the stages of a ladder, or everything below --outdir), or a
    pattern such as 'runs/*san*'. A run may still be going on.
    """
    try:
        path = plot(runs, out, x, smooth_kimg)
    except UserError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote {path}")


def plot(arguments: Sequence[str], out: str | None, x: str, smooth_kimg: float) -> Path:
    """Write the picture, print the table and what the files lack, and return the picture's path. Raises UserError."""
    if not smooth_kimg >= 0:  # NaN too
        raise UserError(f"--smooth {smooth_kimg} is not a number of kimg; give 0 or more")
    folders = find_runs(arguments)
    path = Path(out) if out else (folders[0] if len(folders) == 1 else Path()) / DEFAULT_NAME
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out {path} does not end in {', '.join(FORMATS)}; choose one of these formats")
    labels = dict(zip(folders, short_labels(folders), strict=True))
    runs = [
        read_run(folder)
        for folder in tqdm(folders, desc="Reading", unit="run", disable=None if len(folders) > 2 else True)
    ]
    for run in runs:
        for remark in run.remarks:
            click.echo(f"Note: {labels[run.folder]}: {remark}")
    with_data = [run for run in runs if any(map(len, [*run.stats.values(), *run.metrics.values()]))]
    if not with_data:
        raise UserError(f"{' '.join(arguments)}: no progress has been reported yet; wait for the first tick")
    if empty := [labels[run.folder] for run in runs if run not in with_data]:
        click.echo(f"Note: nothing to draw yet in {', '.join(empty)}")
    shown = [labels[run.folder] for run in with_data]
    save_picture(path, with_data, shown, x, smooth_kimg)
    click.echo(format_table(with_data, shown))
    return path


def save_picture(
    path: Path, runs: Sequence[RunCurves], labels: Sequence[str], x: str, smooth_kimg: float
) -> None:
    """Draw and write atomically. UserError when matplotlib is missing or the file cannot be written."""
    try:
        from training.run_figure import draw_figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("plots need matplotlib, which is not installed: pip install matplotlib") from error
    figure = draw_figure(runs, labels, x, smooth_kimg)
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; choose another --out"
        ) from error


def format_table(runs: Sequence[RunCurves], labels: Sequence[str]) -> str:
    """A line per run: how far it is, seconds per kimg (median), last values, and of metrics the best one and where."""
    columns = {title: name for title, name in COLUMNS.items() if any(len(_stat(run, name)) for run in runs)}
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    rows = [["run", "kimg", "of", "hours", "sec/kimg", *columns]]
    for metric in metrics:
        rows[0] += [metric, "best", "at kimg"]
    for run, label in zip(runs, labels, strict=True):
        speeds = _stat(run, "Timing/sec_per_kimg")
        total = run.options.get("total_kimg")
        cells = [label, *(f"{axis[-1]:.5g}" if len(axis) else "-" for axis in (run.kimg, run.hours))]
        cells.insert(2, f"{total:g}" if isinstance(total, (int, float)) else "-")
        cells.append(f"{np.median(speeds):.3g}" if len(speeds) else "-")
        for name in columns.values():
            cells.append(f"{_stat(run, name)[-1]:.3g}" if len(_stat(run, name)) else "-")
        for metric in metrics:
            curve = run.metrics.get(metric)
            if curve is None or not len(curve):
                cells += ["-", "-", "-"]
            else:
                best = best_point(curve, metric)
                cells += [f"{curve.values[-1]:.4g}", f"{curve.values[best]:.4g}", f"{curve.kimg[best]:.5g}"]
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def _stat(run: RunCurves, name: str) -> np.ndarray:
    curve = run.stats.get(name)
    return np.empty(0) if curve is None else curve.values


if __name__ == "__main__":
    main()
