# SPDX-License-Identifier: MIT
"""Quality metrics by name: `compute("fd_lite0", reference, generate)` gives a dictionary of numbers.

Knows images, not networks: the reference is a set of uint8 batches with a fingerprint, the generator any
callable that returns uint8 images. Reference statistics are cached by content, so that a renamed or copied
data set is found again and a changed one is not; a cache file that cannot be read is computed afresh.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metrics.feature_stats import FeatureStats
from metrics.frechet import frechet_distance
from torch_utils.errors import UserError

if TYPE_CHECKING:
    from metrics.features import Detector

MAX_IMAGES = 50_000  # generated images are as many as reference images, but at most so many, as in the papers
GENERATE_BATCH = 64  # images asked of the generator at a time

Progress = Callable[[int, int], None]  # (images done, images in all), called after every batch
Generate = Callable[[int], Tensor]  # n -> uint8 (n, C, H, W), new images on every call


@dataclass(frozen=True)
class ImageSet:
    """Reference images, from wherever they come."""

    count: int  # images that `batches` yields in all
    fingerprint: str  # hex digest of the contents; equal contents have equal fingerprints wherever they lie
    batches: Callable[[], Iterator[Tensor]]  # starts a pass over all images: uint8 (n, C, H, W) batches


@dataclass(frozen=True)
class MetricInputs:
    """What a metric function is given."""

    reference: ImageSet  # real images
    generate: Generate  # source of fake images
    device: torch.device  # where the detector runs
    cache_dir: Path  # folder of the reference statistics
    progress: Progress | None  # told about every batch, of real images first and of fake ones then


def compute(
    name: str,
    reference: ImageSet,
    generate: Generate,
    device: torch.device | str = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Results of the metric `name`, a dictionary of one or more floats. UserError for a name not in METRICS.

    The outcome is a function of the images alone: seeds are those of `generate`. cache_dir: None = see
    `default_cache_dir`.
    """
    check_metric(name)
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    return METRICS[name](MetricInputs(reference, generate, torch.device(device), folder, progress))


def check_metric(name: str) -> None:
    """Raise UserError, listing the valid names, unless `name` is in METRICS."""
    if name in METRICS:
        return
    hint = ""
    if name.removesuffix("_full") in _INCEPTION_METRICS:
        hint = "; it needs the Inception network, which comes with a later release"
    raise UserError(f"metric {name!r} is not available{hint}; valid metrics: {', '.join(METRICS)}")


def default_cache_dir() -> Path:
    """$STYLESAN_CACHE when set, else ~/.cache/stylesan."""
    folder = os.environ.get("STYLESAN_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "stylesan"


def fd_lite0(inputs: MetricInputs) -> dict[str, float]:
    """Frechet distance of all reference images to as many generated ones, on EfficientNet-Lite0 features."""
    from metrics.features import (
        lite0_detector,
    )  # imports timm: seconds that listing the metrics can do without

    detector = lite0_detector(inputs.device)
    num_fake = min(inputs.reference.count, MAX_IMAGES)
    real = reference_stats(inputs.reference, detector, inputs.cache_dir, inputs.progress)
    fake = generated_stats(inputs.generate, num_fake, detector, inputs.progress)
    distance = frechet_distance(fake.mean(), fake.covariance(), real.mean(), real.covariance())
    return {"fd_lite0": distance}


def reference_stats(
    reference: ImageSet, detector: Detector, cache_dir: Path, progress: Progress | None = None
) -> FeatureStats:
    """Statistics of all reference images; from the cache when this detector saw this content before."""
    content = f"{detector.fingerprint} {reference.fingerprint} {reference.count}"
    path = cache_dir / f"{detector.name}-{hashlib.sha256(content.encode()).hexdigest()[:32]}.npz"
    try:
        stats = FeatureStats.load(path)
        if stats.num_items == reference.count:
            return stats
    except (FileNotFoundError, ValueError):
        pass
    stats = FeatureStats()
    for images in reference.batches():
        stats.append(detector(images))
        if progress is not None:
            progress(stats.num_items, reference.count)
    if stats.num_items != reference.count:
        raise ValueError(f"the reference announced {reference.count} images and yielded {stats.num_items}")
    _save_if_possible(stats, path)
    return stats


def generated_stats(
    generate: Generate, count: int, detector: Detector, progress: Progress | None = None
) -> FeatureStats:
    """Statistics of `count` generated images. ValueError when `generate` returns more or fewer than asked."""
    stats = FeatureStats()
    while stats.num_items < count:
        wanted = min(GENERATE_BATCH, count - stats.num_items)
        images = generate(wanted)
        if images.shape[0] != wanted:
            raise ValueError(f"asked for {wanted} images, the generator returned {images.shape[0]}")
        stats.append(detector(images))
        if progress is not None:
            progress(stats.num_items, count)
    return stats


def _save_if_possible(stats: FeatureStats, path: Path) -> None:
    try:
        stats.save(path)
    except OSError as error:  # a read-only home or a full disk costs time at the next run, not this result
        print(f"Reference statistics are not cached: {error}")


# Name -> function. The first word of a result is the metric's name.
METRICS: dict[str, Callable[[MetricInputs], dict[str, float]]] = {"fd_lite0": fd_lite0}

# The papers' metrics that are not here yet, without their "_full" ending; check_metric says why.
_INCEPTION_METRICS = ("fid50k", "fid10k", "kid50k", "sfid50k", "rfid50k", "is50k", "pr50k3", "pr10k3")
