# SPDX-License-Identifier: MIT
"""Frechet distance: reference numbers, closed forms, SciPy's matrix square root, speed, and broken input."""

import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics import frechet
from metrics.feature_stats import FeatureStats
from metrics.frechet import frechet_distance, frechet_distance_of_features, trace_of_root

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


def known_roots(dim, rank1, rank2, decay=30.0):
    """Covariances of the given ranks, made of factors whose product has known singular values; and their sum."""
    scales = torch.exp(-torch.arange(dim, dtype=torch.float64) / decay)[:, None]
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    factor1 = rotation @ (scales * torch.randn(dim, rank1, dtype=torch.float64)) / rank1**0.5
    factor2 = rotation @ (scales * torch.randn(dim, rank2, dtype=torch.float64)) / rank2**0.5
    truth = torch.linalg.svdvals(factor1.T @ factor2).sum().item()
    return factor1 @ factor1.T, factor2 @ factor2.T, truth


@pytest.mark.parametrize(
    ("rank1", "rank2"), [(600, 600), (50, 600), (600, 50), (50, 40), (40, 50), (120, 100), (1, 1)]
)
@pytest.mark.parametrize("decay", [1e9, 100.0, 10.0])
def test_trace_of_root_is_exact_for_every_rank(rank1, rank2, decay):
    cov1, cov2, truth = known_roots(120, rank1, rank2, decay)
    assert trace_of_root(cov1, cov2) == pytest.approx(truth, rel=1e-7)


def test_constant_features_change_nothing():
    cov1, cov2, truth = known_roots(30, 90, 90)
    padded1, padded2 = (torch.nn.functional.pad(cov, [0, 5, 0, 5]) for cov in (cov1, cov2))
    padded2[30:, 30:] = torch.eye(5)  # constant in one of the two
    assert trace_of_root(padded1, padded2) == pytest.approx(truth, rel=1e-9)
    assert trace_of_root(torch.zeros(3, 3), torch.eye(3)) == 0


def test_ill_conditioned_covariances_take_the_exact_way(monkeypatch):
    """Eigenvalues alone would be off where variances span the whole of float64."""
    calls = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(frechet.torch.linalg, "svdvals", lambda x: calls.append(x.shape) or svdvals(x))
    rotation, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))
    variances = torch.logspace(0, -11, 60, dtype=torch.float64)
    cov = rotation @ variances.diag() @ rotation.T
    assert trace_of_root(cov, cov) == pytest.approx(variances.sum().item(), rel=1e-9)
    assert calls


@pytest.mark.parametrize(("num1", "num2"), [(100, 80), (10, 80), (80, 10), (10, 9), (1, 5)])
def test_features_give_what_their_moments_give(num1, num2):
    x, y = torch.randn(num1, 24), torch.randn(num2, 24) * 2 + 0.3
    expected = frechet_distance(*moments(x), *moments(y))
    assert frechet_distance_of_features(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance_of_features(x, x) < 1e-9


def test_features_that_do_not_fit_are_refused():
    for x, y in ((torch.zeros(2, 3), torch.zeros(2, 4)), (torch.zeros(0, 3), torch.zeros(2, 3))):
        with pytest.raises(ValueError, match="features have shapes"):
            frechet_distance_of_features(x, y)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance_of_features(torch.full((2, 3), torch.nan), torch.zeros(2, 3))


@pytest.mark.slow
def test_is_eight_times_as_fast_as_a_general_matrix_root():
    cov1, cov2, truth = known_roots(2048, 6000, 6000, decay=350.0)
    times = []
    for root in (trace_of_root, lambda a, b: np.trace(scipy.linalg.sqrtm((a @ b).numpy())).real):
        best = float("inf")
        for _ in range(3 if root is trace_of_root else 1):
            start = time.perf_counter()
            value = root(cov1, cov2)
            best = min(best, time.perf_counter() - start)
        assert value == pytest.approx(truth, rel=1e-6)
        times.append(best)
    assert times[1] > 8 * times[0], times
