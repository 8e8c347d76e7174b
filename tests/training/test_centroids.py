# SPDX-License-Identifier: MIT
"""Centroids of w: known clusters are found, the same seed gives the same, files are read or refused."""

import numpy as np
import pytest
import torch

from torch_utils.errors import UserError
from training.centroids import compute_centroids, kmeans, load_centroids, sample_w, save_centroids
from training.generator.generator import Generator


@pytest.fixture
def small_network(tiny_generator_config):
    """small_network(c_dim) -> generator in evaluation mode."""
    return lambda c_dim: Generator(tiny_generator_config(c_dim)).eval().requires_grad_(False)


def sorted_rows(array):
    return array[np.lexsort(array.T[::-1])]


@pytest.mark.parametrize("seed", range(5))
def test_a_known_mixture_is_found(seed):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, 6)) * 10
    sizes = rng.integers(20, 400, size=12)
    samples = np.repeat(centres, sizes, axis=0) + rng.normal(size=(sizes.sum(), 6)) * 0.1
    found = kmeans(rng.permutation(samples).astype(np.float32), 12, seed)
    assert found.dtype == np.float32
    np.testing.assert_allclose(sorted_rows(found), sorted_rows(centres), atol=0.1)


def test_centroids_are_means_of_their_samples():
    samples = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    centroids = kmeans(samples, 7, seed=1)
    nearest = np.square(samples[:, None] - centroids).sum(axis=2).argmin(axis=1)
    means = np.stack([samples[nearest == k].mean(axis=0) for k in range(7)])
    np.testing.assert_allclose(centroids, means, atol=0.03)


def test_as_many_centroids_as_samples_and_repeated_samples():
    samples = np.arange(15, dtype=np.float32).reshape(5, 3)
    np.testing.assert_allclose(sorted_rows(kmeans(samples, 5)), samples)
    repeated = np.ones((6, 2), np.float32)
    np.testing.assert_array_equal(kmeans(repeated, 3), np.ones((3, 2)))


def test_same_seed_same_centroids(small_network):
    G = small_network(c_dim=3)
    first = compute_centroids(G, 4, num_samples=500, seed=1)
    assert first.shape == (4, 8) and first.dtype == torch.float32 and first.isfinite().all()
    assert torch.equal(first, compute_centroids(G, 4, num_samples=500, seed=1))
    assert not torch.equal(first, compute_centroids(G, 4, num_samples=500, seed=2))


def test_one_centroid_is_the_mean(small_network):
    G = small_network(c_dim=0)
    expected = sample_w(G, 1500, None, seed=0).mean(dim=0, keepdim=True)
    torch.testing.assert_close(compute_centroids(G, 1, num_samples=1500), expected, rtol=1e-5, atol=1e-6)


def test_only_the_given_classes_are_sampled(small_network):
    G = small_network(c_dim=3)
    z = torch.from_numpy(np.random.RandomState(0).randn(40, 4)).float()
    torch.testing.assert_close(sample_w(G, 40, [2], seed=0), G.mapping(z, torch.full((40,), 2))[:, 0])
    all_classes = sample_w(G, 3000, None, seed=0)
    assert sample_w(G, 3000, [0, 1, 2], seed=0).equal(all_classes)
    assert not sample_w(G, 3000, [0, 1], seed=0).equal(all_classes)


def test_files_round_trip(tmp_path):
    centroids = torch.randn(5, 8)
    save_centroids(tmp_path / "c.npy", centroids)
    assert load_centroids(tmp_path / "c.npy", 8).equal(centroids)
    np.save(tmp_path / "double.npy", centroids.double().numpy())
    assert load_centroids(tmp_path / "double.npy", 8).equal(centroids)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 7)), r"shape \(5, 7\); give a .npy file of shape \(K, 8\)"),
        (np.zeros(8), r"shape \(8,\)"),
        (np.zeros((0, 8)), r"shape \(0, 8\)"),
        (np.full((2, 8), np.nan), "not finite"),
        (np.full((2, 8), 1e300), "not finite"),
        (np.full((2, 8), "a"), "not finite"),
        (np.full((2, 8), None), "not a NumPy array file"),  # needs pickle, which is not read
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "c.npy", array)
    with pytest.raises(UserError, match=message):
        load_centroids(tmp_path / "c.npy", 8)


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "c.npz", a=np.zeros((2, 8)))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").write_text("")
    for name, message in (
        ("c.npz", "archive"),
        ("text.npy", "not a NumPy array file"),
        ("empty.npy", "not a NumPy array file"),
        ("absent.npy", "is not a file"),
        (".", "is not a file"),
    ):
        with pytest.raises(UserError, match=message):
            load_centroids(tmp_path / name, 8)


def test_more_centroids_than_samples_are_refused(small_network):
    with pytest.raises(UserError, match="11 centroids cannot be found among 10 samples"):
        compute_centroids(small_network(c_dim=0), 11, num_samples=10)
