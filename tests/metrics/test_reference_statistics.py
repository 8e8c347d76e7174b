# SPDX-License-Identifier: MIT
"""Reference statistics in the .npz files of EDM, ADM and clean-fid: read, written, and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import reference_statistics
from metrics.detectors import DETECTORS
from metrics.feature_stats import FeatureStats
from metrics.features import Lite0Detector
from metrics.inception import NUM_FEATURES, NUM_SFID
from metrics.reference_statistics import read_statistics, write_statistics
from torch_utils.errors import UserError

SIZE = 6
TRUE_SIZES, TRUE_SFID_SHAPE = reference_statistics.NUM_FEATURES, reference_statistics.SFID_SHAPE


@pytest.fixture(autouse=True)
def small_detectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors of six features; sFID's tap keeps its shape at a small scale."""
    sizes = {
        ("inception", "features"): SIZE,
        ("inception_clean", "features"): SIZE,
        ("inception", "sfid"): 12,
        ("lite0", "features"): 4,
    }
    monkeypatch.setattr(reference_statistics, "NUM_FEATURES", sizes)
    monkeypatch.setattr(reference_statistics, "SFID_SHAPE", (3, 2, 2))


def stats_of(features: np.ndarray) -> FeatureStats:
    stats = FeatureStats()
    stats.append(torch.from_numpy(features))
    return stats


def random_features(count: int = 40, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, size)) @ np.diag(np.arange(1.0, size + 1))


def test_sizes_are_the_detectors() -> None:
    assert TRUE_SIZES["inception", "features"] == TRUE_SIZES["inception_clean", "features"] == NUM_FEATURES
    assert TRUE_SIZES["inception_random", "features"] == NUM_FEATURES
    assert TRUE_SIZES["inception", "sfid"] == NUM_SFID == np.prod(TRUE_SFID_SHAPE)
    assert TRUE_SIZES["lite0", "features"] == Lite0Detector.num_features
    assert {name for name, _ in TRUE_SIZES} == set(DETECTORS)


def test_a_foreign_file_serves_every_detector_of_its_size(tmp_path: Path) -> None:
    x = random_features()
    np.savez(tmp_path / "edm.npz", mu=x.mean(axis=0), sigma=np.cov(x, rowvar=False))
    found = read_statistics(tmp_path / "edm.npz")
    assert set(found.moments) == {("inception", "features"), ("inception_clean", "features")}
    assert (found.num_images, found.detector) == (None, None)
    stats = found.moments["inception", "features"]
    np.testing.assert_allclose(stats.mean(), x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance(), np.cov(x, rowvar=False), atol=1e-12)


def test_what_is_written_is_what_others_read_and_comes_back(tmp_path: Path) -> None:
    x, spatial = random_features(), random_features(40, 12)
    moments = {("inception", "features"): stats_of(x), ("inception", "sfid"): stats_of(spatial)}
    write_statistics(tmp_path / "ours.npz", moments, "weights-1", "images-1")
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(file["mu"], x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(x, rowvar=False), atol=1e-12)
        channels_last = spatial.reshape(40, 3, 2, 2).transpose(0, 2, 3, 1).reshape(40, 12)  # as ADM has them
        np.testing.assert_allclose(file["mu_s"], channels_last.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma_s"], np.cov(channels_last, rowvar=False), atol=1e-12)
    found = read_statistics(tmp_path / "ours.npz")
    assert (found.num_images, found.detector, found.detector_fingerprint) == (40, "inception", "weights-1")
    assert found.data_fingerprint == "images-1"
    assert set(found.moments) == set(moments)
    for kind, stats in moments.items():
        np.testing.assert_allclose(found.moments[kind].mean(), stats.mean(), rtol=1e-12)
        np.testing.assert_allclose(found.moments[kind].covariance(), stats.covariance(), atol=1e-12)


def test_single_precision_is_read(tmp_path: Path) -> None:
    x = random_features()
    np.savez(
        tmp_path / "f.npz",
        mu=x.mean(axis=0).astype(np.float32),
        sigma=np.cov(x, rowvar=False).astype(np.float32),
    )
    stats = read_statistics(tmp_path / "f.npz").moments["inception", "features"]
    np.testing.assert_allclose(stats.covariance(), np.cov(x, rowvar=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(2)}, "holds a, not mu and sigma"),
        (
            {"mu": np.zeros(5), "sigma": np.eye(5)},
            r"mean of shape \(5,\).*6 \(inception, inception_clean\), 4 \(lite0\)",
        ),
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, r"covariance of shape \(5, 5\)"),
        ({"mu": np.zeros((1, 6)), "sigma": np.eye(6)}, r"mean of shape \(1, 6\)"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "no finite numbers"),
        ({"mu": np.zeros(6, np.int64), "sigma": np.eye(6)}, "no finite numbers"),
        ({"mu": np.zeros(6), "sigma": np.triu(np.ones((6, 6)))}, "not symmetric"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}, r"12 \(sFID\)"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / "x.npz")


def test_no_file_and_no_npz(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_statistics(tmp_path / "x.npz")
    (tmp_path / "text.npz").write_text("mu")
    with pytest.raises(UserError, match=r"no \.npz file"):
        read_statistics(tmp_path / "text.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(6))
    with pytest.raises(UserError, match=r"no \.npz file"):  # nothing in it is executed
        read_statistics(tmp_path / "pickled.npz")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no covariance"):
        write_statistics(
            tmp_path / "x.npz", {("inception", "features"): stats_of(random_features(1))}, "w", "i"
        )
    with pytest.raises(UserError, match="sFID alone"):
        write_statistics(
            tmp_path / "x.npz", {("inception", "sfid"): stats_of(random_features(9, 12))}, "w", "i"
        )
    assert not list(tmp_path.iterdir())
