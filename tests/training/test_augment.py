# SPDX-License-Identifier: MIT
"""DiffAugment and blur against the official results (d_diffaug.npz, d_blur.npz), and what they promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.errors import UserError
from training import augment

DATA = Path(__file__).parents[1] / "data"
GOLDEN = {key: torch.from_numpy(value) for key, value in np.load(DATA / "d_diffaug.npz").items()}
BLUR = np.load(DATA / "d_blur.npz")
BLUR_NIMG = sorted({int(key.split("/")[1]) for key in BLUR.files if key.endswith("/out")})
FULL_POLICY = "color,translation,cutout"
DRAWS = {
    "brightness": ("u_brightness",),
    "saturation": ("u_saturation",),
    "contrast": ("u_contrast",),
    "color": ("u_brightness", "u_saturation", "u_contrast"),
    "translation": ("shift_rows", "shift_cols"),
    "cutout": ("cut_center_row", "cut_center_col"),
}


def draws_of(name: str) -> list[Tensor]:
    return [GOLDEN[key] for key in DRAWS[name]]


def apply_full_policy(images: Tensor) -> Tensor:
    for name in ("color", "translation", "cutout"):
        images = augment.OPERATIONS[name].apply(images, *draws_of(name))
    return images


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["brightness", "saturation", "contrast", "translation", "cutout"])
def test_each_operation_matches_golden(name):
    assert_near(getattr(augment, name)(GOLDEN["x"], *draws_of(name)), GOLDEN[name])


def test_full_policy_matches_golden():
    assert_near(apply_full_policy(GOLDEN["x"]), GOLDEN["full_policy"])


def test_gradient_of_full_policy_matches_golden():
    # In float64, so that only the golden file's own rounding (values up to 7) is inside the tolerance.
    images = GOLDEN["x"].double().requires_grad_()
    loss = (apply_full_policy(images) * GOLDEN["r"].double()).sum()
    (gradient,) = torch.autograd.grad(loss, images)
    assert_near(gradient, GOLDEN["full_policy_grad_x"])


def test_random_numbers_are_drawn_in_the_official_order():
    torch.manual_seed(1234)
    assert_near(augment.diff_augment(GOLDEN["x"], FULL_POLICY), GOLDEN["full_policy_torch_seed_1234"])


def test_generator_replaces_the_global_one():
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1234)
    actual = augment.diff_augment(GOLDEN["x"], FULL_POLICY, generator)
    assert_near(actual, GOLDEN["full_policy_torch_seed_1234"])
    assert torch.equal(torch.get_rng_state(), state)


def test_color_is_its_three_steps_forward_and_backward():
    draws = draws_of("color")
    images = GOLDEN["x"].double().requires_grad_()
    steps = augment.contrast(augment.saturation(augment.brightness(images, draws[0]), draws[1]), draws[2])
    fused = augment.color(images, *draws)
    torch.testing.assert_close(fused, steps, rtol=0, atol=1e-12)
    weights = torch.randn_like(steps)
    expected, actual = (torch.autograd.grad((y * weights).sum(), images)[0] for y in (steps, fused))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_translation_and_cutout_match_loops_over_pixels():
    num_images, height, width = 40, 6, 11
    images = torch.randn(num_images, 2, height, width)
    (shifts, centers) = augment.draw_augmentation(("translation", "cutout"), images.shape, images.device)
    moved, cut = torch.zeros_like(images), images.clone()
    for n in range(num_images):
        for r in range(height):
            for c in range(width):
                row, col = r + int(shifts[0][n]), c + int(shifts[1][n])
                if 0 <= row < height and 0 <= col < width:
                    moved[n, :, r, c] = images[n, :, row, col]
        size_rows, size_cols = int(height * 0.2 + 0.5), int(width * 0.2 + 0.5)
        for r in range(size_rows):
            for c in range(size_cols):
                row = min(max(int(centers[0][n]) - size_rows // 2 + r, 0), height - 1)
                col = min(max(int(centers[1][n]) - size_cols // 2 + c, 0), width - 1)
                cut[n, :, row, col] = 0
    assert torch.equal(augment.translation(images, *shifts), moved)
    assert torch.equal(augment.cutout(images, *centers), cut)


def test_draws_cover_their_range():
    shape = torch.Size((2000, 3, 16, 15))
    color, shifts, centers = augment.draw_augmentation(
        augment.parse_policy(FULL_POLICY), shape, torch.device("cpu")
    )
    assert all(u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.03 for u in color)
    assert [(int(s.min()), int(s.max())) for s in shifts] == [
        (-2, 2),
        (-2, 2),
    ]  # int(16/8 + .5), int(15/8 + .5)
    assert [(int(c.min()), int(c.max())) for c in centers] == [(0, 15), (0, 14)]  # holes of 3 and 3: odd
    (even,) = augment.draw_augmentation(("cutout",), torch.Size((2000, 3, 20, 20)), torch.device("cpu"))
    assert int(even[0].max()) == 20  # a hole of 4: even


def test_neutral_draws_change_nothing():
    images = torch.randn(3, 3, 8, 8)
    half, zero = torch.full((3,), 0.5), torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(augment.color(images, half, half, half), images, rtol=0, atol=1e-6)
    assert torch.equal(augment.translation(images, zero, zero), images)
    assert augment.diff_augment(images, "") is images


def test_second_derivative_exists():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def augmented(x: Tensor) -> Tensor:
        return augment.diff_augment(x.square(), FULL_POLICY, torch.Generator().manual_seed(0))

    torch.autograd.gradcheck(augmented, images, fast_mode=True)
    torch.autograd.gradgradcheck(augmented, images, fast_mode=True)


def test_tiny_images_have_no_hole():
    images = torch.ones(4, 3, 2, 2)
    assert torch.equal(augment.diff_augment(images, "cutout"), images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    assert augment.diff_augment(torch.zeros(2, 3, 8, 8, dtype=dtype), FULL_POLICY).dtype == dtype
    assert augment.blur(torch.zeros(2, 3, 8, 8, dtype=dtype), 1.0).dtype == dtype


def test_policy_is_parsed():
    assert augment.parse_policy(" cutout, color ") == ("cutout", "color")
    assert augment.parse_policy("") == ()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("color,flip", r"'color,flip': 'flip' is not one of color, translation, cutout"),
        ("color,cutout,color", "repeats an operation"),
    ],
)
def test_wrong_policy(policy, message):
    with pytest.raises(UserError, match=message):
        augment.diff_augment(torch.zeros(1, 3, 8, 8), policy)


@pytest.mark.parametrize("cur_nimg", BLUR_NIMG)
def test_blur_matches_golden(cur_nimg):
    sigma_px = augment.blur_sigma(cur_nimg, init_sigma_px=2, fade_kimg=300)
    assert sigma_px == pytest.approx(float(BLUR[f"blur/{cur_nimg}/sigma"]), rel=1e-12)
    actual = augment.blur(torch.from_numpy(BLUR["blur/x"]), sigma_px)
    assert_near(actual, torch.from_numpy(BLUR[f"blur/{cur_nimg}/out"]))


def test_blur_matches_a_convolution_forward_and_backward():
    images = torch.randn(2, 3, 9, 14, dtype=torch.float64, requires_grad=True)
    sigma_px, radius = 1.3, 3
    taps = 2.0 ** -((torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma_px) ** 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, -1, -1)
    expected = F.conv2d(images, kernel, padding=radius, groups=3)
    actual = augment.blur(images, sigma_px)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)  # the weights are made in float32
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), images)[0] for y in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_blur_keeps_the_mean_inside():
    blurred = augment.blur(torch.ones(1, 1, 40, 40), 2.0)
    torch.testing.assert_close(blurred[..., 6:-6, 6:-6], torch.ones(1, 1, 28, 28), rtol=0, atol=1e-6)


def test_no_blur_without_sigma_or_fade():
    images = torch.randn(1, 3, 8, 8)
    assert augment.blur(images, 0.33) is images
    assert augment.blur_sigma(0, 2.0, fade_kimg=0) == 0
    assert augment.blur_sigma(10**9, 2.0, fade_kimg=300) == 0


def test_blur_first_used_in_inference_mode_still_trains():
    with torch.inference_mode():
        augment.blur(torch.ones(1, 1, 7, 7), 0.9)
    images = torch.ones(1, 1, 7, 7, requires_grad=True)
    augment.blur(images, 0.9).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
