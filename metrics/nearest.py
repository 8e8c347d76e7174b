# SPDX-License-Identifier: MIT
"""Nearest training images of generated ones, to see whether a network has learned images by heart."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metrics.feature_set import BATCH_SIZE, load_ahead
from torch_utils.errors import UserError

if TYPE_CHECKING:
    from metrics.features import Detector
    from metrics.needs import ImageSet


class Neighbours(NamedTuple):
    """Of each sample, nearest first, on the CPU."""

    indices: Tensor  # int64 (N, k), of real images
    distances: Tensor  # float32 (N, k), between features


def find_neighbours(
    samples: Tensor, reference: ImageSet, detector: Detector, k: int = 5, show_progress: bool = True
) -> Neighbours:
    """The k real images whose features are nearest to those of each sample, uint8 (N, 3, H, W).

    Goes over the whole set, one batch at a time, so that memory does not grow with it. UserError when the set has
    fewer than k images.
    """
    if not 1 <= k <= reference.count:
        raise UserError(
            f"the {k} nearest of {reference.count} real images do not exist; take 1 ... {reference.count}"
        )
    features = detector(samples)
    best = torch.full((len(samples), 0), torch.inf), torch.zeros(len(samples), 0, dtype=torch.int64)
    items = np.arange(reference.count, dtype=np.int64)
    batches = [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]
    loaded = load_ahead(batches, reference.load)
    is_hidden = not (show_progress and sys.stderr.isatty())
    with tqdm(total=len(items), desc="real images", unit="img", leave=False, disable=is_hidden) as bar:
        for batch, images in zip(batches, loaded, strict=True):
            # Without a matrix product, which would lose the digits of the small distances that this is about.
            found = torch.cdist(features, detector(images), compute_mode="donot_use_mm_for_euclid_dist").cpu()
            distances = torch.cat([best[0], found], dim=1)
            indices = torch.cat([best[1], torch.from_numpy(batch).expand(len(samples), -1)], dim=1)
            nearest, order = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
            best = nearest, indices.gather(1, order)
            bar.update(len(batch))
    return Neighbours(best[1], best[0])


def neighbour_picture(samples: Tensor, neighbours: Neighbours, reference: ImageSet, gap: int = 4) -> Tensor:
    """One picture, uint8 (3, height, width): a row for each sample, which is followed by its neighbours.

    samples: uint8 (N, 3, H, W) of the size of the real images. gap: white pixels between the two.
    """
    rows = []
    for sample, indices in zip(samples.cpu(), neighbours.indices, strict=True):
        real = reference.load(indices.numpy())
        if sample.shape[1:] != real.shape[2:]:
            raise ValueError(
                f"samples of {tuple(sample.shape[1:])} px and real images of {tuple(real.shape[2:])} px"
            )
        space = torch.full((3, sample.shape[1], gap), 255, dtype=torch.uint8)
        images = [image.expand(3, -1, -1) for image in real]
        rows.append(torch.cat([sample.expand(3, -1, -1), space, *images], dim=2))
    return torch.cat(rows, dim=1)
