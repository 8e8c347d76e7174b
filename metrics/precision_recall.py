# SPDX-License-Identifier: MIT
"""How real generated images are, and how much of the real ones is covered, from nearest neighbours of features.

Improved precision and recall: arXiv:1904.06991, Eqs. 1 and 2. Density and coverage: arXiv:2002.09797, Eqs. 4 and 6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metrics.neighbours import Distances, radii


class PrecisionRecall(NamedTuple):
    """Shares, 0 to 1."""

    precision: float  # of generated images that lie within the manifold of the real ones
    recall: float  # of real images that lie within the manifold of the generated ones


class DensityCoverage(NamedTuple):
    """1 for equal distributions: density in the mean, coverage at most."""

    density: float  # mean number of real images' neighbourhoods that a generated one lies in, over k
    coverage: float  # share of real images whose neighbourhood holds a generated one


def precision_recall(
    fake: Tensor, real: Tensor, k: int = 3, device: torch.device | str = "cpu", half: bool = False
) -> PrecisionRecall:
    """Of features (N, D) and (M, D). A manifold is all that is within a sample's distance to its k-th neighbour.

    half: float16 distances, which the official code has and which count ties and overflows as hits or misses.
    """
    real_limits, fake_limits = (radii(x, k, device, half) for x in (real, fake))
    is_real, is_covered = (torch.zeros(len(x), dtype=torch.bool, device=device) for x in (fake, real))
    for rows, columns, block in Distances(real, fake, device, half).blocks():
        is_real[columns] |= (block <= real_limits[rows, None]).any(dim=0)
        is_covered[rows] |= (block <= fake_limits[None, columns]).any(dim=1)
    return PrecisionRecall(int(is_real.sum()) / len(fake), int(is_covered.sum()) / len(real))


def density_coverage(
    fake: Tensor, real: Tensor, k: int = 5, device: torch.device | str = "cpu"
) -> DensityCoverage:
    """Of features (N, D) and (M, D). Neighbourhoods are open: of two equal sets the density is 1, not (k + 1) / k."""
    limits = radii(real, k, device)
    num_hits, is_covered = 0, torch.zeros(len(real), dtype=torch.bool, device=device)
    for rows, _, block in Distances(real, fake, device).blocks():
        hits = block < limits[rows, None]
        num_hits += int(hits.sum())
        is_covered[rows] |= hits.any(dim=1)
    return DensityCoverage(num_hits / (k * len(fake)), int(is_covered.sum()) / len(real))
