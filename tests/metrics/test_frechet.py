# SPDX-License-Identifier: MIT
"""Frechet distance: reference numbers, closed forms, SciPy's matrix square root, and broken input."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics.feature_stats import FeatureStats
from metrics.frechet import frechet_distance

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_metrics.npz")


def moments(features):
    stats = FeatureStats()
    stats.append(torch.as_tensor(features))
    return stats.mean(), stats.covariance()


def random_covariance(dim, rank=None):
    factor = torch.randn(dim, rank or 2 * dim, dtype=torch.float64)
    return factor @ factor.T / factor.shape[1]


def test_equals_the_reference():
    distance = frechet_distance(*moments(GOLDEN["gen"]), *moments(GOLDEN["real"]))
    np.testing.assert_allclose(distance, GOLDEN["fid"], rtol=1e-6)


def test_equals_the_reference_for_rank_deficient_covariances():
    distance = frechet_distance(*moments(GOLDEN["gen_small"]), *moments(GOLDEN["real_small"]))
    np.testing.assert_allclose(distance, GOLDEN["fid_singular"], rtol=1e-2)


def test_equals_the_formula_with_a_general_matrix_root():
    mean1, mean2 = torch.randn(2, 12, dtype=torch.float64)
    cov1, cov2 = random_covariance(12), random_covariance(12)
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy())
    expected = (mean1 - mean2).square().sum() + np.trace(cov1 + cov2 - 2 * torch.from_numpy(root.real))
    np.testing.assert_allclose(frechet_distance(mean1, cov1, mean2, cov2), expected, rtol=1e-9)


def test_one_dimensional_gaussians():
    mean1, mean2, sigma1, sigma2 = 1.0, -2.0, 3.0, 0.5
    distance = frechet_distance(
        torch.tensor([mean1]), torch.tensor([[sigma1**2]]), torch.tensor([mean2]), torch.tensor([[sigma2**2]])
    )
    assert distance == pytest.approx((mean1 - mean2) ** 2 + (sigma1 - sigma2) ** 2, rel=1e-12)


def test_commuting_covariances():
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    variances1, variances2 = torch.rand(2, 6, dtype=torch.float64)
    cov1, cov2 = (rotation @ v.diag() @ rotation.T for v in (variances1, variances2))
    mean = torch.zeros(6)
    expected = (variances1.sqrt() - variances2.sqrt()).square().sum().item()
    assert frechet_distance(mean, cov1, mean, cov2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [3, 20])
def test_identical_gaussians_have_distance_zero(rank):
    mean, cov = torch.randn(10, dtype=torch.float64), random_covariance(10, rank)
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-6


def test_symmetry_and_shift():
    mean, cov1, cov2 = torch.randn(8, dtype=torch.float64), random_covariance(8), random_covariance(8, rank=4)
    there, back = frechet_distance(mean, cov1, mean, cov2), frechet_distance(mean, cov2, mean, cov1)
    assert there == pytest.approx(back, rel=1e-9)
    shifted = frechet_distance(mean + 2, cov1, mean, cov2)
    assert shifted == pytest.approx(there + 8 * 2**2, rel=1e-9)


def test_zero_covariances_leave_the_shift():
    zero = torch.zeros(3, 3)
    assert frechet_distance(torch.ones(3), zero, torch.zeros(3), zero) == pytest.approx(3)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(position, value):
    arguments = [torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2)]
    arguments[position].view(-1)[0] = value
    with pytest.raises(ValueError, match=rf"{('mean1', 'cov1', 'mean2', 'cov2')[position]} .*not finite"):
        frechet_distance(*arguments)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"cov2 has shape \(3, 3\), expected \(2, 2\)"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(3))
