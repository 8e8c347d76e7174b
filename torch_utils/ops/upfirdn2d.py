# SPDX-License-Identifier: MIT
"""Up-sample, pad or crop, filter and down-sample images: the resampling of StyleGAN2/3 (arXiv:2106.12423).

All of it is linear, and for a separable filter it acts on rows and columns independently. So each axis is one
product with a small banded matrix, and no zero is ever inserted into an image. Filters that are truly
two-dimensional go through a strided, or transposed, depthwise convolution instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.banded import BandedMatrix, num_positions, resample, resampling_matrix

Factor = int | Sequence[int]  # one number, or [x, y]
Padding = int | Sequence[int]  # one number, [x, y] or [x0, x1, y0, y1]; negative numbers crop

MIN_SEPARABLE_TAPS = 8  # shorter one-dimensional filters become two-dimensional in `setup_filter`


def setup_filter(
    f: Tensor | Sequence | float | None,
    device: torch.device | str | None = None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> Tensor:
    """Filter for the functions below: float32 `(taps,)` if separable, else `(taps_y, taps_x)`.

    None and scalars are one-tap filters. By default a 1-D `f` stays 1-D, i.e. separable, from 8 taps on, and
    otherwise becomes its outer product. Raises ValueError for an empty `f` or more than two dimensions.
    """
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32, device=device)
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(f"filter of shape {tuple(f.shape)}: need a scalar, (taps,) or (taps_y, taps_x)")
    f = f.reshape(1) if f.ndim == 0 else f
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= MIN_SEPARABLE_TAPS
    if separable and f.ndim == 2:
        raise ValueError(
            f"filter of shape {tuple(f.shape)} cannot be separable: give the one-dimensional taps"
        )
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return f * gain ** (f.ndim / 2)


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Factor = 1,
    down: Factor = 1,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """Insert `up - 1` zeros after each sample, pad, convolve with `f`, keep every `down`-th sample.

    x: `(N, C, H, W)` -> `(N, C, H', W')`, same dtype, H' = (H * up + y0 + y1 - taps) // down + 1. `padding`
    counts up-sampled pixels. `flip_filter` correlates instead of convolving. `gain` scales the result. Twice
    differentiable. Raises ValueError when `x` or `f` has the wrong number of dimensions or the padded image
    is smaller than `f`.
    """
    if x.ndim != 4:
        raise ValueError(f"images of shape {tuple(x.shape)}: need (N, C, H, W)")
    taps_x, taps_y = filter_size(f)
    up_x, up_y = parse_factor(up)
    down_x, down_y = parse_factor(down)
    x0, x1, y0, y1 = parse_padding(padding)
    num_positions(x.shape[3], up_x, down_x, x0, x1, taps_x)
    num_positions(x.shape[2], up_y, down_y, y0, y1, taps_y)
    if f is None and up_x == up_y == 1:
        x = F.pad(x, (x0, x1, y0, y1))[:, :, ::down_y, ::down_x]
        return x if gain == 1 else x * gain
    if f is None or f.ndim == 1:
        return resample(x, *axis_matrices(x, f, up, down, padding, flip_filter, gain))
    kernel = f.detach() if flip_filter else f.detach().flip([0, 1])
    return _resample_2d(x, (kernel * gain).to(x.dtype), (up_y, up_x), (down_y, down_x), (x0, x1, y0, y1))


def filter2d(
    x: Tensor, f: Tensor | None, padding: Padding = 0, flip_filter: bool = False, gain: float = 1
) -> Tensor:
    """Filter images, keeping their size when `padding` is 0. See `upfirdn2d`."""
    fw, fh = filter_size(f)
    x0, x1, y0, y1 = parse_padding(padding)
    padding = [x0 + fw // 2, x1 + (fw - 1) // 2, y0 + fh // 2, y1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=padding, flip_filter=flip_filter, gain=gain)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: Factor = 2,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """Enlarge images `up` times (when `padding` is 0) without changing their brightness. See `upfirdn2d`."""
    up_x, up_y = parse_factor(up)
    padding = upsample_padding(f, up, padding)
    return upfirdn2d(x, f, up=up, padding=padding, flip_filter=flip_filter, gain=gain * up_x * up_y)


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: Factor = 2,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """Shrink images `down` times (when `padding` is 0 and the size is a multiple). See `upfirdn2d`."""
    padding = downsample_padding(f, down, padding)
    return upfirdn2d(x, f, down=down, padding=padding, flip_filter=flip_filter, gain=gain)


def upsample_padding(f: Tensor | None, up: Factor, padding: Padding = 0) -> list[int]:
    """`padding` plus what keeps an up-sampled image aligned with its original: [x0, x1, y0, y1]."""
    (fw, fh), (up_x, up_y), (x0, x1, y0, y1) = filter_size(f), parse_factor(up), parse_padding(padding)
    return [
        x0 + (fw + up_x - 1) // 2,
        x1 + (fw - up_x) // 2,
        y0 + (fh + up_y - 1) // 2,
        y1 + (fh - up_y) // 2,
    ]


def downsample_padding(f: Tensor | None, down: Factor, padding: Padding = 0) -> list[int]:
    """`padding` plus what keeps a down-sampled image aligned with its original: [x0, x1, y0, y1]."""
    (fw, fh), (down_x, down_y), (x0, x1, y0, y1) = filter_size(f), parse_factor(down), parse_padding(padding)
    return [
        x0 + (fw - down_x + 1) // 2,
        x1 + (fw - down_x) // 2,
        y0 + (fh - down_y + 1) // 2,
        y1 + (fh - down_y) // 2,
    ]


def filter_size(f: Tensor | None) -> tuple[int, int]:
    """(width, height) of a filter in taps; None counts as one tap."""
    if f is None:
        return 1, 1
    if f.ndim not in (1, 2):
        raise ValueError(f"filter of shape {tuple(f.shape)}: need None, (taps,) or (taps_y, taps_x)")
    return f.shape[-1], f.shape[0]


def parse_factor(factor: Factor) -> tuple[int, int]:
    """(x, y) of an up- or down-sampling factor."""
    x, y = (factor, factor) if isinstance(factor, int) else factor
    if x < 1 or y < 1:
        raise ValueError(f"resampling factor {factor} must be at least 1")
    return x, y


def parse_padding(padding: Padding) -> tuple[int, int, int, int]:
    """(x0, x1, y0, y1) of a padding."""
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) == 2:
        x, y = padding
        return x, x, y, y
    if len(padding) != 4:
        raise ValueError(f"padding {padding}: need one number, [x, y] or [x0, x1, y0, y1]")
    x0, x1, y0, y1 = padding
    return x0, x1, y0, y1


def axis_matrices(
    x: Tensor,
    f: Tensor | None,
    up: Factor,
    down: Factor,
    padding: Padding,
    flip_filter: bool,
    gain: float,
    size: Sequence[int] | None = None,
) -> tuple[BandedMatrix, BandedMatrix]:
    """(to_height, to_width) that do what `upfirdn2d` does with a separable `f`; for `banded.resample`.

    For images of `size` (height, width), by default that of `x`; device and dtype are those of `x`.
    """
    height, width = x.shape[2:] if size is None else size
    up_x, up_y = parse_factor(up)
    down_x, down_y = parse_factor(down)
    x0, x1, y0, y1 = parse_padding(padding)
    taps = torch.ones([1], device=x.device) if f is None else f.detach()
    taps = taps if flip_filter else taps.flip(0)  # torch and our matrices correlate
    to_height = resampling_matrix(taps.to(x.dtype), height, up_y, down_y, y0, y1)
    to_width = resampling_matrix((taps * gain).to(x.dtype), width, up_x, down_x, x0, x1)
    return to_height, to_width


def _resample_2d(
    x: Tensor,
    kernel: Tensor,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
) -> Tensor:
    """Correlate with a `(taps_y, taps_x)` kernel; `up` and `down` are (y, x), as in torch's convolutions."""
    num_channels = x.shape[1]
    x0, x1, y0, y1 = padding
    taps_y, taps_x = kernel.shape
    weight = kernel.expand(num_channels, 1, -1, -1)
    if up == (1, 1):
        return F.conv2d(F.pad(x, [x0, x1, y0, y1]), weight, stride=down, groups=num_channels)
    x = F.conv_transpose2d(x, weight.flip([2, 3]), stride=up, groups=num_channels)
    # The transposed convolution starts at the first partial overlap and ends at the last sample (no zeros
    # after it).
    x = F.pad(x, [x0 - taps_x + 1, x1 - taps_x + up[1], y0 - taps_y + 1, y1 - taps_y + up[0]])
    return x[:, :, :: down[0], :: down[1]]
