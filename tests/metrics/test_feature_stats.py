# SPDX-License-Identifier: MIT
"""Streaming statistics against the reference numbers, against NumPy, and through a file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.feature_stats import FeatureStats

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_metrics.npz")


def stats_of(features, batch_size=None, max_items=None):
    stats = FeatureStats(max_items=max_items)
    for batch in torch.as_tensor(features).split(batch_size or len(features)):
        stats.append(batch)
    return stats


@pytest.mark.parametrize("name", ["real", "gen"])
def test_mean_and_covariance_equal_the_reference(name):
    stats = stats_of(GOLDEN[name])
    np.testing.assert_allclose(stats.mean(), GOLDEN[f"{name}_mean"], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(stats.covariance(), GOLDEN[f"{name}_cov"], rtol=1e-11, atol=1e-13)


def test_covariance_is_divided_by_n():
    features = torch.randn(7, 3)
    expected = np.cov(features.numpy().astype(np.float64), rowvar=False, bias=True)
    np.testing.assert_allclose(stats_of(features).covariance(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_matter(batch_size):
    whole, parts = stats_of(GOLDEN["real"]), stats_of(GOLDEN["real"], batch_size)
    assert parts.num_items == whole.num_items == 400
    torch.testing.assert_close(parts.mean(), whole.mean(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.covariance(), whole.covariance(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("batch_size", [64, 100, 400])
def test_items_beyond_the_limit_are_cut(batch_size):
    stats = stats_of(GOLDEN["real"], batch_size, max_items=100)
    assert stats.num_items == 100 and stats.is_full
    np.testing.assert_allclose(stats.mean(), GOLDEN["real_first100_mean"], rtol=1e-12, atol=1e-14)


def test_sums_are_float64():
    features = torch.tensor([[1e4], [1e4 + 1]]).repeat(5000, 1)  # float32 sums of squares lose the variance
    torch.testing.assert_close(stats_of(features, 100).covariance().item(), 0.25, rtol=1e-6, atol=0)


def test_merged_parts_equal_the_whole():
    features = torch.as_tensor(GOLDEN["real"])
    merged = stats_of(features[:150])
    merged.merge(stats_of(features[150:]))
    merged.merge(FeatureStats())
    whole = stats_of(features)
    assert merged.num_items == 400 and merged.num_features == 24
    torch.testing.assert_close(merged.covariance(), whole.covariance(), rtol=1e-11, atol=1e-13)


def test_merging_does_not_share_memory():
    part, total = stats_of(torch.ones(2, 3)), FeatureStats()
    total.merge(part)
    total.append(torch.zeros(2, 3))
    assert part.mean().tolist() == [1, 1, 1] and total.mean().tolist() == [0.5, 0.5, 0.5]


def test_file_gives_back_the_same_numbers(tmp_path):
    stats = stats_of(GOLDEN["real"])
    stats.save(tmp_path / "folder" / "stats.npz")
    loaded = FeatureStats.load(tmp_path / "folder" / "stats.npz")
    assert loaded.num_items == 400
    assert torch.equal(loaded.mean(), stats.mean()) and torch.equal(loaded.covariance(), stats.covariance())


def write_text(path):
    path.write_text("not an archive")


def write_nothing(path):
    path.write_bytes(b"")


def cut_short(path):
    stats_of(torch.ones(2, 3)).save(path)
    path.write_bytes(path.read_bytes()[:-40])


def flip_bits(path):
    stats_of(torch.ones(2, 3)).save(path)
    data = bytearray(path.read_bytes())
    middle = data.index(b"outer_sum.npy") + 150
    data[middle : middle + 8] = bytes(x ^ 0xFF for x in data[middle : middle + 8])
    path.write_bytes(data)


def write_other_arrays(path):
    np.savez(path, mean=np.zeros(3))


def write_pickle(path):
    np.savez(path, format=np.array([{}], dtype=object))


def write_misfits(path):
    np.savez(
        path, format="stylesan-feature-stats-1", num_items=2, sum=np.zeros(3), outer_sum=np.zeros((2, 2))
    )


@pytest.mark.parametrize(
    "damage",
    [write_text, write_nothing, cut_short, flip_bits, write_other_arrays, write_pickle, write_misfits],
)
def test_unreadable_files_are_value_errors(tmp_path, damage):
    path = tmp_path / "stats.npz"
    damage(path)
    with pytest.raises(ValueError, match="not a readable statistics file"):
        FeatureStats.load(path)


def test_absent_file():
    with pytest.raises(FileNotFoundError):
        FeatureStats.load("absent.npz")


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="max_items=0"):
        FeatureStats(max_items=0)
    with pytest.raises(ValueError, match=r"shape \(N, D\)"):
        FeatureStats().append(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="4 features per item after 3"):
        stats = stats_of(torch.zeros(2, 3))
        stats.append(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no features"):
        FeatureStats().mean()
    with pytest.raises(ValueError, match="no features"):
        FeatureStats().save("unused.npz")
    with pytest.raises(ValueError, match="exceed max_items=3"):
        stats_of(torch.zeros(2, 3), max_items=3).merge(stats_of(torch.zeros(2, 3)))
