# SPDX-License-Identifier: MIT
"""Ideal translations and rotations of images: what EQ-T and EQ-R compare a generator with (arXiv:2106.12423, App. E.3).

Every function gives the moved images and a mask, 1 where the result depends on pixels inside the image only. Images
are (N, C, H, W) float; x runs right, y down, positive angles turn counterclockwise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LANCZOS_TAPS = 3  # on either side, of fractional translations
WINDOW_RADIUS = 3  # of the windows of the rotation filter, pixels
FILTER_RADIUS = 6  # of the rotation filter, pixels
CONVOLUTION_RADIUS = 64  # of the grid on which it is designed, pixels
UPSAMPLING = 4  # of images before they are rotated


class Moved(NamedTuple):
    """Images and where they are valid."""

    images: Tensor  # (N, C, H, W)
    mask: Tensor  # same shape, 0 or 1


def translate_pixels(x: Tensor, dx: int, dy: int) -> Moved:
    """Moved by whole pixels."""
    return Moved(_shift(x, dx, dy), _shift(torch.ones_like(x), dx, dy))


def _shift(x: Tensor, dx: int, dy: int) -> Tensor:
    height, width = x.shape[2:]
    moved = torch.zeros_like(x)
    if abs(dx) < width and abs(dy) < height:
        moved[:, :, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = x[
            :, :, max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
        ]
    return moved


def translate(x: Tensor, dx: float, dy: float) -> Moved:
    """Moved by any number of pixels: interpolated along each axis by a Lanczos window of 3 on a sinc."""
    images, mask = _translate_rows(x.transpose(2, 3), dx)
    images, mask_y = _translate_rows(images.transpose(2, 3), dy)
    return Moved(images, mask.transpose(2, 3) * mask_y)


def _translate_rows(x: Tensor, shift: float) -> Moved:
    """Along the third axis."""
    whole = math.floor(shift)
    offsets = range(
        -LANCZOS_TAPS + 1, LANCZOS_TAPS + 1
    )  # of rows, from the one at or above the place looked up
    distances = torch.tensor([offset - (whole + 1 - shift) for offset in offsets], dtype=torch.float64)
    taps = torch.sinc(distances) * torch.sinc(distances / LANCZOS_TAPS)
    taps = (taps / taps.sum()).tolist()
    images, mask = torch.zeros_like(x), torch.ones_like(x)
    for offset, tap in zip(offsets, taps, strict=True):
        moved, is_inside = translate_pixels(x, 0, whole + 1 - offset)
        images += tap * moved
        mask *= is_inside
    return Moved(images, mask)


def rotate(x: Tensor, angle: float) -> Moved:
    """Turned by `angle` (radians) about the middle, and band-limited to what both orientations can hold."""
    height, width = x.shape[2:]
    turn = _rotation(angle)
    taps = rotation_filter(-angle, UPSAMPLING, x.device).to(x)
    radius = len(taps) // 2
    fine = _upsample(x, taps, UPSAMPLING)
    columns, rows = torch.meshgrid(_centred(width), _centred(height), indexing="xy")
    source = torch.stack([columns, rows], dim=-1) @ turn.T  # where each pixel comes from, (H, W, 2), pixels
    middle = torch.tensor([width, height], dtype=torch.float64) / 2
    places = (source + middle - 0.5) * UPSAMPLING  # in `fine`: sample 0 lies on the middle of pixel 0
    sizes = torch.tensor([width, height], dtype=torch.float64) * UPSAMPLING
    grid = ((places + 0.5) / sizes * 2 - 1).to(x).expand(len(x), -1, -1, -1)
    images = F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # The official margin: one sample more than the filter reaches, on a grid that is UPSAMPLING / 2 samples off.
    margin, offset = radius + 1, 0.5 + UPSAMPLING / 2
    is_inside = ((places >= margin - offset) & (places < sizes - margin - offset)).all(dim=-1)
    return Moved(images, is_inside.to(x).expand_as(x).contiguous())


def pseudo_rotate(x: Tensor, angle: float) -> Moved:
    """Not turned, but band-limited as the result of `rotate` by `angle` is: what a turned drawing is compared as."""
    taps = rotation_filter(angle, 1, x.device).to(x)
    radius = len(taps) // 2
    mask = torch.zeros_like(x)
    mask[:, :, radius : x.shape[2] - radius, radius : x.shape[3] - radius] = 1
    return Moved(_upsample(x, taps, 1), mask)


def rotation_filter(angle: float, upsampling: int, device: torch.device | str = "cpu") -> Tensor:
    """Low-pass filter for frequencies within the band of the pixel grid and within that of the grid turned by `angle`.

    float64 (2 * FILTER_RADIUS * upsampling - 1) squared; taps of each phase of the upsampling have the same sum, all
    together 1. Both the ideal filter and its window are convolutions of an upright one and a turned one.
    """
    size = 2 * CONVOLUTION_RADIUS * upsampling
    if torch.device(device).type == "mps":  # which has no float64
        device = "cpu"
    # 0 first, then the rest, cyclically.
    ticks = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64, device=device) / upsampling
    upright = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)  # (size, size, 2): x, y
    turned = upright @ _rotation(angle).T.to(device)
    ideal = _convolve(*(torch.sinc(place).prod(dim=-1) for place in (upright, turned)))
    window = _convolve(*(_window(place).prod(dim=-1) for place in (upright, turned)))
    reach = FILTER_RADIUS * upsampling
    taps = (ideal * window).roll((reach, reach), dims=(0, 1))[: 2 * reach, : 2 * reach]
    taps[0], taps[:, 0] = 0, 0  # odd length, around the middle
    phases = taps.unflatten(1, (-1, upsampling)).unflatten(0, (-1, upsampling))  # (k, phase, k, phase)
    phases = phases / phases.sum(dim=(0, 2), keepdim=True) / upsampling**2
    return phases.flatten(2).flatten(0, 1)[1:, 1:]


def _window(x: Tensor) -> Tensor:
    return torch.where(x.abs() < WINDOW_RADIUS, torch.sinc(x / WINDOW_RADIUS), 0.0)


def _convolve(a: Tensor, b: Tensor) -> Tensor:
    """Cyclic convolution."""
    return torch.fft.ifft2(torch.fft.fft2(a) * torch.fft.fft2(b)).real


def _upsample(x: Tensor, taps: Tensor, factor: int) -> Tensor:
    """x with factor - 1 zeros after each pixel, correlated with `taps` of `rotation_filter`, times factor squared.

    Zeros are not multiplied: each of the factor squared phases of the result is a correlation of x with its own taps.
    """
    reach = FILTER_RADIUS
    taps = F.pad(taps * factor**2, [0, 1, 0, 1]).unflatten(1, (-1, factor)).unflatten(0, (-1, factor))
    phases = taps.flip(1, 3).permute(1, 3, 0, 2).reshape(factor**2, 1, 2 * reach, 2 * reach)
    planes = F.pad(x.reshape(-1, 1, *x.shape[2:]), [reach - 1, reach, reach - 1, reach])
    fine = F.pixel_shuffle(F.conv2d(planes, phases), factor)
    return fine.view(*x.shape[:2], *fine.shape[2:])


def _rotation(angle: float) -> Tensor:
    """Matrix (2, 2) that takes (x, y), y down, of a turned image to the place in the original."""
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)


def _centred(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64) + 0.5 - size / 2
