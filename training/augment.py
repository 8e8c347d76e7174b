# SPDX-License-Identifier: MIT
"""What happens to images before the discriminator sees them: DiffAugment and a blur.

DiffAugment: "Differentiable Augmentation for Data-Efficient GAN Training" (arXiv:2006.10738). Every operation
takes its random numbers as arguments; `DiffAugment` draws them. N, C, H, W are batch, channels, height and width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_utils.errors import UserError
from training.draws import Draws

TRANSLATION_RATIO = 0.125  # largest shift, as a fraction of the side
CUTOUT_RATIO = 0.2  # side of the hole, as a fraction of the side


def brightness(images: Tensor, u: Tensor) -> Tensor:
    """Images plus u - 0.5. images: (N, C, H, W); u: (N,) in [0, 1). Nothing is clamped, here and below."""
    return images + (_per_image(u, images) - 0.5)


def saturation(images: Tensor, u: Tensor) -> Tensor:
    """Distance of every pixel from its grey value times 2u. images: (N, C, H, W); u: (N,) in [0, 1)."""
    grey = images.mean(dim=1, keepdim=True)
    return grey + (images - grey) * (_per_image(u, images) * 2)


def contrast(images: Tensor, u: Tensor) -> Tensor:
    """Distance of every value from its image's mean times u + 0.5. images: (N, C, H, W); u: (N,), [0, 1)."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (_per_image(u, images) + 0.5)


def color(images: Tensor, u_brightness: Tensor, u_saturation: Tensor, u_contrast: Tensor) -> Tensor:
    """`brightness`, `saturation`, `contrast` in this order, as one affine map: a third of the passes.

    Neither later step moves the mean brightness of the image, so with s = 2 u_saturation and k = u_contrast +
    0.5 the three become k s x + k (1 - s) grey + (1 - k) mean + (u_brightness - 0.5).
    """
    grey = images.mean(dim=1, keepdim=True)  # (N, 1, H, W)
    mean = grey.mean(dim=(2, 3), keepdim=True)  # (N, 1, 1, 1)
    s = _per_image(u_saturation, images) * 2
    k = _per_image(u_contrast, images) + 0.5
    constant = (1 - k) * mean + (_per_image(u_brightness, images) - 0.5)
    return torch.addcmul(torch.addcmul(constant, grey, k * (1 - s)), images, k * s)


def translation(images: Tensor, shift_rows: Tensor, shift_cols: Tensor) -> Tensor:
    """Output (r, c) is input (r + shift_rows, c + shift_cols), zero outside.

    images: (N, C, H, W); shifts: int64 (N,), pixels.
    """
    channels, height, width = images.shape[1:]
    rows = torch.arange(height, device=images.device) + shift_rows[:, None]  # (N, H)
    cols = torch.arange(width, device=images.device) + shift_cols[:, None]  # (N, W)
    is_inside = _outer(rows.ge(0) & rows.lt(height), cols.ge(0) & cols.lt(width))  # (N, 1, H, W)
    source = rows.clamp(0, height - 1)[:, :, None] * width + cols.clamp(0, width - 1)[:, None, :]  # (N, H, W)
    source = source.flatten(1)[:, None].expand(-1, channels, -1)  # (N, C, H W), without copying
    return images.flatten(2).gather(2, source).view_as(images) * is_inside


def cutout(images: Tensor, center_rows: Tensor, center_cols: Tensor) -> Tensor:
    """Images with a rectangular hole of zeros. images: (N, C, H, W); centers: int64 (N,), pixels.

    Rows center - size // 2 + (0 ... size - 1), each clamped into the image: at a border the hole shrinks, but
    never below the last row.
    """
    is_row_cut = _cut_positions(center_rows, images.shape[2])
    is_col_cut = _cut_positions(center_cols, images.shape[3])
    return images * ~_outer(is_row_cut, is_col_cut)


def _cut_positions(centers: Tensor, num_positions: int) -> Tensor:
    size = _rounded(num_positions * CUTOUT_RATIO)
    if size == 0:
        return torch.zeros(len(centers), num_positions, dtype=torch.bool, device=centers.device)
    first = centers - size // 2
    last = (first + size - 1).clamp(0, num_positions - 1)
    positions = torch.arange(num_positions, device=centers.device)
    return positions.ge(first.clamp(0, num_positions - 1)[:, None]) & positions.le(
        last[:, None]
    )  # (N, positions)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.dtype)[:, None, None, None]


def _outer(row_mask: Tensor, col_mask: Tensor) -> Tensor:
    return row_mask[:, None, :, None] & col_mask[:, None, None, :]  # (N, 1, H, W)


def _rounded(value: float) -> int:
    return int(value + 0.5)


