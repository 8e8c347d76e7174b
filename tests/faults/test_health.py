# SPDX-License-Identifier: MIT
"""Numbers that are not finite, networks that fail, memory that does not suffice: the run says what and what to do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from training.state_file import write_state

pytestmark = pytest.mark.slow
ABORTED, OUT_OF_MEMORY = 70, 71
EXPLODING = "--dlr", "1e30"
FAULT = r"(?:G|D) got a gradient that is not finite at [^\n]*parameters \((?:first )?\S+"


def test_not_finite(harness, rows, straight: Path, tmp_path: Path) -> None:
    """A learning rate with which D explodes, under each policy, then a sane one again."""
    outdir = tmp_path / "runs"
    harness.start_until_state(outdir).kill_all()
    saved = harness.newest(outdir)
    policies = {"skip": r"3 times in a row \(--nonfinite-limit\)", "rollback": "again after 3 rollbacks",
                "abort": "The states saved before are intact"}  # fmt: skip
    for policy, words in policies.items():
        counts = rows(f"Gradients become NaN, --on-nonfinite {policy}: exit code 70")
        run = harness.start(
            outdir, "--resume", "auto", *EXPLODING, "--on-nonfinite", policy, "--nonfinite-limit", "3"
        )
        assert run.wait() == ABORTED, run.output
        error = re.search(rf"^Error: ({FAULT}[^\n]*)", run.output, re.MULTILINE)
        assert error and re.search(words, error[1]) and "Traceback" not in run.output, run.output
        assert run.output.count("Going back to the state") == (3 if policy == "rollback" else 0)
        counts.faults += 1
        counts.steps_lost += (saved - harness.continued_at(run)) // 16
        assert harness.newest(outdir) == saved

    counts = rows("A weight of the newest state is NaN: exit code 70")
    path = harness.states(outdir)[saved]
    content = path.read_bytes()
    poison(path)
    run = harness.start(outdir, "--resume", "auto", "--nonfinite-limit", "3")
    assert run.wait() == ABORTED, run.output
    assert re.search(rf"^Error: {FAULT}", run.output, re.MULTILINE) and "Traceback" not in run.output, (
        run.output
    )
    counts.faults += 1
    path.write_bytes(content)

    harness.go_on(outdir, counts)
    harness.assert_same_run(straight, harness.only_run(outdir))


def poison(path: Path) -> None:
    """Put NaN into a weight of G in a state, and write the state with the hash that belongs to it."""
    state = torch.load(path, weights_only=True)
    weight = next(value for name, value in state["networks"]["G"].items() if name.endswith("weight"))
    weight.view(-1)[0] = float("nan")
    write_state(path, state)


def test_alike_images(counts, straight: Path) -> None:
    """A generator whose images are nearly alike is warned of."""
    counts.faults += 1
    assert re.search(
        r"Warning at [\d.]+ kimg: the images of G_ema differ .* only", (straight / "log.txt").read_text()
    )


def test_lack_of_memory(harness, counts, tmp_path: Path) -> None:
    """Memory does not suffice for a step: exit code 71 and advice instead of a trace."""
    recipe = [*harness.DCGAN]
    recipe[recipe.index("--batch") + 1] = "262144"
    command = ["bash", "-c", 'ulimit -v 6000000; exec "$0" "$@"', sys.executable]
    run = harness.start(tmp_path / "runs", recipe=recipe, command=command)
    assert run.wait() == OUT_OF_MEMORY, run.output
    (line,) = [line for line in run.output.splitlines() if line.startswith("Error: ")]
    assert "no memory left; lower --batch-gpu from 262144 to 131072" in line and "Traceback" not in run.output
    counts.faults += 1
