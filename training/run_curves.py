# SPDX-License-Identifier: MIT
"""What the folders of runs hold for plots: statistics per tick, metrics and options, read without any of training.

Reads whatever a run has written so far, of any version and after any kill: what is missing is left out, and a line
that was cut short is said.
"""

from __future__ import annotations

import glob
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torch_utils.errors import UserError
from training.json_lines import read_lines
from training.metric_history import Tick, read_evaluations, unplaced_values, values_by_place

STATS = "stats.jsonl"
METRIC_FILES = "metric-*.jsonl"
SEARCH_DEPTH = 2  # levels below a folder in which runs are looked for: those of runs, and of ladders
MAX_LABEL = 30  # characters of a run's name that need no shortening


@dataclass(frozen=True)
class Curve:
    """One number over a run; values are finite, and places rise strictly."""

    kimg: np.ndarray  # (n,) thousands of real images seen
    hours: np.ndarray  # (n,) of training until then
    values: np.ndarray  # (n,)

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class RunCurves:
    """All that is known of one run."""

    folder: Path
    options: dict[str, Any]  # training_options.json; empty when it is missing or damaged
    kimg: np.ndarray  # (ticks,) thousands of real images seen at each line of the statistics
    hours: np.ndarray  # (ticks,) of training until then, interruptions not counted
    stats: dict[str, Curve]  # mean of a statistic over each tick
    metrics: dict[str, Curve]  # results of evaluations, by the name of the result
    remarks: list[str] = field(default_factory=list)  # what the user should know about the files
    unplaced: dict[str, list[float]] = field(default_factory=dict)  # results whose step is not known


def find_runs(arguments: Sequence[str], marks: str = STATS) -> list[Path]:
    """Run folders that the arguments mean, without repeats: folders of runs or above them, or patterns of such.

    marks: pattern of the files that make a folder a run. Numbers in the names of folders found are ordered by value:
    digits-8 comes before digits-16. Raises UserError for an argument that is no folder, or has no run in it.
    """
    folders: dict[Path, Path] = {}
    for argument in arguments:
        found = sorted(
            (run for path in _expand(argument) for run in _runs_in(path, marks)), key=_natural_order
        )
        if not found:
            raise UserError(
                f"{argument} holds no {marks}, nor does a folder in it ({SEARCH_DEPTH} levels down): it is neither a "
                "run nor a folder of runs; give those that train.py made"
            )
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def _expand(argument: str) -> list[Path]:
    path = Path(argument).expanduser()
    if path.exists():
        path = path.parent if path.name == STATS else path
        if not path.is_dir():
            raise UserError(f"{argument} is a file; give the folder of a run, or one that holds runs")
        return [path]
    if glob.has_magic(argument):
        if paths := [Path(name) for name in glob.glob(str(path), recursive=True)]:
            return [path for path in paths if path.is_dir()]
        raise UserError(f"no folder matches {argument}")
    raise UserError(f"no such folder: {argument}")


def _runs_in(folder: Path, marks: str) -> list[Path]:
    if next(folder.glob(marks), None) is not None:
        return [folder]
    patterns = ("*/" * depth + marks for depth in range(1, SEARCH_DEPTH + 1))
    return list(dict.fromkeys(file.parent for pattern in patterns for file in folder.glob(pattern)))


