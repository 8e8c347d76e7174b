# SPDX-License-Identifier: MIT
"""gen_images.py on tiny untrained networks: files, their contents, defaults, and errors of one line."""

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
from training.config import GeneratorConfig, MappingConfig, SynthesisConfig
from training.generator.generator import Generator
from training.network_io import load_network, save_network
from training.sampling import latents_for_seed

ROOT = Path(__file__).parents[2]


def write_network(path, c_dim, img_channels=3):
    torch.manual_seed(1)
    mapping = MappingConfig(z_dim=4, w_dim=8, c_dim=c_dim, num_embeddings=max(c_dim, 1), embedding_dim=6)
    synthesis = SynthesisConfig(
        img_resolution=16, img_channels=img_channels, channel_max=6, num_layers=4, margin_size=2
    )
    G = Generator(GeneratorConfig(mapping=mapping, synthesis=synthesis))
    G.mapping.w_avg.normal_()
    save_network(path, G)
    return str(path)


@pytest.fixture
def network(tmp_path):
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


def test_many_classes_are_drawn_at_random(tmp_path):
    network = write_network(tmp_path / "net.safetensors", c_dim=21)
    assert run(network, tmp_path / "out", "--seeds", "0-2") == [f"seed{s:04d}.png" for s in range(3)]


def test_unconditional_grey_network(tmp_path):
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
        (["--network", "net.pkl"], "later release"),
        (["--seeds", "1-x"], "'1-x' is not a list of numbers and ranges"),
        (["--class", "3"], "class 3 does not exist: the network has classes 0 to 2"),
        (["--device", "abacus"], "--device abacus is unknown"),
    ],
)
def test_errors_are_one_line(network, tmp_path, arguments, message):
    command = ["--network", network, "--outdir", str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(gen_images.main, command)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made(network, tmp_path):
    (tmp_path / "file").write_text("")
    command = ["--network", network, "--outdir", str(tmp_path / "file" / "out")]
    result = CliRunner().invoke(gen_images.main, command)
    assert result.exit_code == 1 and "cannot be made" in result.output


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
