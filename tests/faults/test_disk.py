# SPDX-License-Identifier: MIT
"""Disks that fill, folders that refuse, files that are damaged: the last good state stays and is gone on from."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
USER_ERROR = 1


@pytest.mark.parametrize("small_disk", ["4m"], indirect=True)
def test_full_disk(harness, counts, straight: Path, small_disk: Path) -> None:
    """The disk fills during a run, which ends with warnings; with room again it goes on from the last good state."""
    run = harness.start_until_state(small_disk)
    fill(small_disk / "ballast")
    counts.faults += 1
    left = harness.Left.by(small_disk)
    assert run.wait() == 0, run.output
    assert "Warning" in run.output and "is intact" in run.output and "Traceback" not in run.output
    assert harness.newest(small_disk) == left.newest < 2608
    counts.files_lost += len(left.files - harness.Left.by(small_disk).files)
    (small_disk / "ballast").unlink()
    harness.go_on(small_disk, counts)
    harness.assert_same_run(straight, harness.only_run(small_disk))


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def permission_bound() -> list[str]:
    """What starts a Python that file permissions bind; root's passes by them otherwise."""
    if os.getuid() != 0:
        return [sys.executable]
    if shutil.which("setpriv") is None:
        pytest.skip("root can write everywhere here, and there is no setpriv command")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", sys.executable]


def test_refusing_folder(harness, rows, straight: Path, tmp_path: Path) -> None:
    """A run in a folder that cannot be written at some checkpoints."""
    outdir, command = tmp_path / "runs", permission_bound()
    counts = rows("A state cannot be renamed to its place: the run goes on")
    run = harness.start(outdir, "--resume", "auto", command=command)
    assert harness.wait_until(lambda: "Training on" in run.output, run)
    folder = harness.only_run(outdir) / "checkpoints"
    obstacle = folder / "state-000000784.pt"
    obstacle.mkdir(parents=True)
    (obstacle / "something").touch()
    assert harness.wait_until(lambda: max(set(harness.states(outdir)) - {784}, default=0) > 784, run), (
        run.output
    )
    counts.faults += 1
    assert f"Warning: {obstacle} could not be written" in run.output
    counts.files_lost += sum(str(path) == str(obstacle) for path in folder.iterdir()) - 1
    shutil.rmtree(obstacle)

    counts = rows("The run folder becomes read-only: the run goes on")
    left = harness.Left.by(outdir)
    for path in (folder, folder.parent):
        path.chmod(0o555)
    try:
        assert run.wait() == 0, run.output
    finally:
        for path in (folder, folder.parent):
            path.chmod(0o755)
    counts.faults += 1
    assert "Permission denied" in run.output and "is intact" in run.output and "Traceback" not in run.output
    assert harness.newest(outdir) < 2608
    counts.files_lost += len(left.files - harness.Left.by(outdir).files)
    harness.go_on(outdir, counts)
    harness.assert_same_run(straight, harness.only_run(outdir))


def flip_a_bit(path: Path) -> None:
    with open(path, "rb+") as file:
        place = path.stat().st_size // 2
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def train_some(harness, outdir: Path):
    """Train until there are two states more, then SIGKILL; returns the run."""
    before = harness.newest(outdir)
    run = harness.start(outdir, "--resume", "auto", "--keep-last", "3")
    assert harness.wait_until(lambda: sum(nimg > before for nimg in harness.states(outdir)) >= 2, run), (
        run.output
    )
    run.kill_all()
    return run


