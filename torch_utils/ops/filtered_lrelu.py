# SPDX-License-Identifier: MIT
"""Leaky ReLU between an up- and a down-sampling low-pass filter (StyleGAN3, arXiv:2106.12423, Section 3.2)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.upfirdn2d import Padding, parse_factor, upfirdn2d


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Padding = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """Add bias, up-sample with `fu`, leaky ReLU times `gain`, clamp, down-sample with `fd`: `(N, C, H', W')`.

    x: `(N, C, H, W)`; b: `(C,)`. `padding` counts up-sampled pixels and has to allow for both filters:
    H' = (H * up + y0 + y1 - (taps_u - 1) - (taps_d - 1) + down - 1) // down. The clamp acts between the filters.
    Twice differentiable. Raises ValueError for a bias that does not fit and as `upfirdn2d` does.
    """
    if b is not None:
        if b.shape != x.shape[1:2]:
            raise ValueError(
                f"bias of shape {tuple(b.shape)} does not fit the {x.shape[1]} channels of the input"
            )
        x = x + b.to(x.dtype)[:, None, None]
    up_x, up_y = parse_factor(up)
    x = upfirdn2d(x, fu, up=up, padding=padding, flip_filter=flip_filter, gain=up_x * up_y)
    x = F.leaky_relu(x, slope) * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter)