class Operation(NamedTuple):
    """One word of a policy."""

    num_draws: int  # uniform random numbers that it needs per image
    arguments: Callable[[Tensor, int, int], tuple[Tensor, ...]]  # of u (N, num_draws), height and width
    apply: Callable[..., Tensor]  # apply(images, *arguments) -> images


def _color_arguments(u: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    return u.unbind(dim=1)


def _translation_arguments(u: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    limits = [_rounded(side * TRANSLATION_RATIO) for side in (height, width)]
    return tuple(_integer(v, 2 * limit + 1) - limit for v, limit in zip(u.unbind(dim=1), limits, strict=True))


def _cutout_arguments(u: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    # An even hole has one more position than an odd one: its center lies between two pixels.
    counts = [side + 1 - _rounded(side * CUTOUT_RATIO) % 2 for side in (height, width)]
    return tuple(_integer(v, count) for v, count in zip(u.unbind(dim=1), counts, strict=True))


def _integer(u: Tensor, count: int) -> Tensor:
    """0 ... count - 1 with equal chances, int64, of u in [0, 1) with 24 bits: the product stays below count."""
    return (u * count).long()


OPERATIONS = {
    "color": Operation(3, _color_arguments, color),
    "translation": Operation(2, _translation_arguments, translation),
    "cutout": Operation(2, _cutout_arguments, cutout),
}


def parse_policy(policy: str) -> tuple[str, ...]:
    """Operation names of a comma-separated policy, in its order; () for an empty one.

    Raises UserError for a word that is no operation, or that comes twice.
    """
    names = tuple(word.strip() for word in policy.split(",") if word.strip())
    for name in names:
        if name not in OPERATIONS:
            raise UserError(f"augment policy {policy!r}: {name!r} is not one of {', '.join(OPERATIONS)}")
    if len(set(names)) < len(names):
        raise UserError(f"augment policy {policy!r} repeats an operation; name each at most once")
    return names


def diff_augment(images: Tensor, policy: Sequence[str], u: Tensor) -> Tensor:
    """Augmented images, differentiable. images: float (N, C, H, W), any range, usually [-1, 1].

    policy: `parse_policy`'s result; u: random numbers of [0, 1), float32 (N, sum of the operations' num_draws).
    """
    operations = [OPERATIONS[name] for name in policy]
    parts = u.split([operation.num_draws for operation in operations], dim=1)
    for operation, part in zip(operations, parts, strict=True):
        images = operation.apply(images, *operation.arguments(part, *images.shape[2:]))
    return images


class DiffAugment:
    """images -> randomly augmented images, for one pass of D: every call, one per backbone, has draws of its own."""

    def __init__(self, policy: Sequence[str], draws: Draws) -> None:
        """policy: as in `diff_augment`; draws: of the images that will be passed."""
        self.policy, self.draws = policy, draws
        self.num_draws = sum(OPERATIONS[name].num_draws for name in policy)
        self.num_calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        u = self.draws.uniform(f"augment{self.num_calls}", self.num_draws)
        self.num_calls += 1
        return diff_augment(images, self.policy, u)


def blur_sigma(cur_nimg: int, init_sigma_px: float, fade_kimg: float) -> float:
    """Blur at this point of the run, pixels: falls linearly from init_sigma_px to 0 at fade_kimg.

    fade_kimg = 0: no blur. StyleGAN-XL (arXiv:2202.00273) takes 2 px and 300 kimg.
    """
    if fade_kimg <= 0:
        return 0.0
    return max(1 - cur_nimg / (fade_kimg * 1000), 0) * init_sigma_px


def blur(images: Tensor, sigma_px: float) -> Tensor:
    """Images (N, C, H, W) through a separable filter of weights 2^-(d / sigma_px)^2, |d| <= 3 sigma_px.

    Base 2, not e, as in the official code; sum 1; zeros outside the image. sigma_px < 1/3 leaves the images
    as they are. Written as two small matrix products, which on a CPU cost less than convolutions.
    """
    radius = math.floor(3 * sigma_px)
    if radius == 0:
        return images
    height, width = images.shape[2:]
    rows = _blur_matrix(height, sigma_px, radius, images.dtype, images.device)
    cols = _blur_matrix(width, sigma_px, radius, images.dtype, images.device)
    return rows @ images @ cols  # symmetric matrices


@functools.lru_cache(maxsize=4)  # one step blurs real and fake images alike; the next step has another sigma
def _blur_matrix(size: int, sigma_px: float, radius: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Banded (size, size) matrix of the filter."""
    total = sum(2 ** -((d / sigma_px) ** 2) for d in range(-radius, radius + 1))
    # A cached tensor must serve training, even if it was made in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        positions = torch.arange(size, device=device, dtype=torch.float32)
        distance = (positions[:, None] - positions).abs()
        weights = torch.exp2(-((distance / sigma_px) ** 2)) / total
        return (weights * (distance <= radius)).to(dtype)
