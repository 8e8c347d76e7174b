# SPDX-License-Identifier: MIT
"""gen_images.py on tiny untrained networks: files, their contents, defaults, and errors of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import gen_images
from training.centroids import compute_centroids
from training.network_io import load_network
from training.sampling import latents_for_seed

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"


@pytest.fixture
def network(tmp_path, write_network):
    return write_network(tmp_path / "net.safetensors", c_dim=3)


def run(network, outdir, *arguments):
    """Run the command line; returns the sorted names of the files written."""
    command = ["--network", network, "--outdir", str(outdir), "--device", "cpu", *arguments]
    result = CliRunner().invoke(gen_images.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert str(outdir) in result.output
    return sorted(os.listdir(outdir))


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_default_is_ten_seeds_of_every_class_and_a_grid(network, tmp_path):
    out = tmp_path / "out"
    expected = [f"seed{seed:04d}_class{k:02d}.png" for seed in range(10) for k in range(3)]
    assert run(network, out) == ["grid.png", *expected]
    grid = pixels(out / "grid.png")
    assert grid.shape == (3 * 16, 10 * 16, 3)
    for seed, k in ((0, 0), (7, 2)):
        single = pixels(out / f"seed{seed:04d}_class{k:02d}.png")
        np.testing.assert_array_equal(grid[k * 16 : (k + 1) * 16, seed * 16 : (seed + 1) * 16], single)


def test_images_are_the_networks(network, tmp_path):
    assert run(network, tmp_path / "out", "--seeds", "5", "--class", "1", "--trunc", "0.5") == [
        "seed0005.png"
    ]
    z = latents_for_seed(5, 1, 4).float()
    with torch.no_grad():
        image = load_network(network)(z, torch.tensor([1]), truncation_psi=0.5)[0]
    expected = ((image + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy().astype(int)
    assert np.abs(pixels(tmp_path / "out" / "seed0005.png") - expected).max() <= 1


def test_truncation_cutoff_has_an_effect(network, tmp_path):
    common = ("--seeds", "0", "--class", "0", "--trunc", "0.2")
    run(network, tmp_path / "all", *common)
    run(network, tmp_path / "first", *common, "--trunc-cutoff", "1")
    assert (
        np.abs(pixels(tmp_path / "all" / "seed0000.png") - pixels(tmp_path / "first" / "seed0000.png")).max()
        > 1
    )


def test_class_list_and_grid_on_request(network, tmp_path):
    names = run(network, tmp_path / "out", "--seeds", "1,3-4", "--class", "0,2", "--grid")
    assert names == ["grid.png"] + [f"seed{s:04d}_class{k:02d}.png" for s in (1, 3, 4) for k in (0, 2)]
    assert pixels(tmp_path / "out" / "grid.png").shape == (2 * 16, 3 * 16, 3)


def test_grid_can_be_left_out(network, tmp_path):
    assert "grid.png" not in run(network, tmp_path / "out", "--seeds", "0", "--no-grid")


def test_several_samples_per_seed_are_tiled(network, tmp_path):
    run(network, tmp_path / "out", "--seeds", "0", "--class", "1", "--batch-sz", "5")
    assert pixels(tmp_path / "out" / "seed0000.png").shape == (2 * 16, 3 * 16, 3)


def test_many_classes_are_drawn_at_random(tmp_path, write_network):
    network = write_network(tmp_path / "net.safetensors", c_dim=21)
    assert run(network, tmp_path / "out", "--seeds", "0-2") == [f"seed{s:04d}.png" for s in range(3)]


def test_unconditional_grey_network(tmp_path, write_network):
    network = write_network(tmp_path / "net.safetensors", c_dim=0, img_channels=1)
    names = run(network, tmp_path / "out", "--seeds", "0-4", "--grid")
    assert names == ["grid.png"] + [f"seed{s:04d}.png" for s in range(5)]
    assert pixels(tmp_path / "out" / "grid.png").shape == (2 * 16, 3 * 16)


def test_files_of_the_same_name_are_overwritten_and_others_kept(network, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "seed0000.png").write_text("old")
    (out / "notes.txt").write_text("mine")
    assert run(network, out, "--seeds", "0", "--class", "0") == ["notes.txt", "seed0000.png"]
    assert pixels(out / "seed0000.png").shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "absent.safetensors"], "absent.safetensors does not exist"),
        (["--seeds", "1-x"], "'1-x' is not a list of numbers and ranges"),
        (["--class", "3"], "class 3 does not exist: the network has classes 0 to 2"),
        (["--class", "dog"], "class 'dog' is no index, and"),
        (["--device", "abacus"], "--device abacus is unknown"),
        (["--trunc", "nan"], "--trunc nan is not a number to scale by"),
        (["--translate", "1"], "--translate 1 is not two numbers; write for example"),
        (["--translate", "1,inf"], "--translate 1,inf is not two numbers"),
        (["--rotate", "inf"], "--rotate inf is not an angle"),
        (["--centroids-path", "absent.npy"], "--centroids-path absent.npy is not a file"),
        (["--centroids-path", "c.npy", "--centroids", "4"], "give one of the two"),
    ],
)
def test_errors_are_one_line(network, tmp_path, arguments, message, error_line):
    command = ("--network", network, "--outdir", tmp_path / "out", "--trunc", 0.5, *arguments)
    assert message in error_line(gen_images.main, *command)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made(network, tmp_path, error_line):
    (tmp_path / "file").write_text("")
    command = ("--network", network, "--outdir", tmp_path / "file" / "out")
    assert "cannot be made" in error_line(gen_images.main, *command)


def test_class_by_name(tmp_path, write_network):
    network = write_network(
        tmp_path / "net.safetensors", c_dim=3, info={"class_names": ["cat", "dog", "cow"]}
    )
    run(network, tmp_path / "name", "--seeds", "0", "--class", "dog")
    run(network, tmp_path / "index", "--seeds", "0", "--class", "1")
    run(network, tmp_path / "other", "--seeds", "0", "--class", "cow")
    np.testing.assert_array_equal(
        pixels(tmp_path / "name/seed0000.png"), pixels(tmp_path / "index/seed0000.png")
    )
    assert np.abs(pixels(tmp_path / "name/seed0000.png") - pixels(tmp_path / "other/seed0000.png")).max() > 1


def test_same_seed_and_class_whatever_the_batch(network, tmp_path):
    run(network, tmp_path / "one", "--seeds", "3", "--class", "2")
    run(network, tmp_path / "six", "--seeds", "3", "--class", "2", "--batch-sz", "6")
    one, six = pixels(tmp_path / "one" / "seed0003.png"), pixels(tmp_path / "six" / "seed0003.png")
    assert np.abs(six[:16, :16] - one).max() <= 1


def test_without_psi_every_seed_shows_the_mean(network, tmp_path):
    out = tmp_path / "out"
    run(network, out, "--seeds", "0-2", "--class", "1", "--trunc", "0")
    G = load_network(network)
    with torch.no_grad():
        mean = G.synthesis(G.mapping.w_avg[1].expand(1, G.num_ws, -1))[0]
    expected = ((mean + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy().astype(int)
    for seed in range(3):
        assert np.abs(pixels(out / f"seed{seed:04d}.png") - expected).max() <= 1


def test_moved_images(network, tmp_path):
    common = ("--seeds", "0", "--class", "0", "--noise-mode", "none")
    run(network, tmp_path / "still", *common)
    run(network, tmp_path / "zero", *common, "--translate", "0,0", "--rotate", "360")
    run(network, tmp_path / "moved", *common, "--translate", "0.25,0")
    run(network, tmp_path / "turned", *common, "--rotate", "-30")
    still, zero, moved, turned = (
        pixels(tmp_path / name / "seed0000.png") for name in ("still", "zero", "moved", "turned")
    )
    assert np.abs(still - zero).max() <= 1
    assert np.abs(still - moved).max() > 1 and np.abs(still - turned).max() > 1


def test_computed_centroids_are_kept_and_read(network, tmp_path, monkeypatch):
    monkeypatch.setattr(
        compute_centroids, "__kwdefaults__", {**compute_centroids.__kwdefaults__, "num_samples": 500}
    )
    common = ("--seeds", "0-3", "--class", "1", "--trunc", "0")
    names = run(network, tmp_path / "made", *common, "--centroids", "2")
    assert names == ["centroids.npy", *(f"seed{seed:04d}.png" for seed in range(4))]
    path = tmp_path / "made" / "centroids.npy"
    centroids = np.load(path)
    assert centroids.shape == (2, 8) and centroids.dtype == np.float32
    run(network, tmp_path / "read", *common, "--centroids-path", str(path))
    pictures = set()
    for seed in range(4):
        name = f"seed{seed:04d}.png"
        made = pixels(tmp_path / "made" / name)
        np.testing.assert_array_equal(made, pixels(tmp_path / "read" / name))
        pictures.add(made.tobytes())
    assert len(pictures) <= 2  # with psi 0 there are only the centroids to see


@pytest.mark.parametrize("centroids", [False, True])
def test_pixels_of_an_official_file(tmp_path, centroids):
    """Straight from the pickle, the recorded pictures of the official tool: 1 level off on at most 0.5 %."""
    golden = np.load(DATA / "g_inference.npz")
    meta = json.loads(str(golden["meta_json"]))
    np.save(tmp_path / "c.npy", golden["centroids"])
    arguments = ["--seeds", ",".join(map(str, meta["seeds"])), "--trunc", str(meta["psi"])]
    arguments += ["--class", str(meta["class_idx"])]
    arguments += ["--centroids-path", str(tmp_path / "c.npy")] if centroids else []
    run(str(DATA / meta["network"]), tmp_path / "out", *arguments)
    for seed in meta["seeds"]:
        expected = golden[f"seed{seed}/u8_{'multimodal' if centroids else 'unimodal'}"][0]
        difference = np.abs(pixels(tmp_path / "out" / f"seed{seed:04d}.png") - expected)
        assert difference.max() <= 1 and np.mean(difference > 0) <= 0.005


def test_as_a_program(network, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "gen_images.py"),
        "--outdir",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    done = subprocess.run([*command, "--network", network, "--seeds", "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "grid.png").exists()
    failed = subprocess.run([*command, "--network", "absent"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr and failed.stderr.startswith("Error: absent does not exist")
