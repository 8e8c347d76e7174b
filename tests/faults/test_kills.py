# SPDX-License-Identifier: MIT
"""A run that is killed again and again equals one that never was, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
NUM_KILLS = 20


def kill_often(harness, counts, outdir: Path, kills: int, *flags: str, recipe=None) -> Path:
    """Start, SIGKILL, start again, `kills` times, then train to the end. Half of the kills are inside a state's write.

    Between two kills the run gets at least one state further, so that it ends.
    """
    chance = random.Random(0)
    recipe = recipe or harness.DCGAN
    for number in range(kills):
        left = harness.Left.by(outdir)
        before = left.newest
        run = harness.start(outdir, "--resume", "auto", *flags, recipe=recipe)
        is_inside_write = number % 2 == 0
        if is_inside_write:
            has_hit = harness.wait_until(lambda: harness.is_writing_state(outdir), run)
            # Two times out of three somewhat later: the writing takes milliseconds.
            time.sleep(chance.choice((0, 0.001, 0.003)))
        else:
            has_hit = harness.wait_until(lambda before=before: harness.newest(outdir) > before, run)
            time.sleep(chance.uniform(0, 0.5))
        if not has_hit or run.process.poll() is not None:
            break  # it has come to its end before
        saved = harness.newest(outdir)
        victims = run.children()
        if victims and number % 4 == 1:  # one rank only; the others must end by themselves
            chance.choice(victims).send_signal(signal.SIGKILL)
            run.wait()
        else:
            run.kill_all()
        if "Continued at" in run.output:
            left.count_losses(counts, run)
        counts.faults += 1
        counts.files_lost += saved > 0 and saved not in harness.states(outdir)
    harness.go_on(outdir, counts, *flags, recipe=recipe)
    return harness.only_run(outdir)


def test_one_process(harness, counts, straight: Path, tmp_path: Path) -> None:
    """SIGKILL of a run of one process, half of them inside a checkpoint write."""
    while (before := counts.faults) < NUM_KILLS:  # a fast machine comes to the end of a run between two kills
        killed = kill_often(harness, counts, tmp_path / f"killed-{before}", NUM_KILLS - before)
        harness.assert_same_run(straight, killed)
        assert counts.faults > before


def test_two_processes(harness, counts, straight_pair: Path, tmp_path: Path) -> None:
    """SIGKILL of a run of two processes, or of one of them."""
    killed = kill_often(harness, counts, tmp_path / "killed", 6, "--gpus", "2")
    harness.assert_same_run(straight_pair, killed)
    assert counts.faults >= 4


def test_stylegan_xl(harness, counts, tmp_path: Path) -> None:
    """SIGKILL of a StyleGAN-XL run."""
    straight = harness.run_to_end(tmp_path / "straight", recipe=harness.STYLEGAN_XL)
    killed = kill_often(harness, counts, tmp_path / "killed", 4, recipe=harness.STYLEGAN_XL)
    harness.assert_same_run(straight, killed)
    assert counts.faults >= 2


def test_another_number_of_processes(harness, counts, tmp_path: Path) -> None:
    """SIGKILL, then going on with another number of processes."""
    outdir = tmp_path / "runs"
    run = harness.start_until_state(outdir)
    run.kill_all()
    counts.faults += 1
    saved = harness.newest(outdir)
    run = harness.go_on(outdir, counts, "--gpus", "2")
    lines = harness.stats_lines(harness.only_run(outdir))
    images = [line["cur_nimg"] for line in lines]
    assert images == sorted(set(images)) and images[-1] == 2608 and saved in images
    assert "the run had 1 processes and goes on with 2" in run.output
