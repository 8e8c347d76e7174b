# SPDX-License-Identifier: MIT
"""Precision, recall, density and coverage: golden values, naive definitions, blocks, bounded memory, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import neighbours
from metrics.neighbours import Distances, radii
from metrics.precision_recall import density_coverage, precision_recall
from torch_utils.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_metrics.npz")
REAL, FAKE = torch.from_numpy(GOLDEN["real"]), torch.from_numpy(GOLDEN["gen"])


def test_equals_the_reference_exactly():
    np.testing.assert_allclose(precision_recall(FAKE, REAL), GOLDEN["pr_fp32"], rtol=1e-6)


def test_half_distances_equal_the_reference():
    found = precision_recall(FAKE, REAL, half=True)
    np.testing.assert_allclose(found, GOLDEN["pr_fp16"], atol=0.01)
    assert found != precision_recall(FAKE, REAL)


def naive_radii(x, k):
    return torch.cdist(x.double(), x.double()).sort(dim=1).values[:, k]


def test_density_and_coverage_equal_the_definition():
    limits, distances = naive_radii(REAL, 5), torch.cdist(REAL.double(), FAKE.double())
    hits = distances < limits[:, None]
    found = density_coverage(FAKE, REAL)
    assert found.density == pytest.approx(hits.double().sum().item() / (5 * len(FAKE)))
    assert found.coverage == pytest.approx(hits.any(dim=1).double().mean().item())


@pytest.mark.parametrize("block", [1, 37, 300, 10_000])
def test_blocks_do_not_matter(monkeypatch, block):
    expected = precision_recall(FAKE, REAL), density_coverage(FAKE, REAL)
    monkeypatch.setattr(neighbours, "BLOCK", block)
    if block == 1:
        fake, real = FAKE[:30], REAL[:20]
        pair = precision_recall(fake, real), density_coverage(fake, real)
        monkeypatch.undo()
        assert pair == (precision_recall(fake, real), density_coverage(fake, real))
        return
    assert (precision_recall(FAKE, REAL), density_coverage(FAKE, REAL)) == expected


def test_equal_sets_are_perfect_and_far_ones_are_not():
    assert tuple(precision_recall(REAL, REAL)) == (1, 1)
    assert tuple(density_coverage(REAL, REAL)) == pytest.approx((1, 1))
    assert tuple(precision_recall(REAL + 100, REAL)) == tuple(density_coverage(REAL + 100, REAL)) == (0, 0)


def test_features_far_from_the_origin_keep_their_digits():
    x, y = torch.rand(40, 8), torch.rand(30, 8)
    near, far = (precision_recall(y + shift, x + shift) for shift in (0, 1000))
    assert near == pytest.approx(far, abs=0.05)
    np.testing.assert_allclose(radii(x + 1000, 3), naive_radii(x + 1000, 3), rtol=1e-3)


@pytest.mark.parametrize("block", [3, 16, 40, 64])
def test_radii_are_those_of_the_sorted_distances(monkeypatch, block):
    """Blocks smaller than k too, of which each is looked at once though it counts for rows and columns."""
    monkeypatch.setattr(neighbours, "BLOCK", block)
    for k in (1, 5, 39):
        torch.testing.assert_close(
            radii(REAL[:40], k).double(), naive_radii(REAL[:40], k), rtol=1e-5, atol=1e-5
        )


def test_blocks_hold_every_pair_once(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 16)
    found = torch.zeros(20, 50, dtype=torch.float64)
    for rows, columns, block in Distances(REAL[:20], FAKE[:50]).blocks():
        found[rows, columns] += block.double()
    expected = torch.cdist(REAL[:20].double(), FAKE[:50].double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upper = torch.zeros(40, 40)
    for rows, columns, block in Distances(REAL[:40], REAL[:40]).blocks(is_upper=True):
        upper[rows, columns] += torch.ones_like(block)
    assert (
        torch.equal(upper.maximum(upper.T), torch.ones(40, 40)) and upper.sum() == 40**2 - 16**2 - 2 * 16 * 8
    )


def test_memory_is_that_of_blocks(monkeypatch):
    """No array of all distances (64 MB here) is made; torch's own allocations are counted by a profiler."""
    monkeypatch.setattr(neighbours, "BLOCK", 256)
    x, y = torch.randn(4000, 4), torch.randn(4000, 4)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        density_coverage(x, y)
    largest = max(event.self_cpu_memory_usage / max(event.count, 1) for event in profile.key_averages())
    assert 0 < largest <= 4 * 2**20


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="3 images have no 3 neighbours each"):
        precision_recall(torch.randn(10, 4), torch.randn(3, 4))
    with pytest.raises(ValueError, match="features have shapes"):
        Distances(torch.randn(3, 4), torch.randn(3, 5))
