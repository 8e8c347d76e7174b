# SPDX-License-Identifier: MIT
"""dataset_tool.py as people call it: the official commands, inspect, errors of one line, a killed process."""

import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import dataset_tool
from training.dataset import open_dataset

ROOT = Path(__file__).parents[2]
OFFICIAL_FLAGS = ("--source", "--dest", "--max-images", "--transform", "--resolution")


def invoke(*arguments: object):
    return CliRunner().invoke(dataset_tool.main, [str(a) for a in arguments])


def rgb(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def photos(write_dataset) -> Path:
    return write_dataset("photos", {f"{c}/{i}.png": rgb(i, 20, 30) for c in ("cat", "dog") for i in range(3)})


def test_help_names_the_official_flags():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(flag in result.output for flag in OFFICIAL_FLAGS) and "inspect" in result.output


@pytest.mark.parametrize("size", ["16x16", "16,16", "16", "16X16"])
def test_official_command(photos, tmp_path, size):
    dest = tmp_path / "out.zip"
    result = invoke(
        f"--source={photos}",
        f"--dest={dest}",
        "--transform=center-crop",
        f"--resolution={size}",
        "--max-images=4",
    )
    assert result.exit_code == 0, result.output
    assert "4 images, 16x16 RGB" in result.output
    assert "none, so no --cond (--labels-from-folders would make 2 classes)" in result.output
    dataset = open_dataset(dest)
    assert (len(dataset), dataset.resolution) == (4, 16)


def test_from_class_folders_to_inspection(photos, tmp_path):
    dest = tmp_path / "out.zip"
    result = invoke("--source", photos, "--dest", dest, "--resolution", "16x16", "--labels-from-folders")
    assert result.exit_code == 0 and "2 classes with 3 images each" in result.output
    inspected = invoke("inspect", dest)
    assert inspected.exit_code == 0 and inspected.output.endswith("Usable for training.\n")
    content_hash = open_dataset(dest, use_labels=True).content_hash
    assert (
        f"content hash {content_hash}" in result.output and f"content hash {content_hash}" in inspected.output
    )


def test_inspection_of_what_cannot_be_used(photos, tmp_path):
    result = invoke("inspect", photos)
    assert result.exit_code == 1 and "Not usable for training." in result.output
    for path in (tmp_path / "nowhere", tmp_path):
        result = invoke("inspect", path / "x.zip")
        assert (
            result.exit_code == 1 and result.output.startswith("Error: ") and result.output.count("\n") == 1
        )


REFUSED = {
    "no source": ([], 2, "--source and --dest missing; or did you mean: dataset_tool.py inspect FILE"),
    "no dest": (["--source", "photos"], 2, "--dest missing"),
    "bad size": (
        ["--source", "photos", "--dest", "o.zip", "--resolution", "big"],
        1,
        "--resolution big is no size",
    ),
    "crop without size": (
        ["--source", "photos", "--dest", "o.zip", "--transform", "center-crop"],
        1,
        "needs the size",
    ),
    "missing source": (["--source", "nowhere", "--dest", "o.zip"], 1, "no such file or folder"),
    "strange crop": (["--source", "photos", "--dest", "o.zip", "--transform", "x"], 2, "center-crop-wide"),
    "no threads": (["--source", "photos", "--dest", "o.zip", "--threads", "0"], 2, "--threads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_write_nothing(photos, tmp_path, monkeypatch, case):
    arguments, exit_code, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == exit_code and isinstance(result.exception, SystemExit)
    assert message in result.output.splitlines()[-1] and "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_names_that_are_no_text(tmp_path):
    source = tmp_path / "src"
    (source / "ok").mkdir(parents=True)
    Image.fromarray(rgb(0)).save(source / "ok" / "a.png")
    try:
        Path(source, b"b\xff.png".decode("utf-8", "surrogateescape")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes valid names only")
    result = invoke("--source", source, "--dest", tmp_path / "o.zip")
    assert result.exit_code == 0 and "b\\udcff.png" in result.output


@pytest.mark.parametrize(("number", "dest"), [(signal.SIGTERM, "out.zip"), (signal.SIGINT, "out")])
def test_a_killed_process_leaves_nothing(tmp_path, number, dest):
    source = tmp_path / "src"
    source.mkdir()
    for i in range(4):
        Image.fromarray(rgb(i, 1500, 1500)).save(source / f"{i}.png")
    for i in range(4, 400):
        (source / f"{i}.png").symlink_to(source / f"{i % 4}.png")
    command = [
        sys.executable,
        str(ROOT / "dataset_tool.py"),
        "--source",
        str(source),
        "--dest",
        str(tmp_path / dest),
    ]
    process = subprocess.Popen(
        [*command, "--resolution", "1024"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs inherit "ignore"
    )
    deadline = time.time() + 60
    while not list(tmp_path.glob(f".{dest}.*.tmp")) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert process.poll() is None, "it was done before it could be interrupted"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == f"Error: interrupted; {tmp_path / dest} was not written"
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_an_official_zip_goes_round(photos, tmp_path):
    """What one import wrote is a source of the next, with labels and class names."""
    first, second = tmp_path / "first.zip", tmp_path / "second"
    assert (
        invoke("--source", photos, "--dest", first, "--resolution", "16", "--labels-from-folders").exit_code
        == 0
    )
    assert invoke("--source", first, "--dest", second, "--resolution", "8").exit_code == 0
    dataset = open_dataset(second, use_labels=True)
    assert (dataset.class_names, dataset.resolution) == (("cat", "dog"), 8)
    with zipfile.ZipFile(first) as archive:
        assert json.loads(archive.read("dataset.json")) == json.loads((second / "dataset.json").read_text())
