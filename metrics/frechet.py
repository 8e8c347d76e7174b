# SPDX-License-Identifier: MIT
"""Frechet distance between two Gaussians; on Inception features this is FID (arXiv:1706.08500, Eq. 6).

The matrix square root of the product of two covariances is not needed, only its trace. With S1 = F F^T that is the
sum of the square roots of the eigenvalues of F^T S2 F, a symmetric matrix, and with S2 = H H^T as well the sum of the
singular values of F^T H. Both exist and are real for rank-deficient covariances too, where a general matrix square
root fails or returns complex numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Error of the trace, relative to the sum of both covariances' traces, that the fast way may have. At a
# distance of a thousandth of that sum it is a millionth of the distance.
TRACE_TOLERANCE = 1e-9
_EPS = torch.finfo(torch.float64).eps


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """||mean1 - mean2||^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), computed in float64 on the CPU.

    mean: (D,); cov: (D, D), symmetric positive semi-definite. Never negative: what rounding puts below zero
    is zero. ValueError for shapes that do not fit together or values that are not finite.
    """
    mean1, cov1, mean2, cov2 = (x.detach().cpu().double() for x in (mean1, cov1, mean2, cov2))
    _check(mean1, cov1, mean2, cov2)
    squared_shift = (mean1 - mean2).square().sum()
    distance = squared_shift + cov1.trace() + cov2.trace() - 2 * trace_of_root(cov1, cov2)
    return max(float(distance), 0.0)


def frechet_distance_of_features(features1: Tensor, features2: Tensor) -> float:
    """Frechet distance of two sets of features (N1, D) and (N2, D), with covariances divided by N.

    Where a set has fewer items than dimensions nothing of size D x D is factorised.
    """
    x1, x2 = (x.detach().cpu().double() for x in (features1, features2))
    if x1.ndim != 2 or x2.ndim != 2 or x1.shape[1] != x2.shape[1] or not len(x1) or not len(x2):
        raise ValueError(
            f"features have shapes {tuple(x1.shape)} and {tuple(x2.shape)}, expected (N, D) twice"
        )
    mean1, mean2 = x1.mean(dim=0), x2.mean(dim=0)
    x1, x2 = (x1 - mean1) / len(x1) ** 0.5, (x2 - mean2) / len(x2) ** 0.5
    if max(len(x1), len(x2)) > x1.shape[1]:
        return frechet_distance(mean1, x1.T @ x1, mean2, x2.T @ x2)
    _check_finite("a feature", x1, x2)
    trace_of_root = torch.linalg.svdvals(x1 @ x2.T).sum()
    distance = (mean1 - mean2).square().sum() + x1.square().sum() + x2.square().sum() - 2 * trace_of_root
    return max(float(distance), 0.0)


def trace_of_root(cov1: Tensor, cov2: Tensor) -> float:
    """tr (cov1 cov2)^(1/2) of symmetric positive semi-definite matrices (D, D), float64.

    The fast way is a Cholesky factor of one matrix and eigenvalues of a symmetric one, and says how far it may be
    off: eigenvalues are exact to rounding of the largest, and the root magnifies that in small ones. Where that is
    too much, singular values replace eigenvalues. The factor of a rank-deficient matrix comes from its eigenvectors,
    without the directions in which there is nothing but rounding.
    """
    variances1, variances2 = cov1.diagonal(), cov2.diagonal()
    used = (variances1 > _EPS * variances1.max()) & (variances2 > _EPS * variances2.max())
    cov1, cov2 = cov1[used][:, used], cov2[used][:, used]  # a constant feature contributes nothing
    if not len(cov1):
        return 0.0
    factor1, factor2 = _triangular_factor(cov1), _triangular_factor(cov2)
    if factor1 is None or factor2 is None:
        if factor2 is None and factor1 is not None:
            cov1, cov2, factor2 = cov2, cov1, factor1
        factor1 = _factor(
            cov1
        )  # of the matrix that is rank deficient: directions without variance are left out
    trace, error = _trace_through(factor1, cov2)
    if error <= TRACE_TOLERANCE * float(cov1.trace() + cov2.trace()):
        return trace
    factor2 = _factor(cov2) if factor2 is None else factor2
    return float(torch.linalg.svdvals(factor1.T @ factor2).sum())


def _trace_through(factor: Tensor, cov: Tensor) -> tuple[float, float]:
    """(sum of the roots of the eigenvalues of factor^T cov factor, estimate of its error)."""
    inner = factor.T @ cov @ factor
    values = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0)
    roots = values.sqrt()
    noise = float(len(values) ** 0.5 * _EPS * values.max())  # of each eigenvalue
    is_noise = values <= 4 * noise
    # Roots of noise are positive and add up; errors of the others have either sign and add as squares do.
    error = float(is_noise.sum()) * (4 * noise) ** 0.5 + float((noise / 2 / roots[~is_noise]).norm())
    return float(roots.sum()), error


def _triangular_factor(cov: Tensor) -> Tensor | None:
    """Cholesky factor (D, D); None if the matrix is singular to rounding."""
    factor, info = torch.linalg.cholesky_ex((cov + cov.T) / 2)
    if int(info) != 0:
        return None
    pivots = factor.diagonal().square()
    return factor if bool(pivots.min() > len(cov) * _EPS * pivots.max()) else None


def _factor(cov: Tensor) -> Tensor:
    """F (D, rank) with F F^T = cov, without the directions whose variance is rounding."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    kept = values > len(cov) * _EPS * values.abs().max()
    return vectors[:, kept] * values[kept].sqrt()


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
        _check_finite(name, x)


def _check_finite(name: str, *values: Tensor) -> None:
    if not all(torch.isfinite(x).all() for x in values):
        raise ValueError(f"{name} holds values that are not finite; the images or the network is broken")