def test_damaged_states(harness, rows, straight: Path, tmp_path: Path) -> None:
    """The newest state is damaged before a run goes on."""
    outdir = tmp_path / "runs"
    faults = {"A bit of the newest state is flipped": flip_a_bit, "The newest state is truncated": truncate,
              "The newest state is deleted": Path.unlink}  # fmt: skip
    train_some(harness, outdir)
    for title, damage in faults.items():
        counts = rows(f"{title}: the one before is used")
        newest, second = sorted(harness.states(outdir), reverse=True)[:2]
        damage(harness.states(outdir)[newest])
        run = train_some(harness, outdir)
        counts.faults += 1
        counts.steps_lost += (second - harness.continued_at(run)) // 16
        assert damage is Path.unlink or f"state-{newest:09d}.pt is damaged" in run.output

    counts = rows("The last line of stats.jsonl is torn")
    stats = harness.only_run(outdir) / "stats.jsonl"
    text = stats.read_bytes().rstrip(b"\n")
    stats.write_bytes(text[: -len(text.splitlines()[-1]) // 2])
    counts.faults += 1
    harness.go_on(outdir, counts)
    # The line that was torn is lost unless it is of steps that were trained again; every other one is there.
    lines, expected = harness.stats_lines(stats.parent), harness.stats_lines(straight)
    assert [line for line in expected if line in lines] == lines and len(lines) >= len(expected) - 1
    assert list(harness.differences(harness.last_state(straight), harness.last_state(stats.parent))) == []


def test_missing_logs(harness, counts, straight: Path, tmp_path: Path) -> None:
    """log.txt and stats.jsonl are deleted before a run goes on: new ones begin there."""
    outdir = tmp_path / "runs"
    run = harness.start_until_state(outdir)
    run.kill_all()
    run_dir, saved = harness.only_run(outdir), harness.newest(outdir)
    for name in ("log.txt", "stats.jsonl"):
        (run_dir / name).unlink()
        counts.faults += 1
    harness.go_on(outdir, counts)
    expected = [line for line in harness.stats_lines(straight) if line["cur_nimg"] > saved]
    assert harness.stats_lines(run_dir) == expected
    assert "Continued at" in (run_dir / "log.txt").read_text()
    assert list(harness.differences(harness.last_state(straight), harness.last_state(run_dir))) == []


def refuse(harness, outdir: Path, *words: str) -> None:
    """A start ends with a mistake of the user that is told in one line, and changes nothing."""
    before = contents(outdir)
    run = harness.start(outdir, "--resume", "auto")
    assert run.wait(harness.DOWN_S) == USER_ERROR, run.output
    (line,) = [line for line in run.output.splitlines() if line.startswith("Error: ")]
    assert all(word in line for word in words) and "Traceback" not in run.output
    assert before is None or contents(outdir) == before


def contents(outdir: Path) -> dict[str, int]:
    """Every file's name and time of change; hidden ones are locks."""
    return {str(path): path.stat().st_mtime_ns for path in outdir.rglob("[!.]*") if path.is_file()}


def test_refused_starts(harness, rows, straight: Path, tmp_path: Path) -> None:
    """Starts that would do harm are refused."""
    outdir = tmp_path / "runs"
    counts = rows("A second run in the same folder: refused, the first goes on")
    run = harness.start_until_state(outdir)
    run.process.send_signal(signal.SIGSTOP)  # it must not end meanwhile
    refuse(harness, outdir, "another process trains in this folder")
    counts.faults += 1
    run.process.send_signal(signal.SIGCONT)
    run.kill_all()

    version = rows("States of another format version: refused by name")
    kept = {path: path.read_bytes() for path in harness.states(outdir).values()}
    for path in kept:
        rewrite_version(path)
    refuse(harness, outdir, "has state format 99", str(max(kept)))
    version.faults += 1
    for path, content in kept.items():
        path.write_bytes(content)

    settings = rows("training_options.json is torn: refused, or its whole command given again")
    run_dir = harness.only_run(outdir)
    truncate(run_dir / "training_options.json")
    settings.faults += 1
    harness.go_on(outdir, settings)
    assert json.loads((run_dir / "training_options.json").read_text())
    harness.assert_same_run(straight, run_dir)


def rewrite_version(path: Path) -> None:
    """Give a state another format version, with the hash that belongs to it."""
    script = (
        "import sys, pathlib, torch; from training.state_file import write_state; path = pathlib.Path(sys.argv[1]); "
        "state = torch.load(path, weights_only=True); write_state(path, {**state, 'version': 99})"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
