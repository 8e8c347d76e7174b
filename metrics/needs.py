# SPDX-License-Identifier: MIT
"""From the names of metrics to what must be collected: which features of which images, real and generated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from metrics.feature_cache import cache_file, read_features, write_features
from metrics.feature_set import (
    Features,
    LoadItems,
    Request,
    Selection,
    collect,
    first_items,
    random_items,
)
from metrics.feature_stats import FeatureStats
from metrics.kernel import Subset, draw_subsets
from metrics.plans import MAX_ROWS, PAPER_FAKES, Plan
from torch_utils.distributed import broadcast_object, is_main
from torch_utils.errors import UserError

if TYPE_CHECKING:
    from metrics.features import Detector


@dataclass(frozen=True)
class ImageSet:
    """Real images, from wherever they come."""

    count: int  # images in all, unmirrored
    fingerprint: str  # hex digest of the contents in their order; equal ones are equal wherever the set lies
    load: LoadItems  # int64 (n,) in 0 ... count - 1 -> uint8 (n, C, H, W); called in a thread of its own
    labels: np.ndarray | None = None  # class ids (count,); None = no classes
    is_mirrored: bool = False  # whether the run also trains on mirrored images
    # By detector and tap: all that there is of the images, which cannot be loaded then.
    statistics: Mapping[tuple[str, str], FeatureStats] | None = None


@dataclass(frozen=True)
class Options:
    """What changes numbers and is not in a metric's name; it goes into every result's settings."""

    seed: int = 0  # of KID's subsets and the motions of equivariance
    max_fakes: int | None = None  # at most so many generated images; None = as many as the metric's name says
    half_distances: bool = False  # precision and recall on float16 distances, as officially


@dataclass(frozen=True)
class Needs:
    """What is collected for one metric."""

    plan: Plan  # of it
    num_fakes: int  # generated images
    num_reals: int  # real images that count; of very many KID holds only those that are drawn
    fake: Request | None = None  # None for metrics that are no function of features
    real: Request | None = None  # None where no real images are compared
    subsets: list[Subset] = field(default_factory=list)  # KID's, of rows of the two requests


def find_needs(plan: Plan, reference: ImageSet, options: Options) -> Needs:
    """What a metric needs of these real images, and of generated ones."""
    if reference.count < 1 or (options.max_fakes is not None and options.max_fakes < 2):
        raise UserError(
            f"{reference.count} real images and at most {options.max_fakes} generated ones cannot be compared; "
            "take at least 1 and 2"
        )
    num_fakes = min(reference.count, PAPER_FAKES) if plan.num_fakes is None else plan.num_fakes
    num_fakes = num_fakes if options.max_fakes is None else min(num_fakes, options.max_fakes)
    if plan.formula is None:
        return Needs(plan, num_fakes, 0)
    assert plan.detector is not None
    fake = Request(plan.detector, plan.tap, plan.keeps, first_items(num_fakes))
    if plan.max_reals == 0:
        return Needs(plan, num_fakes, 0, fake)
    num_items = reference.count * (1 + (plan.uses_mirrored and reference.is_mirrored))
    num_reals = num_items if plan.max_reals is None else min(num_items, plan.max_reals)
    selection, subsets = first_items(num_reals), []
    if plan.picks == "random":
        selection = random_items(num_reals, num_items)
    if plan.uses_subsets:
        subsets = draw_subsets(num_fakes, num_reals, options.seed)
        if num_reals > MAX_ROWS:
            selection, subsets = _keep_drawn(subsets, num_fakes, num_reals, options.seed)
    return Needs(
        plan, num_fakes, num_reals, fake, Request(plan.detector, plan.tap, plan.keeps, selection), subsets
    )


def _keep_drawn(
    subsets: list[Subset], num_fakes: int, num_reals: int, seed: int
) -> tuple[Selection, list[Subset]]:
    """Only the real items that are in a subset, at most 100,000, and the subsets as rows of these."""
    items = np.unique(np.concatenate([real for _, real in subsets]))
    selection = Selection(f"subsets-of-{num_fakes}-and-{num_reals}-seed-{seed}", items)
    return selection, [(fake, np.searchsorted(items, real)) for fake, real in subsets]


def collect_real(
    needs: Iterable[Needs],
    reference: ImageSet,
    detectors: Mapping[str, Detector],
    cache_dir: Path,
    show_progress: bool,
) -> dict[Request, Features]:
    """Features of the real images on the main process, {} on others: from the cache, the rest in one pass."""
    requests = list(dict.fromkeys(need.real for need in needs if need.real is not None))
    if reference.statistics is not None:
        stored: dict[Request, Features] = {
            request: reference.statistics[request.detector, request.tap] for request in requests
        }
        return stored if is_main() else {}
    files = {
        request: cache_file(
            cache_dir, request, detectors[request.detector].fingerprint, reference.fingerprint
        )
        for request in requests
    }
    found: dict[Request, Features] = {}
    if is_main():
        read = {request: read_features(file, request) for request, file in files.items()}
        found = {request: features for request, features in read.items() if features is not None}
    is_found = broadcast_object(
        [request in found for request in requests]
    )  # caches of other hosts may differ
    missing = [request for request, is_there in zip(requests, is_found, strict=True) if not is_there]
    used = {request.detector: detectors[request.detector] for request in missing}

    def load(items: np.ndarray) -> Tensor:
        return load_items(reference, items)

    computed = collect(missing, used, load, "real images", is_threaded=True, show_progress=show_progress)
    for request, features in computed.items():
        write_features(files[request], features)
    return found | computed


def load_items(reference: ImageSet, items: np.ndarray) -> Tensor:
    """Images by item: after all images of the set come their mirror images."""
    images = reference.load(items % reference.count)
    is_mirrored = torch.from_numpy(items >= reference.count)
    return (
        torch.where(is_mirrored[:, None, None, None], images.flip(3), images) if is_mirrored.any() else images
    )
