# SPDX-License-Identifier: MIT
"""What metrics are given: the images of a generator by number, and the real images of a data set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics.evaluate import ImageSet, Sources
from training.dataset import ImageDataset
from training.generator.generator import Generator
from training.generator.kinds import AnyGenerator
from training.sampling import (
    NO_TRUNCATION,
    SampleStream,
    Truncation,
    images_of,
    move_images_,
    require_styles,
    seeded_sampler,
)

PATH_SEED_OFFSET = 2**31  # paths have latents of their own


def dataset_reference(dataset: ImageDataset) -> ImageSet:
    """All real images of a data set, unmirrored. The fingerprint of a folder reads every file: keep the result."""
    real = dataset.reference_set()

    def load(items: np.ndarray) -> Tensor:
        return real.batch(items)[0]

    labels = real.labels if real.c_dim else None
    return ImageSet(len(real), real.ordered_fingerprint(), load, labels, is_mirrored=dataset.mirror)


def network_sources(
    G: AnyGenerator,
    seed: int,
    device: torch.device | str,
    labels: np.ndarray | None = None,
    truncation: Truncation = NO_TRUNCATION,
) -> Sources:
    """Everything that metrics ask of a generator. labels: class ids to draw from; None = uniform, as officially.

    Path length is measured without truncation, as officially. Raises UserError for truncation without style vectors.
    """
    if truncation is not NO_TRUNCATION:
        require_styles(G, "truncation")
    stream = SampleStream(seed, G.z_dim, G.c_dim, labels)
    settings: dict[str, Any] = {"seed": seed, "truncation_psi": truncation.psi}
    if G.c_dim:
        settings["classes"] = "uniform" if labels is None else "data set"
    path_settings = settings | {"truncation_psi": 1.0}
    if truncation.cutoff is not None:
        settings["truncation_cutoff"] = truncation.cutoff
    if truncation.centroids is not None:
        settings["num_centroids"] = len(truncation.centroids)

    def label_ids(items: np.ndarray) -> np.ndarray:
        found = stream.labels(items)
        assert found is not None
        return found.numpy()

    @torch.inference_mode()
    def draw_moved(items: np.ndarray, motion: Tensor) -> Tensor:
        move_images_(G, motion)
        try:
            return images_of(G, stream, items, device, truncation)
        finally:
            move_images_(G, torch.eye(3, dtype=torch.float64))

    has_styles = isinstance(G, Generator)
    return Sources(
        generate=seeded_sampler(G, seed, device, labels, truncation),
        labels=label_ids if G.c_dim else None,
        paths=_PathSampler(G, seed, device, labels) if has_styles else None,
        draw_moved=draw_moved if has_styles else None,
        settings=settings,
        path_settings=path_settings,
    )


class _PathSampler:
    """Images at the start of straight paths in W, and a step further; both ends of a path have one class."""

    def __init__(
        self, G: Generator, seed: int, device: torch.device | str, labels: np.ndarray | None
    ) -> None:
        self._stream = SampleStream((seed + PATH_SEED_OFFSET) % 2**32, G.z_dim, G.c_dim, labels)
        self._G, self._device = G, device

    @torch.inference_mode()
    def __call__(self, items: np.ndarray, epsilon: float) -> tuple[Tensor, Tensor]:
        labels = self._stream.labels(items)
        labels = None if labels is None else labels.to(self._device)
        starts, ends = (
            self._G.mapping(self._stream.latents(rows).to(self._device), labels)
            for rows in (2 * items, 2 * items + 1)
        )
        return self._G.synthesis(starts), self._G.synthesis(starts.lerp(ends, epsilon))
