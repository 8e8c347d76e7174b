# SPDX-License-Identifier: MIT
"""StyleGAN's operations as formulas have them, one plain tensor operation after the other: what the benchmark compares
with.

Zeros are inserted, filters are depthwise convolutions at the full rate, every sample has weights of its own, and
autograd keeps each intermediate result. Checked against the official numbers in tests/training/test_benchmark_naive.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: int = 1,
    down: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    gain: float = 1,
) -> Tensor:
    """(N, C, H, W): insert `up - 1` zeros after each sample, pad, convolve with `f`, keep every `down`-th sample.

    f: (taps,), applied along x and then along y, (taps_y, taps_x) or None; padding: [x0, x1, y0, y1], negative = crop.
    """
    num_images, channels, height, width = x.shape
    f = torch.ones(1, 1, device=x.device) if f is None else f
    x = x.reshape(num_images, channels, height, 1, width, 1)
    x = F.pad(x, [0, up - 1, 0, 0, 0, up - 1]).reshape(num_images, channels, height * up, width * up)
    x = F.pad(x, list(padding))
    f = (f * gain ** (f.ndim / 2)).to(x.dtype).flip(list(range(f.ndim)))
    for kernel in [f[None, :], f[:, None]] if f.ndim == 1 else [f]:
        x = F.conv2d(x, kernel.expand(channels, 1, -1, -1), groups=channels)
    return x[:, :, ::down, ::down]


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor,
    up: int,
    down: int,
    padding: Sequence[int],
    gain: float,
    slope: float,
    clamp: float | None,
) -> Tensor:
    """Bias (C,), up-sampling, leaky ReLU, gain, clamp, down-sampling: (N, C, H, W) -> (N, C, H', W')."""
    x = x + b[:, None, None]
    x = upfirdn2d(x, fu, up=up, padding=padding, gain=up**2)
    x = F.leaky_relu(x, slope)
    x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return upfirdn2d(x, fd, down=down)


def modulated_conv2d(
    x: Tensor, w: Tensor, s: Tensor, demodulate: bool, padding: int, input_gain: Tensor | None = None
) -> Tensor:
    """Convolution of each sample of x (N, I, H, W) with its own weights, w (O, I, k, k) times s (N, I).

    input_gain: a number. Weights are made in float32, one set per sample, and cast to the dtype of x.
    """
    num_images, _, height, width = x.shape
    if demodulate:
        w = w * w.square().mean([1, 2, 3], keepdim=True).rsqrt()
        s = s * s.square().mean().rsqrt()
    w = w.unsqueeze(0) * s[:, None, :, None, None]  # (N, O, I, k, k)
    if demodulate:
        w = w * (w.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    if input_gain is not None:
        w = w * input_gain
    x = x.reshape(1, -1, height, width)
    x = F.conv2d(x, w.flatten(0, 1).to(x.dtype), padding=padding, groups=num_images)
    return x.reshape(num_images, -1, *x.shape[2:])


def blur(images: Tensor, sigma_px: float) -> Tensor:
    """Images through taps 2^-(d / sigma)^2, |d| <= 3 sigma, of sum 1, with zeros outside the image."""
    radius = math.floor(3 * sigma_px)
    if radius == 0:
        return images
    taps = 2 ** -((torch.arange(-radius, radius + 1, device=images.device) / sigma_px) ** 2)
    return upfirdn2d(images, taps / taps.sum(), padding=[radius] * 4)


def translate(images: Tensor, shift_rows: Tensor, shift_cols: Tensor) -> Tensor:
    """Output (r, c) is input (r + shift_rows, c + shift_cols), zero outside. shifts: int64 (N,), pixels."""
    num_images, _, height, width = images.shape
    n, rows, cols = torch.meshgrid(
        *(torch.arange(k, device=images.device) for k in (num_images, height, width)), indexing="ij"
    )
    rows = (rows + shift_rows[:, None, None] + 1).clamp(0, height + 1)
    cols = (cols + shift_cols[:, None, None] + 1).clamp(0, width + 1)
    padded = F.pad(images, [1, 1, 1, 1]).permute(0, 2, 3, 1).contiguous()
    return padded[n, rows, cols].permute(0, 3, 1, 2)


def cut_out(images: Tensor, center_rows: Tensor, center_cols: Tensor, ratio: float) -> Tensor:
    """Images with a hole of zeros, `ratio` of the side; centers: int64 (N,). Its pixels are clamped into the image."""
    num_images, _, height, width = images.shape
    sides = int(height * ratio + 0.5), int(width * ratio + 0.5)
    n, rows, cols = torch.meshgrid(
        *(torch.arange(k, device=images.device) for k in (num_images, *sides)), indexing="ij"
    )
    rows = (rows + center_rows[:, None, None] - sides[0] // 2).clamp(0, height - 1)
    cols = (cols + center_cols[:, None, None] - sides[1] // 2).clamp(0, width - 1)
    mask = torch.ones(num_images, height, width, device=images.device, dtype=images.dtype)
    mask[n, rows, cols] = 0
    return images * mask.unsqueeze(1)
