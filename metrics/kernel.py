# SPDX-License-Identifier: MIT
"""Kernel distances between sets of features: KID (arXiv:1801.01401) and CMMD (arXiv:2401.09603)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metrics.neighbours import blocks_of
from torch_utils.errors import UserError

NUM_SUBSETS, MAX_SUBSET_SIZE = 100, 1000  # of KID, as in the official code
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0

Subset = tuple[np.ndarray, np.ndarray]  # items of the generated and of the real set, int64 (m,) each


def draw_subsets(
    num_fake: int,
    num_real: int,
    seed: int,
    num_subsets: int = NUM_SUBSETS,
    max_subset_size: int = MAX_SUBSET_SIZE,
) -> list[Subset]:
    """Subsets, without replacement, of as many items as there are, at most max_subset_size.

    Drawn in the official code's order from NumPy's legacy generator, so that they are what it draws after
    `numpy.random.seed(seed)`.
    """
    size = min(num_fake, num_real, max_subset_size)
    if size < 2:
        raise UserError(f"KID of {num_fake} generated and {num_real} real images needs at least 2 of each")
    rng = np.random.RandomState(seed)
    return [
        (rng.choice(num_fake, size, replace=False), rng.choice(num_real, size, replace=False))
        for _ in range(num_subsets)
    ]


def kernel_distance(
    fake: Tensor, real: Tensor, subsets: list[Subset], device: torch.device | str = "cpu"
) -> float:
    """KID of features (N, D) and (M, D): unbiased squared MMD under k(x, y) = (x . y / D + 1)^3, mean over subsets.

    Of two sets with one distribution it is 0 in the mean, and may be negative. Kernels are float32, sums float64.
    """
    if fake.ndim != 2 or real.ndim != 2 or fake.shape[1] != real.shape[1]:
        raise ValueError(
            f"features have shapes {tuple(fake.shape)} and {tuple(real.shape)}, expected (N, D) twice"
        )
    total = 0.0
    for fake_items, real_items in subsets:
        x = fake[torch.from_numpy(fake_items)].to(device).float()
        y = real[torch.from_numpy(real_items)].to(device).float()
        size = len(x)
        within = sum(
            float(k.double().sum() - k.diagonal().double().sum()) for k in (_cubic(x, x), _cubic(y, y))
        )
        across = float(_cubic(x, y).double().sum())
        total += within / (size * (size - 1)) - 2 * across / size**2
    return total / len(subsets)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def cmmd(fake: Tensor, real: Tensor, device: torch.device | str = "cpu") -> float:
    """CMMD of embeddings of unit length (N, D) and (M, D): 1000 times the squared MMD, Gaussian kernel of sigma 10.

    It is the biased estimate of the published code (all pairs count, also each item with itself), which is never
    negative and 0 for equal sets; the unbiased one of the paper's Eq. 4 differs by at most 2000 * (1 / N + 1 / M)
    times the mean of 1 - k, about 0.0004 for 50,000 images. Blocks of pairs, summed in float64.
    """
    if not len(fake) or not len(real):
        raise UserError(f"CMMD of {len(fake)} generated and {len(real)} real images needs some of each")
    within = _mean_gaussian(fake, fake, device) + _mean_gaussian(real, real, device)
    return CMMD_SCALE * (within - 2 * _mean_gaussian(fake, real, device))


def _mean_gaussian(x: Tensor, y: Tensor, device: torch.device | str) -> float:
    total = 0.0
    for rows in blocks_of(len(x)):
        a = x[rows].to(device).float()
        for columns in blocks_of(len(y)):
            b = y[columns].to(device).float()
            squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2 * (a @ b.T)
            total += float(torch.expm1(squared.clamp_(min=0) / (-2 * CMMD_SIGMA**2)).double().sum())
    return total / (len(x) * len(y))  # of k - 1, which keeps the digits that k near 1 has lost
