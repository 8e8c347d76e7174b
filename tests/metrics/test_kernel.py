# SPDX-License-Identifier: MIT
"""KID and CMMD: golden values, naive loops, properties, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import neighbours
from metrics.kernel import cmmd, draw_subsets, kernel_distance
from torch_utils.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_metrics.npz")
REAL, FAKE = torch.from_numpy(GOLDEN["real"]), torch.from_numpy(GOLDEN["gen"])


def test_kid_equals_the_reference_with_its_random_subsets():
    subsets = draw_subsets(len(FAKE), len(REAL), seed=5, num_subsets=20, max_subset_size=100)
    np.testing.assert_allclose(kernel_distance(FAKE, REAL, subsets), GOLDEN["kid_seed5"], rtol=1e-4)


def test_kid_of_one_subset_equals_the_reference():
    (subset,) = draw_subsets(len(FAKE), len(REAL), seed=0, num_subsets=1)
    np.testing.assert_array_equal(subset[0], GOLDEN["kid_single_idx_gen"])
    np.testing.assert_array_equal(subset[1], GOLDEN["kid_single_idx_real"])
    np.testing.assert_allclose(kernel_distance(FAKE, REAL, [subset]), GOLDEN["kid_single"], rtol=1e-4)


def test_kid_equals_a_loop_over_pairs():
    x, y = torch.randn(7, 5).double(), torch.randn(7, 5).double() + 0.5

    def mean_kernel(a, b, skip_equal):
        values = [
            (float(p @ q) / 5 + 1) ** 3
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (skip_equal and i == j)
        ]
        return sum(values) / len(values)

    expected = mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False)
    everything = [(np.arange(7), np.arange(7))]
    assert kernel_distance(x, y, everything) == pytest.approx(expected, rel=1e-5)


def test_kid_is_unbiased():
    """Sets of one distribution: below zero about as often as above, whatever their size."""
    values = [kernel_distance(*torch.randn(2, 20, 4), [(np.arange(20), np.arange(20))]) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / len(values) ** 0.5
    assert 0.2 < np.mean(np.array(values) < 0) < 0.8


def naive_cmmd(x, y):
    kernels = [torch.exp(-(a[:, None] - b[None]).square().sum(-1) / 200) for a, b in ((x, x), (y, y), (x, y))]
    return 1000 * float(kernels[0].mean() + kernels[1].mean() - 2 * kernels[2].mean())


def test_cmmd_equals_the_definition(monkeypatch):
    x, y = torch.randn(30, 6).double(), torch.randn(20, 6).double() + 2
    monkeypatch.setattr(neighbours, "BLOCK", 8)
    assert cmmd(x, y) == pytest.approx(naive_cmmd(x, y), rel=1e-5)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-6)


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="1 generated and 400 real images"):
        draw_subsets(1, 400, 0)
    with pytest.raises(UserError, match="0 generated"):
        cmmd(torch.zeros(0, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="features have shapes"):
        kernel_distance(torch.zeros(4, 3), torch.zeros(4, 2), [(np.arange(4), np.arange(4))])
