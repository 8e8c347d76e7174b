# SPDX-License-Identifier: MIT
"""What calc_metrics.py compares with: a data set, statistics from a file, or nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from metrics.needs import ImageSet
from metrics.plans import PAPER_FAKES
from metrics.reference_statistics import ReferenceStatistics, read_statistics
from torch_utils.errors import UserError
from training.dataset import BUILT_IN, open_dataset
from training.image_files import open_labelled, open_real_images
from training.metric_sources import dataset_reference


@dataclass(frozen=True)
class Reference:
    """Real images, or what stands for them."""

    images: ImageSet
    name: str | None  # as given; None = there is nothing to compare with
    size: tuple[int, int] | None = None  # width and height, pixels; None = not known
    content_hash: str | None = None  # of a data set, see `hash_content`
    statistics: ReferenceStatistics | None = None  # of a file; None = there are images
    problem: str | None = None  # why there is nothing
    settings: dict[str, Any] = field(default_factory=dict)  # for the record


def data_of_images(path: str, mirror: bool) -> Reference:
    """A set of images of any one size. Raises DatasetError."""
    images, size = open_real_images(path, mirror)
    return Reference(images, path, size, settings={"data": path})


def data_of_network(path: str, mirror: bool, resolution: int, has_classes: bool) -> Reference:
    """The data set for a network, which must have its resolution; classes are read if the network has any."""
    dataset = open_labelled(path, mirror) if has_classes else open_dataset(path, mirror=mirror)
    if dataset.resolution != resolution:
        raise UserError(
            f"--data {path} has images of {dataset.resolution} px, the network makes {resolution} px; give the data "
            "set of that resolution"
        )
    images, side = dataset_reference(dataset), dataset.resolution
    return Reference(images, path, (side, side), dataset.content_hash, settings={"data": path})


def statistics_of_file(path: str) -> Reference:
    """Mean and covariance from a file. Raises UserError."""
    statistics = read_statistics(path)
    fingerprint = statistics.data_fingerprint or hashlib.sha256(Path(path).read_bytes()).hexdigest()
    count = statistics.num_images or PAPER_FAKES
    images = ImageSet(count, fingerprint, _load_none, statistics=statistics.moments)
    settings = {"reference": Path(path).name, "reference_detector": statistics.detector}
    return Reference(images, path, statistics=statistics, settings=settings)


def nothing(problem: str) -> Reference:
    """For metrics that need no real images. problem: what the others are told."""
    return Reference(ImageSet(PAPER_FAKES, "", _load_none, statistics={}), None, problem=problem)


def is_here(path: str) -> bool:
    """Whether a data set's path, from a run that may have been on another machine, leads anywhere."""
    return path in BUILT_IN or Path(path).exists()


def _load_none(items: np.ndarray) -> Tensor:
    raise RuntimeError(f"{len(items)} images were asked for where there are statistics alone")