def _natural_order(folder: Path) -> list[list[tuple[int, int, str]]]:
    pieces = (re.findall(r"\d+|\D+", part) for part in folder.parts)
    return [[(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in part] for part in pieces]


def read_run(folder: Path) -> RunCurves:
    """Curves of one run. A run before its first tick has none. Raises UserError for files that cannot be read."""
    remarks: list[str] = []
    lines = read_lines(folder / STATS, remarks) if (folder / STATS).exists() else ()
    ticks = _drop_repeated(lines, remarks)
    kimg = np.array([place for place, _, _ in ticks])
    hours = _training_hours([means.get("Timing/total_sec") for _, means, _ in ticks])
    places: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for index, (_, means, _) in enumerate(ticks):
        for name, value in means.items():
            places.setdefault(name, []).append(index)
            values.setdefault(name, []).append(value)
    stats = {name: _finite_curve(kimg[at], hours[at], np.array(values[name])) for name, at in places.items()}
    times = [
        Tick(place, timestamp, means.get("Timing/total_sec", 0.0))
        for place, means, timestamp in ticks
        if timestamp
    ]
    evaluations = [
        evaluation
        for file in sorted(folder.glob(METRIC_FILES), key=lambda file: file.name)
        for evaluation in read_evaluations(file, times, remarks)
    ]
    metrics = {
        name: _metric_curve(by_place, kimg, hours) for name, by_place in values_by_place(evaluations).items()
    }
    return RunCurves(
        folder,
        _read_options(folder, remarks),
        kimg,
        hours,
        stats,
        metrics,
        remarks,
        unplaced_values(evaluations),
    )


def _means(line: dict[str, Any]) -> dict[str, float]:
    """Means of all statistics in a line, NaN and infinities included. Long runs have millions: names are shared."""
    entries = ((name, entry.get("mean")) for name, entry in line.items() if isinstance(entry, dict))
    return {sys.intern(name): float(mean) for name, mean in entries if isinstance(mean, (int, float))}


def _drop_repeated(
    lines: Iterable[dict[str, Any]], remarks: list[str]
) -> list[tuple[float, dict[str, float], float]]:
    """Place, means and time of each line, rising. Where a run went back and trained again, the later lines count."""
    kept: list[tuple[float, dict[str, float], float]] = []
    dropped = 0
    for line in lines:
        means = _means(line)
        place = _place(line, means.get("Progress/kimg"))
        if place is None or not math.isfinite(place):
            continue
        while kept and kept[-1][0] >= place:
            kept.pop()
            dropped += 1
        timestamp = line.get("timestamp")
        kept.append((place, means, float(timestamp) if isinstance(timestamp, (int, float)) else 0.0))
    if dropped:
        remarks.append(
            f"{dropped} lines of {STATS} are left out, as the run went back and trained them again"
        )
    return kept


def _place(line: dict[str, Any], otherwise: float | None) -> float | None:
    """Thousands of images seen. `cur_nimg` is exact, where Progress/kimg is in float32."""
    nimg = line.get("cur_nimg")
    return nimg / 1000 if isinstance(nimg, (int, float)) else otherwise


def _training_hours(seconds: list[float | None]) -> np.ndarray:
    """Hours since the run began. The clock of the log may start again at 0 when a run goes on."""
    hours, before, total = [], 0.0, 0.0
    for now in seconds:
        if now is not None:
            total += now - before if now >= before else now
            before = now
        hours.append(total / 3600)
    return np.array(hours)


def _finite_curve(kimg: np.ndarray, hours: np.ndarray, values: np.ndarray) -> Curve:
    kept = np.isfinite(values)
    return Curve(kimg[kept], hours[kept], values[kept])


def _metric_curve(by_place: dict[float, float], kimg: np.ndarray, hours: np.ndarray) -> Curve:
    """kimg -> value as a curve; hours are those of the ticks around."""
    at = np.array(list(by_place))
    when = np.interp(at, np.concatenate([[0.0], kimg]), np.concatenate([[0.0], hours]))
    return _finite_curve(at, when, np.array(list(by_place.values())))


def _read_options(folder: Path, remarks: list[str]) -> dict[str, Any]:
    file = folder / "training_options.json"
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        remarks.append(f"{file.name} cannot be read")
        return {}
    return options if isinstance(options, dict) else {}


def short_labels(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: the last parts of its path, as many as tell all apart; long ones without common words.

    >>> short_labels([Path("ladder/digits-8"), Path("ladder/digits-16")])
    ['digits-8', 'digits-16']
    >>> short_labels([Path("runs/00000-san-quickstart-digits-gpus1"), Path("runs/00001-gan-quickstart-digits-gpus1")])
    ['00000-san', '00001-gan']
    >>> short_labels([Path("a/runs/00000-san"), Path("b/runs/00000-san")])
    ['a/runs/00000-san', 'b/runs/00000-san']
    """
    paths = [folder.resolve().parts for folder in folders]
    depth = next((n for n in range(1, 100) if len({path[-n:] for path in paths}) == len(paths)), 100)
    ends = [path[-depth:] for path in paths]
    full = ["/".join(end) for end in ends]
    if len(folders) == 1 or max(map(len, full)) <= MAX_LABEL:
        return full
    common = set.intersection(*({word for part in end for word in part.split("-")} for end in ends))
    kept = [
        ["-".join(word for word in part.split("-") if word not in common) for part in end] for end in ends
    ]
    short = ["/".join(filter(None, parts)) for parts in kept]
    return short if all(short) and len(set(short)) == len(short) else full
