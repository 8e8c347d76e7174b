# SPDX-License-Identifier: MIT
"""Runs that are asked to stop end with the documented code at a whole step, all of it saved, and go on from there."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow
STOPPED, INTERRUPTED = 75, 130


def check_stopped(harness, counts, outdir: Path, run, code: int, cause: str) -> None:
    """The run ends with that code, for that reason, and what it saved is of its very last step."""
    assert run.wait(harness.DOWN_S) == code, run.output
    found = re.search(rf"Stopped at ([\d.]+) kimg: {cause}", run.output)
    assert found, run.output
    saved = harness.newest(outdir)
    assert round(float(found[1]) * 1000) == saved
    assert f"to go on: the same command with --resume {harness.only_run(outdir)}" in run.output.lower()
    counts.faults += 1


def throttle(run) -> None:
    """Let a run have a sixteenth of the time until it ends, so that it does not come near its end by itself."""
    process = psutil.Process(run.process.pid)
    while run.process.poll() is None and "Stopped at" not in run.output:
        process.suspend()
        time.sleep(0.15)
        process.resume()
        time.sleep(0.01)


def test_one_process(harness, rows, straight: Path, tmp_path: Path) -> None:
    outdir = tmp_path / "runs"
    counts = rows("SIGTERM")
    run = harness.start_until_state(outdir)
    start_up_s = time.time() - run.started_at
    run.process.send_signal(signal.SIGTERM)
    check_stopped(harness, counts, outdir, run, STOPPED, "SIGTERM received by rank 0")

    left, counts = harness.Left.by(outdir), rows("--time-limit")
    limit_s = round(2 * start_up_s + 5)
    run = harness.start_until_state(outdir, "--time-limit", str(limit_s))
    throttle(run)
    left.count_losses(rows("SIGTERM"), run)
    check_stopped(harness, counts, outdir, run, STOPPED, f"--time-limit {limit_s} s is nearly over")
    assert harness.states(outdir)[harness.newest(outdir)].stat().st_mtime < run.started_at + limit_s

    left, counts = harness.Left.by(outdir), rows("SIGINT")
    run = harness.start(outdir, "--resume", "auto")
    assert harness.wait_until(lambda: "Continued at" in run.output, run)
    time.sleep(0.2)
    run.process.send_signal(signal.SIGINT)
    left.count_losses(rows("--time-limit"), run)
    check_stopped(harness, counts, outdir, run, INTERRUPTED, "SIGINT received by rank 0")

    harness.go_on(outdir, counts)
    harness.assert_same_run(straight, harness.only_run(outdir))


def test_two_processes(harness, rows, straight_pair: Path, tmp_path: Path) -> None:
    outdir = tmp_path / "runs"
    counts = rows("SIGUSR1 to one of two processes")
    run = harness.start_until_state(outdir, "--gpus", "2")
    run.children()[1].send_signal(signal.SIGUSR1)
    check_stopped(harness, counts, outdir, run, STOPPED, "SIGUSR1 received by rank 1")

    left, counts = harness.Left.by(outdir), rows("SIGINT to the launcher of two processes")
    run = harness.start_until_state(outdir, "--gpus", "2")
    run.process.send_signal(signal.SIGINT)
    left.count_losses(rows("SIGUSR1 to one of two processes"), run)
    check_stopped(harness, counts, outdir, run, INTERRUPTED, r"SIGINT received by rank [01]")

    harness.go_on(outdir, counts, "--gpus", "2")
    harness.assert_same_run(straight_pair, harness.only_run(outdir))


def test_second_interrupt(harness, counts, tmp_path: Path) -> None:
    """A second SIGINT, which does not wait for the end of the iteration."""
    outdir = tmp_path / "runs"
    recipe = [*harness.DCGAN]
    recipe[recipe.index("--batch") + 1] = "16384"  # an iteration of seconds
    recipe[recipe.index("--kimg") + 1] = "1000"
    run = harness.start_until_state(outdir, recipe=recipe)
    left = harness.Left.by(outdir)
    run.process.send_signal(signal.SIGINT)
    time.sleep(1)  # a signal that comes twice within half a second is one
    run.process.send_signal(signal.SIGINT)
    sent_at = time.monotonic()
    assert run.wait(harness.DOWN_S) == INTERRUPTED, run.output
    assert time.monotonic() - sent_at < harness.DOWN_S / 2
    counts.faults += 1
    assert "once more stops at once" in run.output and "Stopped at" not in run.output
    assert "Traceback" not in run.output
    now = harness.Left.by(outdir)
    counts.files_lost += len(left.files - now.files)
    assert now.newest == left.newest > 0
