# SPDX-License-Identifier: MIT
"""Stacks of strided convolutions between images and feature maps of side 4, as in DCGAN (arXiv:1511.06434).

Every layer halves or doubles the side with a 4x4 kernel of stride 2. See `init_weights_` for their initial weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

LEAK = 0.2  # slope of the leaky ReLU
INIT_STD = 0.02  # of initial weights
COARSEST = 4  # side of the coarsest feature maps


def down_stack(img_channels: int, widths: Sequence[int], has_batchnorm: bool) -> nn.Sequential:
    """Images (N, img_channels, H, W) to features (N, widths[-1], 4, 4), for H = W = 4 * 2 ** len(widths).

    widths: channels, finest first. Leaky ReLU after every layer, BatchNorm before it in all but the first.
    """
    layers: list[nn.Module] = []
    for i, (below, width) in enumerate(itertools.pairwise([img_channels, *widths])):
        is_normed = has_batchnorm and i > 0
        layers.append(nn.Conv2d(below, width, 4, stride=2, padding=1, bias=not is_normed))
        layers += [nn.BatchNorm2d(width)] if is_normed else []
        layers.append(nn.LeakyReLU(LEAK, inplace=True))
    return nn.Sequential(*layers)


def up_stack(in_dim: int, widths: Sequence[int], img_channels: int, has_batchnorm: bool) -> nn.Sequential:
    """Vectors (N, in_dim) to images (N, img_channels, H, W) in [-1, 1], for H = W = 4 * 2 ** len(widths).

    widths: channels, finest first, as in `down_stack`. ReLU after every layer but the last, which ends in tanh;
    BatchNorm before it.
    """
    project = nn.Linear(in_dim, widths[-1] * COARSEST**2, bias=not has_batchnorm)
    layers: list[nn.Module] = [project, nn.Unflatten(1, (widths[-1], COARSEST, COARSEST))]
    for i in reversed(range(len(widths))):
        width, finer = widths[i], widths[i - 1] if i > 0 else img_channels
        has_bias = not has_batchnorm or i == 0
        layers += [nn.BatchNorm2d(width)] if has_batchnorm else []
        layers.append(nn.ReLU(inplace=True))
        layers.append(nn.ConvTranspose2d(width, finer, 4, stride=2, padding=1, bias=has_bias))
    return nn.Sequential(*layers, nn.Tanh())


def init_weights_(module: nn.Module, has_batchnorm: bool) -> None:
    """Initial weights, in place; biases 0.

    With BatchNorm DCGAN's: N(0, 0.02), BatchNorm's gains N(1, 0.02). Without it such weights would let signals fade
    from layer to layer: then normal with the standard deviation that keeps their size (arXiv:1502.01852).
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(layer.weight, 0.0, INIT_STD if has_batchnorm else math.sqrt(2 / _fan_in(layer)))
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, INIT_STD)
        bias: Tensor | None = getattr(layer, "bias", None)
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)


def _fan_in(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> float:
    """Inputs that each output is a sum over."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    num_taps = math.prod(layer.kernel_size)
    if isinstance(layer, nn.ConvTranspose2d):  # its taps are shared out over stride x stride outputs
        num_taps /= math.prod(layer.stride)
    return layer.in_channels * num_taps
