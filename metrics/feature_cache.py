# SPDX-License-Identifier: MIT
"""Features of real images, kept between runs by what they are made of.

A file is found by the contents of the images, the detector's fingerprint, and which items were asked for, so that a
renamed or copied data set is found again and a changed one is not. Moments take 8 * D * (D + 1) bytes (34 MB for
Inception), rows 4 * D * N: 410 MB for 50,000 images and 2,048 features, at most MAX_ROWS_BYTES.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metrics.feature_set import Features, Request
from metrics.feature_stats import FeatureStats
from torch_utils.checkpoint import atomic_write

MAX_ROWS_BYTES = 4 * 2**30  # larger ones are computed each time; 200,000 images on VGG16 are 3.3 GB


def default_cache_dir() -> Path:
    """$STYLESAN_CACHE when set, else ~/.cache/stylesan."""
    folder = os.environ.get("STYLESAN_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "stylesan"


def cache_file(folder: Path, request: Request, detector_fingerprint: str, images_fingerprint: str) -> Path:
    """Where the features of a request are kept. images_fingerprint: of all items of the set, in their order."""
    content = f"{detector_fingerprint} {images_fingerprint} {request.tap} {request.selection.name}"
    ending = "npz" if request.keeps == "moments" else "npy"
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    return folder / f"{request.detector}-{digest}.{ending}"


def read_features(path: Path, request: Request) -> Features | None:
    """What `write_features` wrote; None when there is no such file, or none that can be read."""
    try:
        if request.keeps == "moments":
            stats = FeatureStats.load(path)
            return stats if stats.num_items == len(request.selection) else None
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if rows.ndim != 2 or rows.dtype != np.float32 or len(rows) != len(request.selection):
        return None
    return torch.from_numpy(rows)


def write_features(path: Path, features: Features) -> None:
    """Keep them, if they are not too large. A folder that cannot be written costs time at the next run only."""
    try:
        if isinstance(features, FeatureStats):
            features.save(path)
        elif features.nbytes <= MAX_ROWS_BYTES:
            _write_rows(path, features)
    except OSError as error:
        print(f"Features of the real images are not cached: {error}")


def _write_rows(path: Path, rows: Tensor) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows.float().numpy(), allow_pickle=False)
