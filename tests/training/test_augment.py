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
from training.draws import Draws

DATA = Path(__file__).parents[1] / "data"
GOLDEN = {key: torch.from_numpy(value) for key, value in np.load(DATA / "d_diffaug.npz").items()}
BLUR = np.load(DATA / "d_blur.npz")
BLUR_NIMG = sorted({int(key.split("/")[1]) for key in BLUR.files if key.endswith("/out")})
FULL_POLICY = ("color", "translation", "cutout")
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


def arguments_of(name: str, num: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Random arguments of an operation for so many images."""
    operation = augment.OPERATIONS[name]
    return operation.arguments(torch.rand(num, operation.num_draws), height, width)


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


def test_random_numbers_mean_what_they_mean_in_the_official_code():
    """Its draws in its order, with the ranges of the integers, given as uniform numbers."""
    torch.manual_seed(1234)
    images = GOLDEN["x"]
    num, height, width = images.shape[0], *images.shape[2:]
    columns = [torch.rand(num) for _ in range(3)]
    for side in (height, width):
        limit = int(side * 0.125 + 0.5)
        columns.append(centre_of(torch.randint(-limit, limit + 1, (num,)) + limit, 2 * limit + 1))
    for side in (height, width):
        count = side + (1 - int(side * 0.2 + 0.5) % 2)
        columns.append(centre_of(torch.randint(0, count, (num,)), count))
    actual = augment.diff_augment(images, FULL_POLICY, torch.stack(columns, dim=1))
    assert_near(actual, GOLDEN["full_policy_torch_seed_1234"])


def centre_of(integers: Tensor, count: int) -> Tensor:
    """Uniform numbers from the middles of the intervals that stand for these integers of 0 ... count - 1."""
    return (integers + 0.5) / count


def test_every_call_and_every_sample_has_draws_of_its_own():
    images = torch.randn(1, 3, 16, 16).expand(4, -1, -1, -1)
    draws = Draws(3, np.arange(4))
    augmentation = augment.DiffAugment(FULL_POLICY, draws)
    first, second = augmentation(images), augmentation(images)
    assert len({image.sum().item() for image in torch.cat([first, second])}) == 8
    again = augment.DiffAugment(FULL_POLICY, draws[1:3])  # the same samples in another micro-batch
    assert torch.equal(again(images[1:3]), first[1:3]) and torch.equal(again(images[1:3]), second[1:3])
    elsewhere = augment.DiffAugment(FULL_POLICY, draws.within("other"))(images)
    assert not torch.equal(elsewhere, first)


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
    shifts, centers = (arguments_of(name, num_images, height, width) for name in ("translation", "cutout"))
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
    color, shifts, centers = (arguments_of(name, 2000, 16, 15) for name in FULL_POLICY)
    assert all(u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.03 for u in color)
    assert [(int(s.min()), int(s.max())) for s in shifts] == [
        (-2, 2),
        (-2, 2),
    ]  # int(16/8 + .5), int(15/8 + .5)
    assert [(int(c.min()), int(c.max())) for c in centers] == [(0, 15), (0, 14)]  # holes of 3 and 3: odd
    even = arguments_of("cutout", 2000, 20, 20)
    assert int(even[0].max()) == 20  # a hole of 4: even
    counts = (shifts[0] + 2).bincount()
    assert (counts.double() / 2000 - 1 / 5).abs().max() < 0.04


def test_the_largest_uniform_number_stays_inside():
    """float32 products could round up to the number of positions."""
    largest = torch.full((1, 2), 1 - 2.0**-24)
    for side in range(5, 1200):
        limit, count = int(side * 0.125 + 0.5), side + 1 - int(side * 0.2 + 0.5) % 2
        assert augment.OPERATIONS["translation"].arguments(largest, side, side)[0] == limit
        assert augment.OPERATIONS["cutout"].arguments(largest, side, side)[0] == count - 1


def test_neutral_draws_change_nothing():
    images = torch.randn(3, 3, 8, 8)
    half, zero = torch.full((3,), 0.5), torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(augment.color(images, half, half, half), images, rtol=0, atol=1e-6)
    assert torch.equal(augment.translation(images, zero, zero), images)
    assert augment.diff_augment(images, (), torch.zeros(3, 0)) is images


def test_second_derivative_exists():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    u = torch.rand(2, 7)

    def augmented(x: Tensor) -> Tensor:
        return augment.diff_augment(x.square(), FULL_POLICY, u)

    torch.autograd.gradcheck(augmented, images, fast_mode=True)
    torch.autograd.gradgradcheck(augmented, images, fast_mode=True)


def test_tiny_images_have_no_hole():
    images = torch.ones(4, 3, 2, 2)
    assert torch.equal(augment.diff_augment(images, ("cutout",), torch.rand(4, 2)), images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    images = torch.zeros(2, 3, 8, 8, dtype=dtype)
    assert augment.diff_augment(images, FULL_POLICY, torch.rand(2, 7)).dtype == dtype
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
        augment.parse_policy(policy)


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
