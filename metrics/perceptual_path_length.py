# SPDX-License-Identifier: MIT
"""Perceptual path length (arXiv:1812.04948, Section 4.1): how far images move under a tiny step in latent space.

`ppl2_wend`: in W, at the ends of paths, as StyleGAN2 measures it. The generator's side, two images for each item whose
style vectors are EPSILON of a path apart, is a callable.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-4  # share of the path between the two images
IMG_RESOLUTION = 256  # larger images are averaged down to this side before they are compared
# Through the generator and LPIPS at a time: maps of VGG16 take 70 MB for an image of 256 px.
PATHS_PER_PASS = 8
TRIMMED_PERCENT = 1.0  # of the smallest and of the largest distances are left out

# (items, epsilon) -> images (n, 3, H, W) in about [-1, 1], at the start of each item's path and epsilon of it further
DrawPaths = Callable[[np.ndarray, float], tuple[Tensor, Tensor]]


def path_distances(
    first: Tensor,
    second: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor],
    epsilon: float = EPSILON,
) -> Tensor:
    """Distances (N,) of images (N, 3, H, W) in [-1, 1], divided by epsilon squared.

    distance: LPIPS of two batches in 0..255, (N,): a squared distance of features.
    """
    return distance(_prepare(first), _prepare(second)) / epsilon**2


def _prepare(images: Tensor) -> Tensor:
    factor = images.shape[2] // IMG_RESOLUTION
    if factor > 1:
        images = F.avg_pool2d(images, factor)
    return (images + 1) * (255 / 2)


def trimmed_mean(distances: np.ndarray) -> float:
    """Mean without the tails: from the 1st to the 99th percentile, both of them values that occur, and included."""
    low = np.percentile(distances, TRIMMED_PERCENT, method="lower")
    high = np.percentile(distances, 100 - TRIMMED_PERCENT, method="higher")
    return float(distances[(distances >= low) & (distances <= high)].mean(dtype=np.float64))


def as_measure(
    paths: DrawPaths, distance: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[np.ndarray], Tensor]:
    """items -> distances (n, 1): what one pass collects."""

    @torch.inference_mode()
    def measure(items: np.ndarray) -> Tensor:
        starts = range(0, len(items), PATHS_PER_PASS)
        parts = [path_distances(*paths(items[i : i + PATHS_PER_PASS], EPSILON), distance) for i in starts]
        return torch.cat(parts)[:, None]

    return measure
