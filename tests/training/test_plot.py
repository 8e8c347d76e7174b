# SPDX-License-Identifier: MIT
"""Plots of runs: reading what runs leave behind, however they ended, and the picture and table made from it.

python -m pytest tests/training/test_plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from metrics.names import METRICS, is_higher_better
from training.plot import main
from training.run_curves import find_runs, read_run, short_labels
from training.run_figure import DPI, PANEL_SIZE, draw_figure, smooth, thin_out
from training.run_panels import best_point, higher_is_better

BASIC = {"Loss/G/loss": 1.0, "Loss/D/loss": -1.0, "Loss/signs/real": 0.5, "Loss/signs/fake": -0.5}


def stats_line(kimg: float, seconds: float, **values: float) -> str:
    """A line as training writes it; `a__b` in a name stands for a/b."""
    named = {name.replace("__", "/"): value for name, value in values.items()}
    moments = {"Progress/kimg": kimg, "Timing/total_sec": seconds, **BASIC, **named}
    line = {name: {"num": 1, "mean": value, "std": 0.0} for name, value in moments.items()}
    return json.dumps({**line, "timestamp": 1.7e9 + seconds}) + "\n"


def metric_line(kimg: float, **results: float) -> str:
    return json.dumps({"results": results, "metric": "m", "cur_nimg": round(1000 * kimg)}) + "\n"


def make_run(folder: Path, lines: list[str], metric: list[str] | None = None, total_kimg: float = 40) -> Path:
    folder.mkdir(parents=True)
    (folder / "stats.jsonl").write_text("".join(lines))
    (folder / "training_options.json").write_text(json.dumps({"total_kimg": total_kimg, "loss": "san"}))
    if metric is not None:
        (folder / "metric-fd_lite0.jsonl").write_text("".join(metric))
    return folder


def five_ticks(**values: float) -> list[str]:
    return [
        stats_line(k, 60.0 * k, **{name: value * k for name, value in values.items()}) for k in range(1, 6)
    ]


def run_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# Reading.


def test_curves_are_what_was_written(tmp_path: Path) -> None:
    metric = [metric_line(0, fd_lite0=100.0), metric_line(2, fd_lite0=20.0), metric_line(4, fd_lite0=30.0)]
    run = read_run(make_run(tmp_path / "run", five_ticks(SAN__cosine=0.1), metric))
    assert run.stats["SAN/cosine"].values == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert run.stats["SAN/cosine"].kimg == pytest.approx([1, 2, 3, 4, 5])
    assert run.hours == pytest.approx(np.arange(1, 6) / 60)
    assert run.metrics["fd_lite0"].values == pytest.approx([100, 20, 30])
    assert run.metrics["fd_lite0"].hours == pytest.approx([0, 2 / 60, 4 / 60])
    assert run.options["total_kimg"] == 40
    assert run.remarks == []


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path, share: float) -> None:
    lines = five_ticks()
    run = read_run(make_run(tmp_path / "run", [*lines[:4], lines[4][: int(share * len(lines[4]))]]))
    assert run.kimg == pytest.approx([1, 2, 3, 4])
    assert [remark for remark in run.remarks if "last line of stats.jsonl was cut short" in remark]


def test_damaged_lines_inside_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = five_ticks()
    lines[1] = "\0" * 50 + "\n"  # what a power cut may leave
    lines[2] = "[1, 2]\n"
    run = read_run(make_run(tmp_path / "run", lines))
    assert run.kimg == pytest.approx([1, 4, 5])
    assert run.remarks == ["2 of the 5 lines of stats.jsonl are damaged and left out"]


def test_statistics_that_come_and_go_and_values_that_are_not_finite(tmp_path: Path) -> None:
    lines = [
        stats_line(1, 60),
        stats_line(2, 120, SAN__cosine=0.5, Loss__G__loss=float("nan")),
        stats_line(3, 180, Loss__G__loss=float("inf")),
        stats_line(4, 240, SAN__cosine=0.7),
    ]
    run = read_run(make_run(tmp_path / "run", lines))
    assert run.stats["SAN/cosine"].kimg == pytest.approx([2, 4])
    assert run.stats["Loss/G/loss"].kimg == pytest.approx([1, 4])
    assert len(run.stats["Loss/D/loss"]) == 4


def test_a_run_that_went_back_and_one_whose_clock_starts_again(tmp_path: Path) -> None:
    places = [(1, 60), (2, 120), (3, 180), (2, 30), (3, 90), (4, 150)]
    run = read_run(make_run(tmp_path / "run", [stats_line(*p, SAN__scale=i) for i, p in enumerate(places)]))
    assert run.kimg == pytest.approx([1, 2, 3, 4])
    assert run.stats["SAN/scale"].values == pytest.approx([0, 3, 4, 5])
    assert run.hours * 60 == pytest.approx([1, 1.5, 2.5, 3.5])
    assert "2 lines of stats.jsonl are left out" in run.remarks[0]


def test_the_exact_place_counts_where_it_is_written(tmp_path: Path) -> None:
    lines = [json.dumps({"cur_nimg": 16_777_217, **json.loads(stats_line(16_777.216, 60))}) + "\n"]
    assert read_run(make_run(tmp_path / "run", lines)).kimg.tolist() == [16_777.217]


def test_an_evaluation_that_was_repeated_counts_once(tmp_path: Path) -> None:
    metric = [metric_line(2, fd_lite0=20.0), metric_line(4, fd_lite0=30.0), metric_line(2, fd_lite0=10.0)]
    curve = read_run(make_run(tmp_path / "run", five_ticks(), metric)).metrics["fd_lite0"]
    assert (curve.kimg.tolist(), curve.values.tolist()) == ([2, 4], [10, 30])


def test_options_that_are_missing_or_damaged(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, five_ticks()) for name in ("missing", "damaged")]
    (runs[0] / "training_options.json").unlink()
    (runs[1] / "training_options.json").write_text('{"total_k')
    missing, damaged = (read_run(run) for run in runs)
    assert missing.options == damaged.options == {}
    assert (missing.remarks, damaged.remarks) == ([], ["training_options.json cannot be read"])


# Finding and naming.


def test_folders_of_runs_ladders_and_patterns(tmp_path: Path) -> None:
    for name in ("digits-16", "digits-8"):
        make_run(tmp_path / "ladders" / "digits" / name, five_ticks())
    single = make_run(tmp_path / "ladders" / "00000-san", five_ticks())
    (tmp_path / "ladders" / "other").mkdir()
    found = find_runs([str(tmp_path / "ladders"), str(single), str(single / "stats.jsonl")])
    assert [run.name for run in found] == ["00000-san", "digits-8", "digits-16"]
    assert find_runs([str(tmp_path / "lad*" / "0*san")]) == [single]


def test_labels_tell_runs_apart() -> None:
    same_names = [Path(f"{name}/runs/00000-san-quickstart-digits-gpus1-batch32") for name in "ab"]
    assert short_labels(same_names) == ["a", "b"]
    long_names = [
        Path(f"runs/0000{i}-{loss}-dcgan-digits-gpus1-batch128") for i, loss in enumerate(("san", "gan"))
    ]
    assert short_labels(long_names) == ["00000-san", "00001-gan"]
    contained = [Path(f"runs/00000-san-dcgan-digits-gpus1-batch128{end}") for end in ("", "-more")]
    assert len(set(short_labels(contained))) == 2
    assert all(short_labels(contained))


# Numbers behind the lines.


def test_which_metrics_are_better_when_higher(tmp_path: Path) -> None:
    higher = [
        name for name in ("fid50k_full", "fd_lite0", "kid50k_full", "ppl2_wend") if higher_is_better(name)
    ]
    assert higher == []
    assert all(
        map(higher_is_better, ("pr50k3_full_recall", "is50k_full_mean", "eqt50k_int", "class_accuracy"))
    )
    for name, plan in METRICS.items():
        for key in plan.keys(name):
            assert higher_is_better(key) == is_higher_better(key), key
    metric = [metric_line(k, fd=value, recall=value) for k, value in ((0, 3.0), (1, 1.0), (2, 5.0))]
    metrics = read_run(make_run(tmp_path / "run", five_ticks(), metric)).metrics
    assert best_point(metrics["fd"], "fd") == 1
    assert best_point(metrics["recall"], "recall") == 2


def test_thinning_keeps_mean_and_extremes() -> None:
    values = np.sin(np.arange(10_007) / 300)
    values[4321] = 9.0
    mean, low, high = thin_out(values, max_points=100)
    assert len(mean) <= 100
    assert (high.max(), low.min()) == (9.0, values.min())
    assert np.average(mean, weights=[101] * 99 + [8]) == pytest.approx(values.mean())
    assert thin_out(values[:50], max_points=50)[0].tolist() == values[:50].tolist()


def test_smoothing_goes_by_images_and_starts_at_the_first_value(tmp_path: Path) -> None:
    lines = [stats_line(k, k, SAN__scale=value) for k, value in ((1, 4.0), (2, 4.0), (10, 0.0))]
    curve = read_run(make_run(tmp_path / "run", lines)).stats["SAN/scale"]
    first, second, last = smooth(curve, halflife_kimg=4.0)
    assert (first, second) == pytest.approx((4, 4))
    weights = np.array([0.5 ** (9 / 4), 0.25, 1])
    assert last == pytest.approx(4 * weights[:2].sum() / weights.sum())


# The picture.


def test_picture_of_one_run(tmp_path: Path) -> None:
    """A metric, three panels of basic statistics, and speed: in rows of four."""
    run = make_run(
        tmp_path / "run",
        five_ticks(Timing__sec_per_kimg=9.0),
        [metric_line(k, fd_lite0=9.0 - k) for k in (1, 3)],
    )
    result = run_command(run)
    assert result.exit_code == 0, result.output
    assert f"Wrote {run / 'curves.png'}" in result.output
    image = pixels(run / "curves.png")
    height, width = image.shape[:2]
    assert width == pytest.approx(4 * PANEL_SIZE[0] * DPI, abs=2)
    assert 2 * PANEL_SIZE[1] * DPI < height < 2.3 * PANEL_SIZE[1] * DPI
    parts = [part for rows in np.array_split(image, 2) for part in np.array_split(rows, 4, axis=1)]
    is_drawn = [(np.ptp(part, axis=2) > 60).mean() > 1e-3 for part in parts]  # colours, not only grey text
    assert is_drawn == [True] * 5 + [False] * 3


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    plain = read_run(make_run(tmp_path / "plain", five_ticks()))
    rich = read_run(
        make_run(
            tmp_path / "rich",
            five_ticks(
                SAN__cosine=0.1, BEGAN__k=0.2, Health__gradient_norm_G=3.0, Health__nonfinite_total=0.0
            ),
        )
    )
    titles = [
        [axes.get_title(loc="left") for axes in draw_figure([run], ["a"]).axes] for run in (plain, rich)
    ]
    assert titles[0] == ["Loss of G", "Loss of D", "Signs of D's logits, mean"]
    added = ["BEGAN: k", "SAN: cosine with the optimal direction", "Gradient norms"]
    assert titles[1] == titles[0] + added  # nothing was not finite, so that is no panel


def test_layers_of_few_runs_are_drawn_too(tmp_path: Path) -> None:
    values = {"SAN__cosine": 0.1, "SAN__cosine__a": 0.05, "SAN__cosine__b": 0.15}
    runs = [read_run(make_run(tmp_path / str(i), five_ticks(**values))) for i in range(3)]
    counts = []
    for shown in (runs[:1], runs):
        axes = next(
            a
            for a in draw_figure(shown, list("abc")[: len(shown)]).axes
            if "cosine" in a.get_title(loc="left")
        )
        counts.append(len([line for line in axes.lines if len(line.get_xdata()) == 5]))
    assert counts == [3, 3]  # one run with two layers; three runs without


def test_several_runs_in_one_picture_and_table(tmp_path: Path) -> None:
    for i in range(12):
        metric = [metric_line(k, fd_lite0=50.0 - i + abs(k - 3)) for k in range(1, 6)] if i % 2 else None
        make_run(tmp_path / f"0{i:04d}-san", five_ticks(SAN__cosine=0.01 * i), metric)
    result = run_command(tmp_path, "--out", tmp_path / "all.png", "--x", "hours", "--smooth", "2")
    assert result.exit_code == 0, result.output
    header, *rows = [line.split() for line in result.output.splitlines() if "Wrote" not in line]
    assert header[:4] == ["run", "kimg", "of", "hours"]
    assert [row[0] for row in rows] == [f"0{i:04d}-san" for i in range(12)]
    assert rows[1][-3:] == ["51", "49", "3"]  # last, best, at kimg
    assert rows[0][-3:] == ["-", "-", "-"]
    drawn = pixels(tmp_path / "all.png")
    assert len(np.unique(drawn[np.ptp(drawn, axis=2) > 100], axis=0)) > 12


def test_two_ticks_and_ten_thousand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(size=3000)
    losses[1234] = 1e6
    short = read_run(make_run(tmp_path / "short", five_ticks()[:2]))
    long = read_run(
        make_run(tmp_path / "long", [stats_line(k, 60 * k, Loss__G__loss=v) for k, v in enumerate(losses)])
    )
    (short_line,) = draw_figure([short], ["a"]).axes[0].lines
    assert (len(short_line.get_xdata()), short_line.get_marker()) == (2, "o")
    axes = draw_figure([long], ["a"]).axes[0]
    assert len(axes.lines[0].get_xdata()) <= 800
    assert max(map(abs, axes.get_ylim())) < 20  # one value far outside does not hide the others
    assert [text.get_text() for text in axes.texts] == ["1 point outside"]


def test_vector_formats(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", five_ticks())
    for ending, start in ((".pdf", b"%PDF"), (".svg", b"<?xml")):
        assert run_command(run, "--out", tmp_path / f"x{ending}").exit_code == 0
        assert (tmp_path / f"x{ending}").read_bytes().startswith(start)


# Errors.


def test_errors_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", five_ticks())
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    waiting = make_run(tmp_path / "waiting", [])
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        ([tmp_path / "nowhere"], "no such folder: "),
        ([tmp_path / "x*"], "no folder matches"),
        ([tmp_path / "empty"], "holds no stats.jsonl"),
        ([run, tmp_path / "empty"], "holds no stats.jsonl"),
        ([tmp_path / "file"], "is a file"),
        ([waiting], "no progress has been reported yet"),
        ([run, "--out", tmp_path / "x.jpg"], "does not end in .png, .pdf, .svg"),
        ([run, "--out", tmp_path / "file" / "x.png"], "cannot be written"),
        ([run, "--smooth", "-1"], "--smooth -1.0 is not"),
        ([run, "--smooth", "nan"], "--smooth nan is not"),
    ):
        result = run_command(*arguments)
        assert result.exit_code == 1
        assert words in result.output
        assert len(result.output.strip().splitlines()) == 1
        assert isinstance(result.exception, SystemExit)  # no stack trace
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_without_progress_beside_others_is_said(tmp_path: Path) -> None:
    run, waiting = make_run(tmp_path / "run", five_ticks()), make_run(tmp_path / "waiting", [])
    result = run_command(run, waiting, "--out", tmp_path / "x.png")
    assert result.exit_code == 0
    assert "nothing to draw yet in waiting" in result.output
