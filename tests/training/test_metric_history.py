# SPDX-License-Identifier: MIT
"""Metric files of runs, ours and official ones: which step a value belongs to, and what counts as repetition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.metric_history import Tick, read_evaluations, unplaced_values, values_by_place
from training.run_comparison import find_standings, format_standings
from training.run_curves import METRIC_FILES, find_runs, read_run

TICKS = [
    Tick(kimg=4.0 * k, timestamp=1000.0 + 60 * k, total_sec=60.0 * k) for k in range(1, 4)
]  # started at 1000


def write(folder: Path, *lines: dict[str, Any] | str, name: str = "metric-fid50k_full.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (folder / name).write_text("".join(texts))
    return folder / name


def official(value: float, timestamp: float, snapshot: str = "network-snapshot.pkl") -> dict[str, Any]:
    return {"results": {"fid50k_full": value}, "metric": "fid50k_full", "snapshot_pkl": snapshot,
            "timestamp": timestamp}  # fmt: skip


def ours(value: float, nimg: int | None, **settings: object) -> dict[str, Any]:
    return {"results": {"fid50k_full": value}, "cur_nimg": nimg, "timestamp": 1100.0, "settings": settings}


def test_official_lines_get_the_step_of_the_tick_they_belong_to(tmp_path: Path) -> None:
    file = write(tmp_path, official(30.0, 1059.0), official(20.0, 1060.5), official(10.0, 1180.0))
    assert [e.kimg for e in read_evaluations(file, TICKS, [])] == [4.0, 8.0, 12.0]


@pytest.mark.parametrize("timestamp", [900.0, 1181.0])
def test_lines_from_before_and_after_the_statistics_have_no_step(tmp_path: Path, timestamp: float) -> None:
    evaluations = read_evaluations(write(tmp_path, official(3.0, timestamp)), TICKS, [])
    assert [e.kimg for e in evaluations] == [None]
    assert unplaced_values(evaluations) == {"fid50k_full": [3.0]} and values_by_place(evaluations) == {}


def test_the_name_of_the_network_tells_the_step(tmp_path: Path) -> None:
    file = write(tmp_path, official(3.0, 0.0, "network-snapshot-000400.pkl"))
    assert [e.kimg for e in read_evaluations(file, [], [])] == [400.0]


def test_our_lines_say_the_step_and_one_that_is_unknown_is_not_guessed(tmp_path: Path) -> None:
    evaluations = read_evaluations(write(tmp_path, ours(3.0, 64500), ours(2.0, None)), TICKS, [])
    assert [e.kimg for e in evaluations] == [64.5, None]


def test_repetitions_count_last_and_seeds_as_their_mean(tmp_path: Path) -> None:
    lines = (ours(9.0, 1000, seed=1), ours(3.0, 1000, seed=1), ours(5.0, 1000, seed=2), ours(7.0, 0, seed=1))
    places = values_by_place(read_evaluations(write(tmp_path, *lines), [], []))
    assert places == {"fid50k_full": {0.0: 7.0, 1.0: 4.0}}
    assert list(places["fid50k_full"]) == [0.0, 1.0]


def test_numbers_of_another_kind_are_curves_of_their_own(tmp_path: Path) -> None:
    lines = (ours(3.0, 1000), ours(30.0, 1000, variant="300 images"))
    places = values_by_place(read_evaluations(write(tmp_path, *lines), [], []))
    assert places == {"fid50k_full": {1.0: 3.0}, "fid50k_full [300 images]": {1.0: 30.0}}


def test_damaged_lines_are_left_out_and_said(tmp_path: Path) -> None:
    remarks: list[str] = []
    file = write(tmp_path, ours(3.0, 0), "[]\n", {"results": 5}, {"results": {"a": "b", "c": True}}, '{"resu')
    evaluations = read_evaluations(file, [], remarks)
    assert [e.results for e in evaluations] == [{"fid50k_full": 3.0}, {}]
    assert "cut short" in remarks[0] and "1 of the 5 lines" in remarks[1]


def test_an_official_run_without_any_of_our_keys(tmp_path: Path) -> None:
    moments = [{"Progress/kimg": t.kimg, "Timing/total_sec": t.total_sec} for t in TICKS]
    lines = [
        {
            **{name: {"num": 1, "mean": value, "std": 0.0} for name, value in m.items()},
            "timestamp": t.timestamp,
        }
        for m, t in zip(moments, TICKS, strict=True)
    ]
    write(tmp_path / "run", *lines, name="stats.jsonl")
    write(tmp_path / "run", official(50.0, 500.0), official(30.0, 1059.0), official(20.0, 1170.0))
    (folder,) = find_runs([str(tmp_path)], METRIC_FILES)
    run = read_run(folder)
    assert run.metrics["fid50k_full"].kimg.tolist() == [4.0, 12.0]
    (standing,) = find_standings([run], ["run"])
    assert (standing.best, standing.best_kimg, standing.last, standing.kimg) == (20.0, 12.0, 20.0, 12.0)
    assert not standing.is_winner


def test_a_run_of_unknown_steps_is_in_the_table_all_the_same(tmp_path: Path) -> None:
    write(tmp_path / "run", official(30.0, 5.0), official(20.0, 6.0), official(25.0, 7.0))
    (standing,) = find_standings([read_run(tmp_path / "run")], ["run"])
    assert (standing.best, standing.best_kimg, standing.last, standing.kimg) == (20.0, None, 25.0, None)
    assert format_standings([standing]).splitlines()[1].split() == [
        "fid50k_full",
        "run",
        "?",
        "20",
        "?",
        "25",
    ]
