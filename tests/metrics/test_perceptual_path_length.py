# SPDX-License-Identifier: MIT
"""Perceptual path length: golden values of the official code on a toy generator, and the trimmed mean."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.perceptual_path_length import as_measure, path_distances, trimmed_mean

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_metrics.npz")


def normal(name, shape):
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)).float()


def toy_image(w):
    """Style vectors (N, 6) to images (N, 3, 512, 512)."""
    small = torch.tanh(0.2 * w @ normal("pub:toyG.B", (3 * 64, 6)).T).view(-1, 3, 8, 8)
    return small.repeat_interleave(64, dim=2).repeat_interleave(64, dim=3)


def toy_distance(a, b):
    """Squared distance of means over 8 x 8 blocks, the features of the reference."""
    assert a.shape[2:] == (256, 256)
    difference = torch.nn.functional.avg_pool2d((a - b) / 255, 32)
    return difference.square().sum(dim=(1, 2, 3))


def test_distances_equal_the_reference():
    torch.manual_seed(11)
    torch.rand(3)  # the official code draws places on the path, and then puts them all at the start
    starts, ends = (torch.randn(6, 4) @ normal("pub:toyG.A", (6, 4)).T).chunk(2)

    def paths(items, epsilon):
        assert epsilon == 1e-4
        return toy_image(starts[items]), toy_image(starts[items].lerp(ends[items], 1e-2))

    distances = as_measure(paths, toy_distance)(np.arange(3))[:, 0] * 1e-8 / 1e-4
    np.testing.assert_allclose(distances, GOLDEN["ppl_toy_dist_seed11"], rtol=1e-4)


def test_passes_are_small_and_do_not_matter():
    """A map of VGG16 for 64 images takes a gigabyte."""
    sizes = []

    def paths(items, epsilon):
        sizes.append(len(items))
        x = torch.from_numpy(items).float()[:, None, None, None].expand(-1, 3, 16, 16)
        return x, x * (1 + epsilon)

    distances = as_measure(paths, lambda a, b: (a - b).square().mean((1, 2, 3)))(np.arange(1, 20))
    assert sizes == [8, 8, 3] and distances.shape == (19, 1)
    np.testing.assert_allclose(distances[:, 0], (127.5 * np.arange(1, 20)) ** 2, rtol=0.02)


def test_small_images_are_not_averaged():
    seen = []
    first, second = torch.full((2, 3, 64, 64), -1.0), torch.ones(2, 3, 64, 64)
    path_distances(first, second, lambda a, b: seen.extend([a, b]) or a.mean((1, 2, 3)))
    assert seen[0].shape == (2, 3, 64, 64) and not seen[0].any() and (seen[1] == 255).all()


def test_trimmed_mean_equals_the_reference():
    distances = GOLDEN["ppl_dist"]
    assert trimmed_mean(distances) == pytest.approx(float(GOLDEN["ppl_trimmed"][2]), rel=1e-6)
    low, high = GOLDEN["ppl_trimmed"][:2]
    kept = [float(d) for d in distances if low <= d <= high]
    assert trimmed_mean(distances) == pytest.approx(sum(kept) / len(kept))
