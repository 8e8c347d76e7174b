# SPDX-License-Identifier: MIT
"""Frechet distance between two Gaussians; on Inception features this is FID (arXiv:1706.08500, Eq. 6).

The matrix square root of the product of two covariances is not needed, only its trace. With symmetric roots
A = S1^(1/2) and B = S2^(1/2) that trace is the sum of the singular values of A B, which exists and is real
for rank-deficient covariances too, where a general matrix square root fails or returns complex numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """||mean1 - mean2||^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), computed in float64 on the CPU.

    mean: (D,); cov: (D, D), symmetric positive semi-definite. Never negative: what rounding puts below zero
    is zero. ValueError for shapes that do not fit together or values that are not finite.
    """
    mean1, cov1, mean2, cov2 = (x.detach().cpu().double() for x in (mean1, cov1, mean2, cov2))
    _check(mean1, cov1, mean2, cov2)
    squared_shift = (mean1 - mean2).square().sum()
    roots = _symmetric_root(cov1) @ _symmetric_root(cov2)
    trace_of_root = torch.linalg.svdvals(roots).sum()
    distance = squared_shift + cov1.trace() + cov2.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)


def _symmetric_root(cov: Tensor) -> Tensor:
    """Symmetric square root; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _check(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> None:
    dim = len(mean1) if mean1.ndim == 1 else -1
    for name, x, shape in (
        ("mean1", mean1, (dim,)),
        ("cov1", cov1, (dim, dim)),
        ("mean2", mean2, (dim,)),
        ("cov2", cov2, (dim, dim)),
    ):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} holds values that are not finite; the images or the network are broken")
