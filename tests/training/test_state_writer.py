# SPDX-License-Identifier: MIT
"""States written in the background: what is kept, and every fault of a file system, which the run survives."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from training import state_file, state_writer
from training.state_file import FORMAT, VERSION, find_damage, find_state, list_states, load_state, state_path
from training.state_writer import StateWriter

ROOT = Path(__file__).parents[2]


def make_state(value: float = 1.0, numel: int = 1000) -> dict[str, object]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "x": {0: torch.full((numel,), value)},
        "l": [torch.tensor(value)],
    }


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_last_states_are_kept(tmp_path: Path) -> None:
    warnings: list[str] = []
    writer = StateWriter(tmp_path, keep_last=2, warn=warnings.append)
    for nimg in (8, 16, 24, 32):
        writer.submit(nimg, make_state(nimg))
    writer.finish()
    assert names(tmp_path) == ["state-000000024.pt", "state-000000032.pt"]
    assert warnings == [] and writer.saved_nimg == 32
    assert load_state(state_path(tmp_path, 32))["x"][0][0] == 32
    with pytest.raises(ValueError, match="keep_last=0"):
        StateWriter(tmp_path, keep_last=0)


def test_training_may_change_tensors_as_soon_as_a_state_is_submitted(tmp_path: Path, monkeypatch) -> None:
    is_copied, plain_write = threading.Event(), state_writer.write_state

    def wait_and_write(path: Path, state: dict) -> None:
        assert is_copied.wait(10)
        plain_write(path, state)

    monkeypatch.setattr(state_writer, "write_state", wait_and_write)
    writer, state = StateWriter(tmp_path, 2), make_state(1.0)
    writer.submit(8, state)
    assert names(tmp_path) == []  # it has not waited for the disk
    state["x"][0].fill_(2.0)
    is_copied.set()
    writer.finish()
    assert (load_state(state_path(tmp_path, 8))["x"][0] == 1).all()


def test_buffers_are_used_again_and_follow_shapes(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, 9)
    writer.submit(1, make_state(1.0))
    first = writer._buffers["/x/0"].data_ptr()
    writer.submit(2, make_state(2.0))
    assert writer._buffers["/x/0"].data_ptr() == first
    writer.submit(3, make_state(3.0, numel=7))
    writer.finish()
    for nimg in (1, 2, 3):
        x = load_state(state_path(tmp_path, nimg))["x"][0]
        assert (x == nimg).all() and len(x) == (7 if nimg == 3 else 1000)


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_copied_before_submit_returns(tmp_path: Path) -> None:
    writer, state = StateWriter(tmp_path, 2), {"format": FORMAT, "version": VERSION}
    state["x"] = torch.ones(1 << 24, device="cuda")
    state["y"] = torch.ones(64, 32, device="cuda").t()
    for nimg in (8, 16):
        writer.submit(nimg, state)
        state["x"].add_(1)
    writer.finish()
    assert writer._buffers["/x"].is_pinned()
    for nimg, value in ((8, 1), (16, 2)):
        stored = load_state(state_path(tmp_path, nimg))
        assert (stored["x"] == value).all() and stored["x"].device.type == "cpu"
        assert stored["y"].shape == (32, 64)


# Faults.


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("os.replace", errno.ESTALE),  # as over NFS
        ("os.fsync", errno.ENOSPC),
        ("os.fsync", errno.EIO),
        ("torch.save", errno.ENOSPC),
        ("tempfile.mkstemp", errno.EROFS),
        ("tempfile.mkstemp", errno.EACCES),
    ],
)
def test_the_run_goes_on_when_the_disk_refuses(tmp_path: Path, monkeypatch, place: str, code: int) -> None:
    warnings: list[str] = []
    writer = StateWriter(tmp_path, keep_last=1, warn=warnings.append)
    writer.submit(8, make_state(8))
    writer.finish()

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(f"{state_file.__name__}.torch.save" if place == "torch.save" else place, refuse)
        writer.submit(16, make_state(16))
        writer._thread.join()
        assert warnings == []  # told by the main thread only
        writer.poll()
    (warning,) = warnings
    assert os.strerror(code) in warning and "at 0.008 kimg, is intact" in warning and "\n" not in warning
    assert names(tmp_path) == ["state-000000008.pt"] and find_damage(state_path(tmp_path, 8)) is None
    writer.submit(24, make_state(24))  # the next attempt works
    writer.finish()
    assert names(tmp_path) == ["state-000000024.pt"] and len(warnings) == 1


def test_a_disk_that_gives_back_something_else_is_noticed(tmp_path: Path, monkeypatch) -> None:
    warnings: list[str] = []
    writer = StateWriter(tmp_path, keep_last=1, warn=warnings.append)
    writer.submit(8, make_state())
    writer.finish()

    def flip_a_bit(handle: int) -> None:
        os.pwrite(handle, bytes([os.pread(handle, 1, 2000)[0] ^ 1]), 2000)

    plain_open = open
    monkeypatch.setattr(state_file, "_drop_from_cache", flip_a_bit)
    monkeypatch.setattr(
        state_file, "open", lambda p, mode: plain_open(p, "wb+" if mode == "wb" else mode), raising=False
    )
    writer.submit(16, make_state())
    writer.finish()
    assert len(warnings) == 1 and "does not fit its SHA-256" in warnings[0]
    assert names(tmp_path) == ["state-000000008.pt"] and writer.saved_nimg == 8


def test_too_little_space_is_said_at_once(tmp_path: Path, monkeypatch) -> None:
    warnings: list[str] = []
    writer = StateWriter(tmp_path, keep_last=1, warn=warnings.append)
    usage = state_writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(state_writer.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    writer.submit(8, make_state())
    assert writer._thread is None and names(tmp_path) == []
    (warning,) = warnings
    assert "no state is saved at 0.008 kimg" in warning and "There is no earlier one" in warning


def test_a_disk_that_really_is_full(small_disk: Path, monkeypatch) -> None:
    warnings: list[str] = []
    writer = StateWriter(small_disk, keep_last=1, warn=warnings.append)
    writer.submit(8, make_state(8, numel=100_000))
    writer.submit(16, make_state(16, numel=200_000))  # 0.8 MiB: clearly too much
    assert len(warnings) == 1 and "no state is saved at 0.016 kimg" in warnings[0]
    monkeypatch.setattr(writer, "_has_space", lambda *args: True)
    writer.submit(16, make_state(16, numel=200_000))  # fails in the middle of writing
    writer.finish()
    assert len(warnings) == 2 and "No space left on device" in warnings[1]
    assert names(small_disk) == ["state-000000008.pt"] and find_damage(state_path(small_disk, 8)) is None


def test_a_disk_that_really_is_read_only(small_disk: Path) -> None:
    warnings: list[str] = []
    writer = StateWriter(small_disk, keep_last=1, warn=warnings.append)
    writer.submit(8, make_state(8))
    writer.finish()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    StateWriter(small_disk, keep_last=1, warn=warnings.append)
    writer.submit(16, make_state(16))
    writer.finish()
    assert len(warnings) == 1 and "Read-only file system" in warnings[0]
    assert find_damage(state_path(small_disk, 8)) is None


# What earlier processes have left.


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".state-000000016.pt.abc.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"not ours")
    StateWriter(tmp_path, 1)
    assert names(tmp_path) == ["notes.tmp"]


def test_states_of_steps_that_are_trained_again_go_with_the_first_new_one(tmp_path: Path) -> None:
    notes: list[str] = []
    writer = StateWriter(tmp_path, keep_last=2, warn=notes.append)
    for nimg in (8, 16):
        writer.submit(nimg, make_state(nimg))
    writer.finish()
    state_path(tmp_path, 24).write_bytes(b"damaged")
    writer = StateWriter(tmp_path, keep_last=2, warn=notes.append, saved_nimg=16)
    assert "state-000000024.pt" in names(tmp_path)
    writer.submit(20, make_state(20))
    writer.finish()
    assert list(list_states(tmp_path)) == [20, 16]
    assert len(notes) == 1 and "state-000000024.pt" in notes[0]


PROGRAM = """
import sys, torch
from pathlib import Path
from training.state_file import FORMAT, VERSION
from training.state_writer import StateWriter
torch.set_num_threads(1)
writer, nimg = StateWriter(Path(sys.argv[1]), keep_last=2), int(sys.argv[2])
while True:
    nimg += 1
    x = torch.full((500_000,), float(nimg))
    writer.submit(nimg, {"format": FORMAT, "version": VERSION, "nimg": nimg, "x": x})
    if writer.saved_nimg is not None:
        print(writer.saved_nimg, flush=True)
"""


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path: Path, num_kills: int) -> None:
    """Whenever a process is killed, a state is found that is whole and at least as new as the last one reported."""
    rng, folder, nimg = random.Random(0), tmp_path / "checkpoints", 0
    for _ in range(num_kills):
        command = [sys.executable, "-c", PROGRAM, str(folder), str(nimg)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        reported = int(process.stdout.readline())  # it writes without a pause from now on
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.stdout.read().split())])
        process.wait()
        warnings: list[str] = []
        state = load_state(find_state(tmp_path, warnings.append))
        assert warnings == []  # not even a damaged one was left
        assert state["nimg"] >= reported > nimg and (state["x"] == state["nimg"]).all()
        nimg = state["nimg"]
    StateWriter(folder, keep_last=2)
    assert not [name for name in names(folder) if name.endswith(".tmp")] and len(names(folder)) <= 3
