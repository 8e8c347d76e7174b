# SPDX-License-Identifier: MIT
"""Frechet distance within each class: which classes a conditional generator does badly.

The distance of few images is too large by about their number's inverse, so values compare between classes and runs
with as many images of each, not with the FID of a whole set.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from metrics.frechet import frechet_distance_of_features
from torch_utils.errors import UserError

MIN_IMAGES = 2  # of a class, real and generated; a class with fewer is left out


def per_class_frechet(
    fake: Tensor, fake_labels: np.ndarray, real: Tensor, real_labels: np.ndarray
) -> dict[int, float]:
    """Class id -> distance, ascending by class, of features (N, D) and (M, D) with class ids (N,) and (M,).

    ValueError when labels and features differ in number, UserError when no class has MIN_IMAGES images of either kind.
    """
    if len(fake) != len(fake_labels) or len(real) != len(real_labels):
        raise ValueError(
            f"{len(fake)} and {len(real)} features have {len(fake_labels)} and {len(real_labels)} labels"
        )
    distances = {}
    for label in np.intersect1d(fake_labels, real_labels).tolist():
        fakes, reals = (np.flatnonzero(labels == label) for labels in (fake_labels, real_labels))
        if min(len(fakes), len(reals)) >= MIN_IMAGES:
            distances[label] = frechet_distance_of_features(fake[fakes], real[reals])
    if not distances:
        raise UserError(f"no class has {MIN_IMAGES} real and {MIN_IMAGES} generated images; take more images")
    return distances
