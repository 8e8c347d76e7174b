# SPDX-License-Identifier: MIT
"""gen_class_samplesheet.py as its users run it: sheets, their layout, classes, errors before anything is written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import gen_class_samplesheet
from training.centroids import compute_centroids
from training.network_io import load_network
from training.sampling import Truncation, images_for_seed

ROOT = Path(__file__).parents[2]


@pytest.fixture(name="network")
def conditional_network(tmp_path, write_network):
    names = {"class_names": ["ant", "bee", "cow", "dog", "eel"]}
    return write_network(tmp_path / "net.safetensors", c_dim=5, info=names)


def run(network, outdir, *arguments):
    """Run the command line; returns the folder it names."""
    command = ["--network", network, "--outdir", str(outdir), "--device", "cpu", *arguments]
    result = CliRunner().invoke(gen_class_samplesheet.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Path(re.search(r"Wrote \d+ sheets? of .* to (.*)\n", result.output)[1])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def cell(sheet, row, column):
    return sheet[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]


def test_all_classes_side_by_side(network, tmp_path):
    folder = run(network, tmp_path / "out")
    assert folder == tmp_path / "out" / "00000-net-trunc1"
    assert os.listdir(folder) == ["sheet.png"]
    assert pixels(folder / "sheet.png").shape == (16, 5 * 4 * 16, 3)  # all in one row: less than 32


def test_a_sheet_holds_what_gen_images_draws(network, tmp_path):
    arguments = ("--classes", "eel,0-1", "--samples-per-class", "3", "--grid-width", "8", "--batch-gpu", "4")
    sheet = pixels(run(network, tmp_path, *arguments, "--trunc", "0.6") / "sheet.png")
    assert sheet.shape == (2 * 16, 6 * 16, 3)  # 8 is reduced to 6: two classes per row
    images = images_for_seed(load_network(network), 42, 3, [4, 0, 1], Truncation(0.6)).flatten(0, 1)
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy().astype(int)):
        assert np.abs(cell(sheet, *divmod(index, 6)) - image).max() <= 1
    assert not sheet[16:, 3 * 16 :].any()


def test_more_samples_than_the_width(network, tmp_path):
    folder = run(network, tmp_path, "--classes", "0,1", "--samples-per-class", "5", "--grid-width", "3")
    assert pixels(folder / "sheet.png").shape == (2 * 16, 5 * 16, 3)  # a class per row


def test_sheet_per_seed_in_a_new_folder(network, tmp_path):
    first = run(network, tmp_path / "out", "--seeds", "3,42", "--desc", "my sheets")
    second = run(network, tmp_path / "out")
    assert first.name == "00000-net-trunc1-my_sheets" and second.name == "00001-net-trunc1"
    assert sorted(os.listdir(first)) == ["sheet_seed0003.png", "sheet_seed0042.png"]
    same, other = pixels(first / "sheet_seed0042.png"), pixels(first / "sheet_seed0003.png")
    np.testing.assert_array_equal(same, pixels(second / "sheet.png"))
    assert np.abs(same - other).max() > 1


def test_unconditional_grey_network(tmp_path, write_network):
    network = write_network(tmp_path / "net.safetensors", c_dim=0, img_channels=1)
    folder = run(network, tmp_path / "out", "--samples-per-class", "6")
    assert pixels(folder / "sheet.png").shape == (16, 6 * 16)


def test_centroids_of_the_classes_shown(network, tmp_path, monkeypatch):
    monkeypatch.setattr(
        compute_centroids, "__kwdefaults__", {**compute_centroids.__kwdefaults__, "num_samples": 300}
    )
    arguments = ("--classes", "1-2", "--trunc", "0.5")
    made = run(network, tmp_path / "out", *arguments, "--centroids", "4")
    assert sorted(os.listdir(made)) == ["centroids.npy", "sheet.png"]
    expected = compute_centroids(load_network(network), 4, classes=[1, 2])
    np.testing.assert_array_equal(np.load(made / "centroids.npy"), expected)
    read = run(network, tmp_path / "out", *arguments, "--centroids-path", str(made / "centroids.npy"))
    np.testing.assert_array_equal(pixels(made / "sheet.png"), pixels(read / "sheet.png"))
    unimodal = run(network, tmp_path / "out", *arguments)
    assert np.abs(pixels(made / "sheet.png") - pixels(unimodal / "sheet.png")).max() > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "absent.safetensors"], "absent.safetensors does not exist"),
        (["--seed", "x"], "'x' is not a list of numbers and ranges"),
        (["--classes", "5"], "class 5 does not exist: the network has classes 0 to 4"),
        (["--classes", "beee"], "did you mean 'bee'"),
        (["--trunc", "inf"], "--trunc inf is not a number to scale by"),
        (["--samples-per-class", "1000000"], "more than one sheet can hold (4194304); give fewer --classes"),
        (["--centroids-path", "absent.npy"], "absent.npy is not a file"),
        (["--device", "abacus"], "--device abacus is unknown"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(network, tmp_path, arguments, message, error_line):
    command = ("--network", network, "--outdir", tmp_path / "out", "--trunc", 0.5, *arguments)
    assert message in error_line(gen_class_samplesheet.main, *command)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made(network, tmp_path, error_line):
    (tmp_path / "file").write_text("")
    outdir = tmp_path / "file" / "out"
    assert "choose another" in error_line(
        gen_class_samplesheet.main, "--network", network, "--outdir", outdir
    )


def test_as_a_program(tmp_path):
    command = [sys.executable, str(ROOT / "gen_class_samplesheet.py"), "--outdir", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--network", "digits", "--device", "cpu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sheet = pixels(tmp_path / "out" / "00000-digits-trunc1" / "sheet.png")
    assert sheet.shape == (2 * 16, 32 * 16, 3) and sheet.max() > 200
