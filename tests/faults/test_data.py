# SPDX-License-Identifier: MIT
"""Training images that are damaged, replaced or lost on the way, and the processes that load them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from training.data_loader import InfiniteSampler
from training.dataset import IN_MEMORY_BYTES

pytestmark = pytest.mark.slow
USER_ERROR = 1
SIDE, COPIES = 64, 13  # so that they do not fit into memory: those that do are read once, before training


def png(scan: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((scan * 15).astype(np.uint8)).resize((SIDE, SIDE)).convert("RGB").save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The digits as PNG files with their labels, by name in the set, each many times."""
    scans = load_digits()
    originals = [png(scan) for scan in scans.images]
    images = {f"{i:05d}.png": originals[i % len(originals)] for i in range(COPIES * len(originals))}
    assert len(images) * 3 * SIDE**2 > IN_MEMORY_BYTES
    labels = list(zip(images, scans.target.tolist() * COPIES, strict=True))
    return {**images, "dataset.json": json.dumps({"labels": labels}).encode()}


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def images(files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip of them. It must not be changed."""
    return write_zip(tmp_path_factory.mktemp("data") / "images.zip", files)


@pytest.fixture(scope="module")
def straight_zip(harness, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on the zip without a fault."""
    return harness.run_to_end(
        tmp_path_factory.mktemp("straight_zip"), "--data", str(images), "--workers", "2"
    )


def overwrite(path: Path, start: int, size: int) -> None:
    with open(path, "rb+") as file:
        file.seek(start)
        file.write(bytes(size))


def test_damaged_members(harness, counts, files, tmp_path: Path) -> None:
    """Members of the zip are overwritten or truncated: each is named once and replaced, the run goes on."""
    shown = islice(InfiniteSampler(len(files) - 1), 2608)
    damaged = sorted({f"{i:05d}.png" for i in islice(shown, 100, None, 300)})
    halved = {name: files[name][: len(files[name]) // 2] for name in damaged[::2]}
    path = write_zip(tmp_path / "damaged.zip", {**files, **halved})
    with zipfile.ZipFile(path) as archive:
        places = [archive.getinfo(name).header_offset + 30 + len(name) for name in damaged[1::2]]
    for place in places:
        overwrite(path, place + 20, 40)
    counts.faults += len(damaged)
    run = harness.start(tmp_path / "runs", "--data", str(path), "--workers", "2")
    assert run.wait() == 0 and "Traceback" not in run.output, run.output
    named = re.findall(r"Warning: [^\n]*(\d{5}\.png)[^\n]*a neighbour in the data set is shown", run.output)
    assert sorted(named) == damaged


def test_zip_in_use(harness, rows, images: Path, straight_zip: Path, tmp_path: Path) -> None:
    """One run on a zip, hurt three times."""
    outdir, path = tmp_path / "runs", tmp_path / "images.zip"
    shutil.copyfile(images, path)
    flags = "--data", str(path), "--workers", "2"

    counts = rows("SIGKILL of a data loader process: the run goes on, no image is left out")
    run = harness.start_until_state(outdir, *flags)
    run.children()[0].kill()
    counts.faults += 1
    before = harness.newest(outdir)
    assert harness.wait_until(lambda: harness.newest(outdir) > before, run), run.output
    assert "a data loader process was lost" in run.output

    counts = rows("All images of the zip are overwritten during a run: it ends, its states are good")
    with zipfile.ZipFile(path) as archive:
        overwrite(path, 0, archive.start_dir)
    left = harness.Left.by(outdir)
    assert run.wait(harness.DOWN_S) == USER_ERROR, run.output
    assert "Traceback" not in run.output and re.search(
        r"^Error: [^\n]*(cannot be read|not readable)", run.output, re.MULTILINE
    )
    counts.faults += 1
    assert harness.newest(outdir) >= left.newest

    replaced = rows("The zip has other content when the run is to go on: refused")
    with zipfile.ZipFile(images) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    write_zip(path, {**contents, "00000.png": contents["00001.png"]})
    other = harness.start(outdir, "--resume", "auto", *flags)
    assert other.wait(harness.DOWN_S) == USER_ERROR and "other content" in other.output, other.output
    replaced.faults += 1

    shutil.copyfile(images, path)
    harness.go_on(outdir, counts, *flags)
    assert_same_training(harness, straight_zip, harness.only_run(outdir))


def assert_same_training(harness, run_dir: Path, other: Path) -> None:
    """Networks, optimizers and logs are equal bit for bit; the path of the data is not."""
    ours, theirs = (
        {name: harness.last_state(path)[name] for name in ("networks", "optimizers", "data")}
        for path in (run_dir, other)
    )
    assert list(harness.differences(ours, theirs)) == []
    assert harness.stats_lines(run_dir) == harness.stats_lines(other)


def test_broken_copy(harness, counts, files, straight_zip: Path, tmp_path: Path) -> None:
    """SIGKILL while --cache-data copies the images: they are copied anew."""
    folder, cache, outdir = tmp_path / "images", tmp_path / "cache", tmp_path / "runs"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    flags = "--data", str(folder), "--cache-data", str(cache), "--workers", "2"
    run = harness.start(outdir, *flags)
    assert harness.wait_until(lambda: any(cache.glob("*/.*.tmp")), run), run.output
    run.process.send_signal(signal.SIGKILL)
    run.wait()
    counts.faults += 1
    assert not any(cache.glob("*/complete.json"))
    harness.go_on(outdir, counts, *flags)
    (copy,) = cache.glob("*/*.zip")
    with zipfile.ZipFile(copy) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
    assert not any(cache.glob("*/.*.tmp")) and len(os.listdir(folder)) == len(files)
    assert_same_training(harness, straight_zip, harness.only_run(outdir))
