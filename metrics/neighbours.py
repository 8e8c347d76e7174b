# SPDX-License-Identifier: MIT
"""Distances between two sets of features, in blocks: what precision, recall, density and coverage are made of.

Beside the features there are never more than one BLOCK x BLOCK of float32 distances, what is compared with it, and two
blocks of features: 64 MiB each for VGG16's 4,096, 400 MiB in all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metrics.image_input import full_precision
from torch_utils.errors import UserError

BLOCK = 4096  # rows and columns of distances at a time


class Distances:
    """Euclidean distances from points (M, D) to probes (N, D), one block at a time.

    half: features and distances are rounded to float16 as in the official code, for its exact numbers; float32 else.
    """

    def __init__(
        self, points: Tensor, probes: Tensor, device: torch.device | str = "cpu", half: bool = False
    ) -> None:
        if points.ndim != 2 or probes.ndim != 2 or points.shape[1] != probes.shape[1]:
            shapes = f"{tuple(points.shape)} and {tuple(probes.shape)}"
            raise ValueError(f"features have shapes {shapes}, expected (M, D) and (N, D)")
        self.points, self.probes, self.half = points, probes, half
        self.device = torch.device(device)
        # Distances do not depend on the origin, but the products that they are made of lose digits far from it.
        self._origin = mean_of(points).to(self.device)

    def blocks(self, is_upper: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
        """(points, probes, their distances, float32 (points, probes) on the device), by turns.

        is_upper: only blocks on and above the diagonal, which hold every pair where the points are the probes too.
        """
        for rows in blocks_of(len(self.points)):
            a = self._load(self.points[rows])
            lengths = a.square().sum(dim=1)[:, None]
            for columns in blocks_of(len(self.probes)):
                if not (is_upper and columns.stop <= rows.start):
                    yield rows, columns, self._between(a, lengths, self._load(self.probes[columns]))

    def _between(self, a: Tensor, lengths: Tensor, b: Tensor) -> Tensor:
        """lengths: the squared ones of a, (rows, 1)."""
        with full_precision():
            squared = torch.addmm(b.square().sum(dim=1)[None], a, b.T, alpha=-2)
        distances = squared.add_(lengths).clamp_(min=0).sqrt_()
        return distances.half().float() if self.half else distances

    def _load(self, features: Tensor) -> Tensor:
        if self.half:
            features = features.half()
        return features.to(self.device).float() - self._origin


def radii(points: Tensor, k: int, device: torch.device | str = "cpu", half: bool = False) -> Tensor:
    """Distance of each point (M, D) to its k-th nearest other point, float32 (M,) on the device.

    Each pair is looked at once. UserError when there are not more than k points.
    """
    if len(points) <= k:
        raise UserError(f"{len(points)} images have no {k} neighbours each; take more images")
    # A point is its own nearest; equal points too, so that leaving the diagonal out would not be the same.
    nearest = torch.full((len(points), k + 1), torch.inf, device=device)
    for rows, columns, block in Distances(points, points, device, half).blocks(is_upper=True):
        nearest[rows] = _with_smallest(nearest[rows], block, 1)
        if columns != rows:
            nearest[columns] = _with_smallest(nearest[columns], block, 0)
    return nearest[:, k]


def _with_smallest(nearest: Tensor, block: Tensor, dim: int) -> Tensor:
    """The smallest numbers of `nearest` (n, k) and of `block` along `dim`, ascending, (n, k)."""
    k = nearest.shape[1]
    found = block.topk(min(k, block.shape[dim]), dim=dim, largest=False, sorted=False).values
    candidates = torch.cat([nearest, found if dim == 1 else found.T], dim=1)
    return candidates.topk(k, dim=1, largest=False, sorted=True).values


def mean_of(features: Tensor) -> Tensor:
    """Mean, float32 (D,), summed in float64 a block at a time."""
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    for rows in blocks_of(len(features)):
        total += features[rows].double().sum(dim=0).cpu()
    return (total / max(len(features), 1)).float()


def blocks_of(count: int) -> Iterator[slice]:
    """0 ... count in parts of BLOCK."""
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))
