# SPDX-License-Identifier: MIT
"""gen_video.py as its users run it: frames, classes, formats, errors before anything is rendered."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import gen_video
from training.centroids import compute_centroids
from training.network_io import load_network
from training.sampling import Truncation, to_uint8_metrics
from training.video import keyframe_ws

ROOT = Path(__file__).parents[2]


@pytest.fixture(name="network")
def conditional_network(tmp_path, write_network):
    names = {"class_names": ["ant", "bee", "cow"]}
    return write_network(tmp_path / "net.safetensors", c_dim=3, info=names)


def run(network, output, *arguments):
    command = ["--network", network, "--output", str(output), "--device", "cpu", *arguments]
    result = CliRunner().invoke(gen_video.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert re.search(rf"Wrote \d+ frames of \d+x\d+ pixels to {re.escape(str(output))}\n", result.output)


def frames_in(folder):
    return [np.asarray(Image.open(folder / name)).astype(int) for name in sorted(os.listdir(folder))]


def keyframe_pictures(network, seeds, classes, psi=1.0):
    G = load_network(network)
    with torch.no_grad():
        images = G.synthesis(keyframe_ws(G, seeds, classes, Truncation(psi)))
    return to_uint8_metrics(images).permute(0, 2, 3, 1).numpy().astype(int)


def test_frames_of_a_grid(network, tmp_path):
    run(
        network,
        tmp_path / "out",
        "--seeds",
        "0-3",
        "--grid",
        "2x1",
        "--w-frames",
        "3",
        "--class",
        "bee",
        "--trunc",
        "0.7",
    )
    frames = frames_in(tmp_path / "out")
    assert len(frames) == 2 * 3 and all(frame.shape == (16, 32, 3) for frame in frames)
    expected = keyframe_pictures(network, [0, 1, 2, 3], [1] * 4, 0.7)
    for keyframe in range(2):  # the first cell runs through seeds 0 and 1, the second through 2 and 3
        frame = frames[3 * keyframe]
        assert np.abs(frame[:, :16] - expected[keyframe]).max() <= 1
        assert np.abs(frame[:, 16:] - expected[2 + keyframe]).max() <= 1
    assert np.abs(frames[0] - frames[3]).max() > 1


def test_a_class_per_seed_and_shuffled_keyframes(network, tmp_path):
    seeds, classes = [5, 6, 7], [2, 0, 1]
    arguments = ("--seeds", "5-7", "--classes", "cow,0-1", "--w-frames", "1", "--num-keyframes", "6")
    run(network, tmp_path / "plain", *arguments)
    run(network, tmp_path / "shuffled", *arguments, "--shuffle-seed", "0")
    expected = keyframe_pictures(network, seeds, classes)
    for index, frame in enumerate(frames_in(tmp_path / "plain")):
        assert np.abs(frame - expected[index % 3]).max() <= 1
    positions = np.arange(6) % 3
    np.random.RandomState(0).shuffle(positions)
    assert positions.tolist() != [0, 1, 2, 0, 1, 2]
    for frame, position in zip(frames_in(tmp_path / "shuffled"), positions, strict=True):
        assert np.abs(frame - expected[position]).max() <= 1


def test_random_classes_and_replaced_gif(network, tmp_path):
    (tmp_path / "a.gif").write_text("old")
    run(network, tmp_path / "a.gif", "--seeds", "0,9", "--w-frames", "4", "--fps", "20")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 8 and image.size == (16, 16) and image.info["duration"] == 50


def test_mp4(network, tmp_path):
    av = pytest.importorskip("av")
    run(network, tmp_path / "new" / "a.mp4", "--seeds", "0-3", "--grid", "2x2", "--w-frames", "5")
    with av.open(str(tmp_path / "new" / "a.mp4")) as container:
        frames = list(container.decode(video=0))
        assert container.streams.video[0].average_rate == 60
    assert len(frames) == 5 and (frames[0].width, frames[0].height) == (32, 32)


def test_centroids_lie_beside_the_video(network, tmp_path, monkeypatch):
    monkeypatch.setattr(
        compute_centroids, "__kwdefaults__", {**compute_centroids.__kwdefaults__, "num_samples": 300}
    )
    run(network, tmp_path / "a.gif", "--seeds", "0", "--w-frames", "1", "--trunc", "0", "--centroids", "3")
    assert np.load(tmp_path / "a.centroids.npy").shape == (3, 8)
    path = str(tmp_path / "a.centroids.npy")
    run(
        network,
        tmp_path / "b.gif",
        "--seeds",
        "0",
        "--w-frames",
        "1",
        "--trunc",
        "0",
        "--centroids-path",
        path,
    )
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "absent.safetensors"], "absent.safetensors does not exist"),
        (["--output", "a.avi"], "--output a.avi: .avi cannot be written; end it with .mp4"),
        (["--seeds", "a"], "'a' is not a list of numbers and ranges"),
        (["--grid", "2"], "--grid 2 is not columns x rows; write for example 4x2"),
        (["--grid", "0x2"], "--grid 0x2 is not columns x rows"),
        (["--grid", "3x1"], "4 seeds do not fill 3 grid cells evenly"),
        (["--classes", "0-2"], "3 classes for 4 seeds; give one for all, or one for each seed"),
        (["--class", "3"], "class 3 does not exist: the network has classes 0 to 2"),
        (["--class", "cwo"], "did you mean 'cow'"),
        (["--trunc", "nan"], "--trunc nan is not a number to scale by"),
        (["--centroids-path", "absent.npy"], "absent.npy is not a file"),
        (["--device", "abacus"], "--device abacus is unknown"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    network, tmp_path, monkeypatch, arguments, message, error_line
):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    command = ("--network", network, "--output", "out.gif", "--seeds", "0-3", "--trunc", 0.5, *arguments)
    assert message in error_line(gen_video.main, *command)
    assert sorted(os.listdir()) == before


def test_as_a_program(tmp_path):
    output = tmp_path / "a.webp"
    command = [sys.executable, str(ROOT / "gen_video.py"), "--network", "digits", "--device", "cpu"]
    command += ["--seeds", "0-1", "--w-frames", "2", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(output) as image:
        assert image.n_frames == 4 and image.size == (16, 16)
