# SPDX-License-Identifier: MIT
"""Sample grids: the official choice and picture (d_data.npz), the rule for few classes, and the writing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import image_grid
from training.image_grid import default_grid_size, plan_grid, save_image_grid, select_grid_items

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_data.npz")
LABELS = np.array([3, 0, 3, 1])  # of the data set behind the golden grids


@pytest.mark.parametrize(("case", "c_dim"), [("grid_labels", 4), ("grid_nolabels", 0)])
def test_choice_matches_golden(case, c_dim):
    indices = select_grid_items(LABELS, c_dim, (4, 3))
    assert indices.tolist() == GOLDEN[case + "/indices"].tolist()
    if c_dim:
        assert LABELS[indices].tolist() == GOLDEN[case + "/labels"].argmax(axis=1).tolist()
    assert default_grid_size(16) == tuple(GOLDEN[case + "/default_size"])


def test_choice_takes_new_items_when_a_class_comes_round_again():
    labels = np.repeat([5, 9], 8)
    rows = select_grid_items(labels, 10, (3, 4)).reshape(4, 3)
    assert labels[rows].tolist() == [[5] * 3, [9] * 3, [5] * 3, [9] * 3]
    assert len(set(rows[[0, 2]].ravel())) == 6 and len(set(rows[[1, 3]].ravel())) == 6


@pytest.mark.parametrize(
    ("resolution", "expected"), [(4, (32, 32)), (256, (30, 16)), (1024, (7, 4)), (4096, (7, 4))]
)
def test_default_size(resolution, expected):
    assert default_grid_size(resolution) == expected


def test_few_classes_get_one_row_each():
    labels = np.arange(200) % 10
    plan = plan_grid(labels, c_dim=10, img_resolution=16)
    assert plan.grid_size == (16, 10)
    assert (labels[plan.indices].reshape(10, 16) == np.arange(10)[:, None]).all()


def test_many_classes_and_none_get_the_default_grid():
    labels = np.arange(200) % 40
    for c_dim in (40, 0):
        plan = plan_grid(labels, c_dim, img_resolution=16)
        assert plan.grid_size == (32, 32) and len(plan.indices) == 1024


def test_picture_matches_golden(tmp_path):
    for images in (GOLDEN["save_grid_in"], torch.from_numpy(GOLDEN["save_grid_in"]).requires_grad_()):
        save_image_grid(images, tmp_path / "grid.png", (-1, 1), (3, 2))
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), GOLDEN["save_grid_out"])
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_uint8_images_are_written_unchanged(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)
    save_image_grid(images, tmp_path / "grey.png", (0, 255))
    with Image.open(tmp_path / "grey.png") as picture:
        assert (picture.mode, picture.size) == ("L", (32, 8))
        np.testing.assert_array_equal(np.asarray(picture)[:, 8:16], images[1, 0])


def test_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "fakes.png"
    save_image_grid(np.zeros((1, 3, 4, 4)), path)
    before = path.read_bytes()

    def fail(self, target, *args, **kwargs):
        Path(target).write_bytes(b"half a pic")
        raise OSError("disk full")

    monkeypatch.setattr(image_grid.Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image_grid(np.ones((1, 3, 4, 4)), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["fakes.png"]


@pytest.mark.parametrize(
    ("shape", "grid_size"), [((6, 3, 4, 4), (4, 2)), ((6, 2, 4, 4), (3, 2)), ((3, 4, 4), (3, 1))]
)
def test_wrong_shapes_are_refused(tmp_path, shape, grid_size):
    with pytest.raises(ValueError, match="are not"):
        save_image_grid(np.zeros(shape), tmp_path / "grid.png", grid_size=grid_size)
    assert not list(tmp_path.iterdir())
