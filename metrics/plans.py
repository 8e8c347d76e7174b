# SPDX-License-Identifier: MIT
"""What a metric is: a formula, the features and the number of images that it needs, and the keys of its results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from metrics.equivariance import Kind
from metrics.feature_set import Features
from metrics.feature_stats import FeatureStats
from metrics.frechet import frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import Subset, cmmd, kernel_distance
from metrics.per_class import per_class_frechet
from metrics.precision_recall import density_coverage, precision_recall

PAPER_FAKES = 50_000  # generated images of the papers' metrics
MAX_ROWS = 200_000  # real images whose features are held one by one; a random choice of larger sets


@dataclass(frozen=True)
class Evidence:
    """What a formula is given."""

    fake: Features  # of the generated images: moments, or rows (N, D)
    real: Features | None  # of the real ones; None where the plan wants none
    subsets: list[Subset]  # KID's; items are rows of `fake` and `real`
    fake_labels: np.ndarray | None  # class ids (N,), for metrics per class
    real_labels: np.ndarray | None  # likewise
    device: torch.device  # where distances are computed
    half: bool  # float16 distances in precision and recall

    def rows(self) -> tuple[Tensor, Tensor]:
        """Features one by one, generated and real."""
        assert isinstance(self.fake, Tensor) and isinstance(self.real, Tensor)
        return self.fake, self.real

    def moments(self) -> tuple[FeatureStats, FeatureStats]:
        """Moments, generated and real."""
        assert isinstance(self.fake, FeatureStats) and isinstance(self.real, FeatureStats)
        return self.fake, self.real


@dataclass(frozen=True)
class Findings:
    """What a formula gives."""

    values: tuple[float, ...]  # in the order of the plan's keys
    details: dict[str, float] = field(default_factory=dict)  # more numbers, such as one per class


Formula = Callable[[Evidence], Findings]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the metric of one name is computed."""

    formula: Formula | None  # None for those that are no function of features: path length, equivariance
    detector: str | None  # name in metrics.detectors; None = uses no network
    tap: str = "features"  # which of the detector's outputs
    keeps: Literal["moments", "rows"] = "moments"  # what the formula needs of the features
    num_fakes: int | None = PAPER_FAKES  # generated images; None = as many as real ones, at most PAPER_FAKES
    max_reals: int | None = None  # real images at most; None = all, 0 = none
    picks: Literal["first", "random"] = "first"  # which, if there are more
    uses_mirrored: bool = False  # count mirrored real images too, where the run mirrors
    uses_subsets: bool = False  # compares random subsets of rows, as KID does
    uses_labels: bool = False  # needs the class ids of both sets
    motion: Kind | None = None  # of equivariance
    suffixes: tuple[str, ...] = ("",)  # of the result keys, after the metric's name
    is_higher_better: bool = False  # how the first result ranks networks

    def keys(self, name: str) -> tuple[str, ...]:
        """Keys of the results of the metric `name`."""
        return tuple(name + suffix for suffix in self.suffixes)


def frechet(evidence: Evidence) -> Findings:
    """Frechet distance of moments."""
    fake, real = evidence.moments()
    return Findings((frechet_distance(fake.mean(), fake.covariance(), real.mean(), real.covariance()),))


def kernel(evidence: Evidence) -> Findings:
    """KID's formula."""
    return Findings((kernel_distance(*evidence.rows(), evidence.subsets, evidence.device),))


def gaussian_kernel(evidence: Evidence) -> Findings:
    """CMMD's formula."""
    return Findings((cmmd(*evidence.rows(), evidence.device),))


def precision_and_recall(evidence: Evidence) -> Findings:
    """Improved precision and recall, k = 3."""
    return Findings(tuple(precision_recall(*evidence.rows(), 3, evidence.device, evidence.half)))


def density_and_coverage(evidence: Evidence) -> Findings:
    """Density and coverage, k = 5."""
    return Findings(tuple(density_coverage(*evidence.rows(), 5, evidence.device)))


def score(evidence: Evidence) -> Findings:
    """Inception score."""
    assert isinstance(evidence.fake, Tensor)
    return Findings(tuple(inception_score(evidence.fake)))


def frechet_per_class(evidence: Evidence) -> Findings:
    """Frechet distances within classes: their mean, and the worst."""
    assert evidence.fake_labels is not None and evidence.real_labels is not None
    fake, real = evidence.rows()
    distances = per_class_frechet(fake, evidence.fake_labels, real, evidence.real_labels)
    values = list(distances.values())
    details = {f"class_{label}": value for label, value in distances.items()}
    return Findings((math.fsum(values) / len(values), max(values)), details)
