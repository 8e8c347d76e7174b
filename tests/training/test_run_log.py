# SPDX-License-Identifier: MIT
"""Logs of a run in several parts: no line twice, none torn, none lost; and what a terminal or a file sees."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import types
from pathlib import Path

import pytest

from torch_utils.errors import UserError
from training import run_log
from training.durations import format_duration
from training.event_sinks import WANDB_ID_FILE, import_wandb, silence_event_threads
from training.metric_records import MetricRecord
from training.run_log import RunLog, cut_logs


def write_part(run_dir: Path, points: list[int], start_nimg: int = 0, **options: object) -> RunLog:
    """Log a tick and a metric at each point."""
    log = RunLog(run_dir, total_kimg=0.1, start_nimg=start_nimg, **options)
    for nimg in points:
        log.print(f"tick at {nimg}")
        log.write_stats({"Loss/G/loss": {"num": 1, "mean": nimg / 10, "std": 0.0}}, nimg)
        record = MetricRecord("fd_lite0", {"fd_lite0": 5.0}, nimg, "network-snapshot.safetensors", "f00", 1.0)
        log.write_metric(record, nimg)
    return log


def points_of(path: Path) -> list[int]:
    return [json.loads(line)["cur_nimg"] for line in path.read_text().splitlines()]


def test_a_run_that_goes_on_has_every_line_once(tmp_path: Path) -> None:
    write_part(tmp_path, [8, 16, 24]).close()
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"cur_nimg": 32, "Lo')  # killed while it wrote
    write_part(tmp_path, [24, 32], start_nimg=16).close()
    for name in ("stats.jsonl", "metric-fd_lite0.jsonl"):
        assert points_of(tmp_path / name) == [8, 16, 24, 32]
    line = json.loads((tmp_path / "stats.jsonl").read_text().splitlines()[0])
    assert list(line) == ["cur_nimg", "Loss/G/loss", "timestamp"]
    texts = (tmp_path / "log.txt").read_text().splitlines()
    assert texts == [
        f"tick at {nimg}" for nimg in (8, 16, 24, 24, 32)
    ]  # the text says what happened, and when


def test_a_run_that_starts_over_has_no_lines_of_before(tmp_path: Path) -> None:
    write_part(tmp_path, [0, 8]).close()
    write_part(tmp_path, [0]).close()
    assert points_of(tmp_path / "metric-fd_lite0.jsonl") == points_of(tmp_path / "stats.jsonl") == [0]


@pytest.mark.parametrize(
    "torn", ['{"cur_nimg": 3', "", "[1]", "7", '{"x": 1}', "\x00\x00", '{"cur_nimg": null}']
)
def test_what_is_no_line_of_a_log_is_cut(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text(f'{{"cur_nimg": 1}}\n{torn}\n{{"cur_nimg": 2}}\n{torn}')
    cut_logs(tmp_path, 2)
    assert points_of(path) == [1, 2]


def test_lines_from_before_the_count_had_its_own_field(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text("".join(json.dumps({"Progress/kimg": {"mean": x}}) + "\n" for x in (0.016, 0.032, 0.048)))
    cut_logs(tmp_path, 32)
    assert len(path.read_text().splitlines()) == 2


def test_a_whole_log_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    write_part(tmp_path, [8]).close()
    monkeypatch.setattr(run_log, "atomic_write", pytest.fail)
    cut_logs(tmp_path, 8)


def test_a_log_that_cannot_be_cut_is_named(tmp_path: Path, monkeypatch) -> None:
    write_part(tmp_path, [8, 16]).close()

    def refuse(*paths: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"metric-fd_lite0\.jsonl holds lines .*Read-only file system"):
        RunLog(tmp_path, 1.0, start_nimg=8)
    assert points_of(tmp_path / "stats.jsonl") == [8, 16]


def test_a_full_disk_does_not_end_the_run_and_costs_no_line(tmp_path: Path, monkeypatch, capsys) -> None:
    log = write_part(tmp_path, [8])

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        log.write_stats({"a": {"mean": 1.0}}, 16)
        log.write_stats({"a": {"mean": 1.0}}, 24)
        with log.surviving("fakes000016.png"):
            raise OSError(28, "No space left on device")
    assert points_of(tmp_path / "stats.jsonl") == [8]
    log.write_stats({"a": {"mean": 1.0}}, 32)
    log.close()
    assert points_of(tmp_path / "stats.jsonl") == [8, 16, 24, 32]
    output = capsys.readouterr().out
    assert output.count("stats.jsonl cannot be written (No space left on device)") == 1
    assert (
        "Warning: fakes000016.png could not be written (No space left on device). The run goes on." in output
    )
    assert "fakes000016.png" in (tmp_path / "log.txt").read_text()


def test_mistakes_of_the_code_are_not_survived(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 1.0)
    with pytest.raises(ZeroDivisionError), log.surviving("x"):
        raise ZeroDivisionError
    log.close()


# Terminal and file.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_and_plain_lines_in_a_file(tmp_path: Path, monkeypatch, capsys) -> None:
    for folder, stream in (("a", Terminal()), ("b", io.StringIO())):
        monkeypatch.setattr(sys, "stderr", stream)
        (tmp_path / folder).mkdir()
        log = write_part(tmp_path / folder, [8])
        log.advance(8)
        log.close()
        assert ("\r" in stream.getvalue()) == stream.isatty()
        assert "tick at 8\n" in capsys.readouterr().out


def test_time(tmp_path: Path, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(run_log.time, "time", lambda: now[0])
    log = RunLog(tmp_path, total_kimg=10, start_nimg=4000, earlier_seconds=50.0)
    assert log.total_seconds() == 50 and log.time_left(4000) == "?"
    now[0] += 100
    assert log.total_seconds() == 150
    assert log.time_left(5000) == "8m20s"  # 100 s for 1000 images of this part, 5000 to go
    assert log.time_left(10_001) == "0s"
    log.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (3599, "59m59s"), (13800, "3h50m"), (200_000, "2d07h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# TensorBoard and Weights & Biases.


def test_events_of_steps_that_are_trained_again_are_hidden(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_part(tmp_path, [8, 16, 24]).close()
    log = RunLog(tmp_path, 0.1, start_nimg=16)
    log.write_stats({"Loss/G/loss": {"mean": 100.0}}, 24)
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("Loss/G/loss")
    assert [(event.step, event.value) for event in events] == [
        (8, pytest.approx(0.8)),
        (16, pytest.approx(1.6)),
        (24, 100),
    ]


def test_events_survive_a_full_disk(tmp_path: Path, monkeypatch, capsys) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = write_part(tmp_path, [8])

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log._events._writer, "flush", refuse)
        patch.setattr(log._events, "_make_writer", refuse)
        for nimg in (16, 24):
            log.write_stats({"Loss/G/loss": {"mean": 1.0}}, nimg)
    log.write_stats({"Loss/G/loss": {"mean": 3.2}}, 32)
    log.close()
    assert capsys.readouterr().out.count("TensorBoard events") == 1
    steps = [e.step for e in accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("Loss/G/loss")]
    assert steps[0] == 8 and steps[-1] == 32
    assert points_of(tmp_path / "stats.jsonl") == [8, 16, 24, 32]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
@pytest.mark.parametrize(
    ("module", "error", "is_shown"),
    [
        ("tensorboard.summary.writer", OSError("No space left on device"), False),
        ("tensorboard.summary.writer", ValueError("a mistake"), True),
        ("training.state_writer", OSError("No space left on device"), True),
    ],
)
def test_a_full_disk_is_no_trace_of_the_thread_that_writes_events(
    module: str, error: Exception, is_shown: bool, monkeypatch
) -> None:
    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    silence_event_threads.__wrapped__()

    def run(_thread: threading.Thread) -> None:
        raise error

    thread = type("Writer", (threading.Thread,), {"__module__": module, "run": run})()
    thread.start()
    thread.join()
    assert [failure.exc_value for failure in shown] == [error] * is_shown


def test_a_disk_that_really_is_full(small_disk: Path) -> None:
    log = write_part(small_disk, [8])
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    assert os.statvfs(small_disk).f_bavail == 0
    for nimg in range(16, 160, 8):
        log.print("x" * 1000)
        log.write_stats({"Loss/G/loss": {"mean": 1.0, "text": "x" * 1000}}, nimg)
    (small_disk / "filler").unlink()
    log.print("room again")
    log.write_stats({"Loss/G/loss": {"mean": 1.0}}, 160)
    log.close()
    assert points_of(small_disk / "stats.jsonl") == list(range(8, 161, 8))
    texts = (small_disk / "log.txt").read_text().splitlines()
    assert texts == ["tick at 8", *["x" * 1000] * 18, "room again"]


@pytest.fixture
def fake_wandb(monkeypatch) -> types.SimpleNamespace:
    """A stand-in for the wandb package that notes what it is asked."""
    module = types.ModuleType("wandb")
    seen = types.SimpleNamespace(inits=[], logs=[], finished=0, error=None)

    def init(**options: object) -> types.SimpleNamespace:
        if seen.error is not None:
            raise module.Error(seen.error)
        seen.inits.append(options)

        def finish() -> None:
            seen.finished += 1

        log = lambda values, step: seen.logs.append((step, values))  # noqa: E731
        return types.SimpleNamespace(id=options["id"] or "abc123", log=log, finish=finish)

    module.init, module.Error = init, type("Error", (Exception,), {})
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path: Path, fake_wandb) -> None:
    (tmp_path / "training_options.json").write_text('{"seed": 3}')
    write_part(tmp_path, [8], wandb_project="p").close()
    write_part(tmp_path, [16], start_nimg=8, wandb_project="p").close()
    first, second = fake_wandb.inits
    assert (first["project"], first["id"], first["config"]) == ("p", None, {"seed": 3})
    assert (second["id"], second["resume"], second["name"]) == ("abc123", "allow", tmp_path.name)
    assert (tmp_path / WANDB_ID_FILE).read_text() == "abc123\n"
    assert [step for step, _ in fake_wandb.logs] == [8, 8, 16, 16] and fake_wandb.finished == 2
    assert fake_wandb.logs[0][1] == {"Loss/G/loss": 0.8}


def test_weights_and_biases_is_missing_or_refuses(tmp_path: Path, fake_wandb, monkeypatch) -> None:
    fake_wandb.error = "not logged in\nmore"
    with pytest.raises(UserError, match="--wandb p: not logged in; run `wandb login`") as caught:
        RunLog(tmp_path, 1.0, wandb_project="p")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb p: the wandb package is not installed; pip install wandb"):
        import_wandb("p")
