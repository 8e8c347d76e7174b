# SPDX-License-Identifier: MIT
"""What the metric-*.jsonl files of a run say, ours and the official ones: values, and the steps they belong to.

Official lines do not say how many images the network had seen. It is in the network's file name in some versions; else
the time tells, since a tick's statistics are written right after its metrics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.json_lines import read_lines

_KIMG_IN_NAME = re.compile(r"network-snapshot-(\d{6})\.pkl$")


@dataclass(frozen=True)
class Tick:
    """When statistics were written."""

    kimg: float  # thousands of real images seen
    timestamp: float  # seconds since 1970
    total_sec: float  # since the process had started


@dataclass(frozen=True)
class Evaluation:
    """One line: the results of one metric for one network."""

    kimg: float | None  # thousands of real images that the network had seen; None = not known
    results: dict[str, float]  # by key; of what is not computed as the name says, the key says how
    seed: int | None  # of the generated images; None = the line does not say


def read_evaluations(file: Path, ticks: Sequence[Tick], remarks: list[str]) -> list[Evaluation]:
    """All lines of a metric's file, in their order. What is no such line is left out, which `remarks` say."""
    found = []
    for line in read_lines(file, remarks):
        results, settings = line.get("results"), line.get("settings")
        if not isinstance(results, dict):
            continue
        settings = settings if isinstance(settings, dict) else {}
        ending = f" [{settings['variant']}]" if settings.get("variant") else ""
        values = {f"{key}{ending}": float(value) for key, value in results.items() if _is_number(value)}
        seed = settings.get("seed")
        found.append(Evaluation(_place(line, ticks), values, seed if isinstance(seed, int) else None))
    return found


def values_by_place(evaluations: Iterable[Evaluation]) -> dict[str, dict[float, float]]:
    """Of each result, kimg -> value, rising. Of repeated evaluations the last counts; over seeds it is their mean."""
    by_seed: dict[str, dict[float, dict[int | None, float]]] = {}
    for evaluation in evaluations:
        if evaluation.kimg is not None:
            for name, value in evaluation.results.items():
                by_seed.setdefault(name, {}).setdefault(evaluation.kimg, {})[evaluation.seed] = value
    return {
        name: {
            place: math.fsum(values.values()) / len(values)
            if len(values) > 1
            else next(iter(values.values()))
            for place, values in sorted(places.items())
        }
        for name, places in by_seed.items()
    }


def unplaced_values(evaluations: Iterable[Evaluation]) -> dict[str, list[float]]:
    """Of each result, the values whose step is not known, in the order of the file."""
    found: dict[str, list[float]] = {}
    for evaluation in evaluations:
        if evaluation.kimg is None:
            for name, value in evaluation.results.items():
                found.setdefault(name, []).append(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _place(line: dict[str, Any], ticks: Sequence[Tick]) -> float | None:
    nimg = line.get("cur_nimg")
    if _is_number(nimg):
        return nimg / 1000
    if match := _KIMG_IN_NAME.search(str(line.get("snapshot_pkl"))):
        return float(match[1])
    timestamp = line.get("timestamp")
    if "cur_nimg" in line or not _is_number(timestamp) or not ticks:
        return None  # a network of unknown age, evaluated at any time
    if timestamp < ticks[0].timestamp - ticks[0].total_sec:
        return None  # of a part of the run whose statistics the official code has overwritten
    return next((tick.kimg for tick in ticks if tick.timestamp >= timestamp), None)
