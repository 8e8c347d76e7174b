# SPDX-License-Identifier: MIT
"""Mean and covariance of a reference set in the .npz files that others publish: EDM's, ADM's and clean-fid's.

Keys `mu` (D,) and `sigma` (D, D), in ADM's files also `mu_s` and `sigma_s` for sFID. Such a file does not say which
network it was made with; ours add that, the number of images and what they are. `sigma` is divided by N - 1.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from metrics.feature_stats import FeatureStats
from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError

Kind = tuple[str, str]  # detector and tap

FORMAT = "stylesan-reference-1"
SFID_SHAPE = (7, 17, 17)  # channels, rows, columns; ADM's files have the channels last
NUM_FEATURES: dict[Kind, int] = {
    ("inception", "features"): 2048,
    ("inception_clean", "features"): 2048,
    ("inception_random", "features"): 2048,
    ("inception", "sfid"): 2023,
    ("dinov2", "features"): 1024,
    ("clip", "features"): 768,
    ("vgg16", "features"): 4096,
    ("lite0", "features"): 320,
}
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile)


@dataclass(frozen=True)
class ReferenceStatistics:
    """What a file holds."""

    moments: dict[Kind, FeatureStats]  # a file of others serves every detector with as many features
    num_images: int | None = None  # None = the file does not say
    detector: str | None = None  # name; None = the file does not say
    detector_fingerprint: str | None = None  # None = the file does not say
    data_fingerprint: str | None = None  # of the images; None = the file does not say


def read_statistics(path: str | os.PathLike[str]) -> ReferenceStatistics:
    """The statistics in a file. Raises UserError if it is none, or of a size that no detector here has."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give an .npz file with mu and sigma") from error
    except (*_UNREADABLE, AttributeError) as error:  # AttributeError: a single array, as in .npy files
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
        raise UserError(f"{path} is no .npz file of arrays ({reason}); give one with mu and sigma") from error
    if "mu" not in arrays or "sigma" not in arrays:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(f"{path} holds {found}, not mu and sigma; give a file of reference statistics")
    is_ours = str(arrays.get("format")) == FORMAT
    try:
        num_images = int(arrays["num_images"]) if is_ours else None
        names = [str(arrays[name]) if is_ours else None for name in _TEXTS]
    except _UNREADABLE as error:
        raise UserError(f"{path} is damaged: it does not say what it was made of; make it again") from error
    moments = _pooled(path, arrays, names[0], num_images)
    if "mu_s" in arrays and "sigma_s" in arrays and names[0] in (None, "inception"):
        order = _channels_first()
        mean, cov = _checked(
            path, arrays["mu_s"], arrays["sigma_s"], {NUM_FEATURES["inception", "sfid"]: "sFID"}
        )
        moments["inception", "sfid"] = _as_stats(mean[order], cov[np.ix_(order, order)], num_images)
    return ReferenceStatistics(moments, num_images, *names)


def write_statistics(
    path: str | os.PathLike[str],
    moments: Mapping[Kind, FeatureStats],
    detector_fingerprint: str,
    data_fingerprint: str,
) -> None:
    """Write the moments of one detector's features, and of sFID's tap if they are there, atomically.

    Raises UserError for fewer than two images, or a file that cannot be written.
    """
    (detector,) = {name for name, _ in moments}
    stats = next(iter(moments.values()))
    if stats.num_items < 2:
        raise UserError(f"{stats.num_items} image has no covariance; take at least 2")
    arrays: dict[str, np.ndarray] = {}
    if (pooled := moments.get((detector, "features"))) is not None:
        arrays |= {"mu": pooled.mean().numpy(), "sigma": _unbiased(pooled)}
    if (spatial := moments.get((detector, "sfid"))) is not None:
        order = np.argsort(_channels_first())
        arrays |= {"mu_s": spatial.mean().numpy()[order], "sigma_s": _unbiased(spatial)[np.ix_(order, order)]}
    if "mu" not in arrays:
        raise UserError("statistics of sFID alone fit no format; add fid50k_full to the metrics")
    values = (detector, detector_fingerprint, data_fingerprint)
    arrays |= {name: np.array(value) for name, value in zip(_TEXTS, values, strict=True)}
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, format=np.array(FORMAT), num_images=np.array(stats.num_items), **arrays)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another file") from error


_TEXTS = ("detector", "detector_fingerprint", "data_fingerprint")  # keys that only our files have


def _pooled(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    detector: str | None,
    num_images: int | None,
) -> dict[Kind, FeatureStats]:
    """mu and sigma, for the detector that the file names, or for all that have as many features."""
    sizes: dict[int, str] = {}
    for (name, tap), size in NUM_FEATURES.items():
        if tap == "features" and detector in (None, name):
            sizes[size] = f"{sizes[size]}, {name}" if size in sizes else name
    stats = _as_stats(*_checked(path, arrays["mu"], arrays["sigma"], sizes), num_images)
    users = [kind for kind, size in NUM_FEATURES.items() if size == stats.num_features]
    return {kind: stats for kind in users if kind[1] == "features" and detector in (None, kind[0])}


def _checked(
    path: str | os.PathLike[str], mean: np.ndarray, cov: np.ndarray, sizes: Mapping[int, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, if their shapes fit together and to a detector, their values are finite, cov symmetric."""
    known = ", ".join(f"{size} ({names})" for size, names in sizes.items())
    if mean.ndim != 1 or len(mean) not in sizes or cov.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: a mean of shape {mean.shape} and a covariance of shape {cov.shape} are those of no detector "
            f"here, which have so many features: {known or 'none'}; give another file"
        )
    is_number = np.issubdtype(mean.dtype, np.floating) and np.issubdtype(cov.dtype, np.floating)
    if not is_number or not np.isfinite(mean).all() or not np.isfinite(cov).all():
        raise UserError(f"{path} holds values that are no finite numbers; make or download it again")
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not np.allclose(cov, cov.T, rtol=1e-3, atol=1e-6 * float(np.abs(cov).max())):
        raise UserError(f"{path}: its covariance is not symmetric; make or download it again")
    return mean, cov


def _as_stats(mean: np.ndarray, cov: np.ndarray, num_images: int | None) -> FeatureStats:
    """With the covariance divided by N as ours are; that of a file without N stays as it is."""
    count = num_images or 1
    if num_images is not None:
        cov = cov * ((count - 1) / count)
    total, outer = mean * count, (cov + np.outer(mean, mean)) * count
    return FeatureStats.from_sums(count, torch.from_numpy(total), torch.from_numpy(outer))


def _unbiased(stats: FeatureStats) -> np.ndarray:
    return stats.covariance().numpy() * (stats.num_items / (stats.num_items - 1))


def _channels_first() -> np.ndarray:
    """Index, in ADM's order of sFID's features, of each of ours. (2023,)."""
    channels, height, width = SFID_SHAPE
    return np.arange(channels * height * width).reshape(height, width, channels).transpose(2, 0, 1).ravel()
