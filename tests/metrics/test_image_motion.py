# SPDX-License-Identifier: MIT
"""Ideal motions of images: golden values, and properties on drawings whose moved version is known exactly."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import image_motion
from metrics.image_motion import Moved, pseudo_rotate, rotate, rotation_filter, translate, translate_pixels

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_metrics.npz")
X = torch.from_numpy(GOLDEN["eq_x"])
ANGLE = float(GOLDEN["eq_angle"])


def assert_golden(moved: Moved, name: str) -> None:
    np.testing.assert_array_equal(moved.mask, GOLDEN[f"{name}_mask"])
    np.testing.assert_allclose(moved.images * moved.mask, GOLDEN[name] * GOLDEN[f"{name}_mask"], atol=1e-4)


@pytest.mark.parametrize("case", ["a", "b"])
def test_translations_equal_the_reference(case):
    whole, fraction = (GOLDEN[f"eq_{kind}_{case}_t"].astype(float) * 32 for kind in ("int", "frac"))
    assert_golden(translate_pixels(X, round(whole[0]), round(whole[1])), f"eq_int_{case}")
    assert_golden(translate(X, *fraction), f"eq_frac_{case}")


def test_rotations_equal_the_reference():
    assert_golden(rotate(X, ANGLE), "eq_rot")
    assert_golden(pseudo_rotate(X, ANGLE), "eq_pseudo")


def test_the_rotation_filter_equals_the_reference():
    taps = rotation_filter(-ANGLE, 4)
    assert tuple(taps.shape) == tuple(GOLDEN["eq_filter__shape"])
    np.testing.assert_allclose(taps.flatten()[:2000], GOLDEN["eq_filter__sub"], atol=1e-6)
    assert taps.sum().item() == pytest.approx(1)


def test_upsampling_multiplies_no_zeros_and_is_the_same():
    taps = rotation_filter(0.4, 4)
    x = torch.randn(2, 3, 9, 13, dtype=torch.float64)
    spread = torch.zeros(2, 3, 36, 52, dtype=torch.float64)
    spread[:, :, ::4, ::4] = x
    expected = torch.nn.functional.conv2d(spread.flatten(0, 1)[:, None], 16 * taps[None, None], padding=23)
    torch.testing.assert_close(
        image_motion._upsample(x, taps, 4), expected.view_as(spread), rtol=1e-9, atol=1e-9
    )


def drawing(dx: float, dy: float, angle: float, size: int = 64, dtype=torch.float64) -> torch.Tensor:
    """Low waves (1, 1, size, size), drawn moved: of each pixel the place it comes from is looked up."""
    places = torch.arange(size, dtype=dtype) + 0.5 - size / 2
    x, y = torch.meshgrid(places - dx, places - dy, indexing="xy")
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = cos * x - sin * y, sin * x + cos * y
    return (torch.sin(0.31 * x + 0.9) + torch.cos(0.42 * y - 0.12 * x) + 0.02 * x)[None, None]


def largest_error(moved: Moved, expected: torch.Tensor) -> float:
    assert moved.mask.mean() > 0.2
    return float(((moved.images - expected) * moved.mask).abs().max())


@pytest.mark.parametrize(("dx", "dy"), [(3, -2), (0, 0), (-5, 7)])
def test_whole_translations_are_exact(dx, dy):
    assert largest_error(translate_pixels(drawing(0, 0, 0), dx, dy), drawing(dx, dy, 0)) < 1e-12
    assert largest_error(translate(drawing(0, 0, 0), dx, dy), drawing(dx, dy, 0)) < 1e-12


@pytest.mark.parametrize(("dx", "dy"), [(2.784, -1.6), (-0.25, 0.5), (-7.9, 4.01)])
def test_fractional_translations_move_waves(dx, dy):
    assert largest_error(translate(drawing(0, 0, 0), dx, dy), drawing(dx, dy, 0)) < 0.03
    assert largest_error(translate(drawing(0, 0, 0), dx, dy), drawing(-dx, -dy, 0)) > 0.2


@pytest.mark.parametrize("angle", [0.7, -2.4, 0.01])
def test_rotations_turn_waves(angle):
    """The ideal low-pass leaves waves below half the pixel rate alone."""
    assert largest_error(rotate(drawing(0, 0, 0), angle), drawing(0, 0, angle)) < 0.05
    assert largest_error(pseudo_rotate(drawing(0, 0, angle), angle), drawing(0, 0, angle)) < 0.05
    assert largest_error(rotate(drawing(0, 0, 0), angle), drawing(0, 0, -angle)) > 10 * 0.01 * min(
        abs(angle), 1
    )


def test_translations_out_of_the_image_leave_nothing():
    moved = translate_pixels(X, 32, 0)
    assert not moved.images.any() and not moved.mask.any()
