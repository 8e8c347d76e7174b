# SPDX-License-Identifier: MIT
"""Convolution combined with up- or down-sampling, always at the lowest possible resolution (StyleGAN2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.upfirdn2d import (
    Padding,
    downsample_padding,
    parse_padding,
    upfirdn2d,
    upsample_padding,
)


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Padding = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    """Up-sample by `up` with low-pass `f`, convolve with `w`, down-sample by `down` with `f`.

    x: `(N, I, H, W)`; w: `(O, I / groups, kh, kw)`; `f` as from `setup_filter`. `padding` counts up-sampled
    pixels and is applied once, at the start. `flip_weight=True` correlates, as torch does; False convolves.
    Twice differentiable. Raises ValueError for factors that are not positive integers or shapes that do not
    fit.
    """
    _check_arguments(x, w, up, down, groups)
    padding = list(parse_padding(padding))
    padding = upsample_padding(f, up, padding) if up > 1 else padding
    padding = downsample_padding(f, down, padding) if down > 1 else padding
    weight = w if flip_weight else w.flip([2, 3])
    if up > 1:
        return _conv_after_upsampling(x, weight, f, up, down, padding, groups, flip_filter)
    if down > 1:
        # A 1x1 convolution commutes with dropping samples, so it may run after it; a larger one drops them
        # itself.
        is_pointwise = w.shape[2:] == (1, 1)
        filter_down, conv_down = (down, 1) if is_pointwise else (1, down)
        x = upfirdn2d(x, f, down=filter_down, padding=padding, flip_filter=flip_filter)
        return F.conv2d(x, weight, stride=conv_down, groups=groups)
    x0, x1, y0, y1 = padding
    if x0 == x1 >= 0 and y0 == y1 >= 0:
        return F.conv2d(x, weight, padding=(y0, x0), groups=groups)
    return F.conv2d(F.pad(x, padding), weight, groups=groups)


def _conv_after_upsampling(
    x: Tensor,
    weight: Tensor,
    f: Tensor | None,
    up: int,
    down: int,
    padding: list[int],
    groups: int,
    flip_filter: bool,
) -> Tensor:
    """Convolve at the low resolution where possible, then filter: the two commute."""
    filter_up = 1
    if weight.shape[2:] == (1, 1):
        x, filter_up = F.conv2d(x, weight, groups=groups), up
    else:
        x, padding = _transposed_conv2d(x, weight, up, padding, groups)
    x = upfirdn2d(x, f, up=filter_up, padding=padding, flip_filter=flip_filter, gain=up**2)
    return upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x


def _transposed_conv2d(
    x: Tensor, weight: Tensor, up: int, padding: list[int], groups: int
) -> tuple[Tensor, list[int]]:
    """Correlate the zero-inserted `x` with `weight` over every partial overlap; also the padding left.

    That padding is smaller, usually negative: the result already extends kernel - 1 pixels beyond the image,
    except that the zeros after the last sample are missing.
    """
    out_channels, _, kh, kw = weight.shape
    weight = weight.unflatten(0, (groups, out_channels // groups)).transpose(1, 2).flatten(0, 1).flip([2, 3])
    x0, x1, y0, y1 = padding
    remaining = [x0 - kw + 1, x1 - kw + up, y0 - kh + 1, y1 - kh + up]
    return F.conv_transpose2d(x, weight, stride=up, groups=groups), remaining


def _check_arguments(x: Tensor, w: Tensor, up: int, down: int, groups: int) -> None:
    if x.ndim != 4 or w.ndim != 4:
        raise ValueError(f"images {tuple(x.shape)} and weight {tuple(w.shape)} must have four dimensions")
    if up < 1 or down < 1:
        raise ValueError(f"up={up} and down={down} must be at least 1")
    if w.shape[1] * groups != x.shape[1] or w.shape[0] % groups:
        raise ValueError(
            f"weight {tuple(w.shape)} with {groups} groups does not fit {x.shape[1]} input channels"
        )
