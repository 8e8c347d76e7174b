# SPDX-License-Identifier: MIT
"""What calc_metrics.py scores, a network or a set of images, with the real images that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metrics.evaluate import Sources
from torch_utils.errors import UserError
from training.generator.kinds import AnyGenerator
from training.image_files import ImageFiles
from training.metric_records import network_hash
from training.metric_sources import network_sources
from training.network_io import load_network, resolve_path
from training.network_origin import NetworkOrigin, find_origin
from training.sampling import NO_TRUNCATION, PIXELS_PER_PASS, Truncation
from training.sampling_cli import check_truncation, read_truncation
from training.score_options import ScoreOptions
from training.score_reference import (
    Reference,
    data_of_images,
    data_of_network,
    is_here,
    nothing,
    statistics_of_file,
)


@dataclass(frozen=True)
class Subject:
    """What is scored."""

    name: str  # as given
    make_sources: Callable[[int], Sources]  # of a seed
    reference: Reference  # what it is compared with
    num_images: int | None = None  # that there are; None = any number can be made
    network_file: Path | None = None  # None = images
    network_sha256: str | None = None  # see `network_hash`
    origin: NetworkOrigin | None = None  # of a network
    unusual: tuple[str, ...] = ()  # what differs from what a metric's name says, for the record


def open_subject(options: ScoreOptions, device: torch.device, needs_reals: bool) -> Subject:
    """What the flags ask to score. needs_reals: whether anything asked for does. Raises UserError."""
    if options.images is not None:
        return _open_images(options, needs_reals)
    return _open_network(options, device, needs_reals)


def _open_images(options: ScoreOptions, needs_reals: bool) -> Subject:
    files = ImageFiles(str(options.images))

    def make_sources(seed: int) -> Sources:
        # Sorted names are often sorted by class: IS, which splits the sequence, and a part of the set need them mixed.
        order = np.random.RandomState(seed).permutation(len(files))
        labels = files.labels

        def labels_of(items: np.ndarray) -> np.ndarray:
            assert labels is not None
            return labels[order[items]]

        settings = {"images": str(options.images), "num_available": len(files), "seed": seed}
        return Sources(
            generate=lambda items: files.load(order[items]),
            labels=None if labels is None else labels_of,
            settings=settings,
        )

    if options.reference is not None:
        reference = statistics_of_file(options.reference)
    elif options.data is not None and needs_reals:
        reference = data_of_images(options.data, bool(options.mirror))
    else:
        reference = nothing("needs real images to compare with; add --data or --reference")
    return Subject(str(options.images), make_sources, reference, num_images=len(files))


def _open_network(options: ScoreOptions, device: torch.device, needs_reals: bool) -> Subject:
    network = str(options.network)
    check_truncation(options.truncation_psi, None, options.centroids_path)
    file = resolve_path(network)
    G, origin = load_network(file, device), find_origin(file)
    truncation = _read_truncation(G, options)
    if options.reference is not None:
        reference = statistics_of_file(options.reference)
    elif needs_reals or options.labels == "dataset":
        reference = _data_of(G, origin, options)
    else:
        reference = nothing("needs no real images")
    labels = _labels_of(G, reference) if options.labels == "dataset" else None
    batch = options.batch or max(1, PIXELS_PER_PASS // G.img_resolution**2)

    def make_sources(seed: int) -> Sources:
        return in_batches(network_sources(G, seed, device, labels, truncation), batch)

    return Subject(
        name=network,
        make_sources=make_sources,
        reference=reference,
        network_file=file,
        network_sha256=network_hash(G),
        origin=origin,
        unusual=_unusual(options, truncation, reference, origin),
    )


def _read_truncation(G: AnyGenerator, options: ScoreOptions) -> Truncation:
    if options.truncation_psi == 1:
        return NO_TRUNCATION
    return read_truncation(  # type: ignore[arg-type]
        G, options.truncation_psi, options.trunc_cutoff, options.centroids_path, offline=False
    )


def _data_of(G: AnyGenerator, origin: NetworkOrigin, options: ScoreOptions) -> Reference:
    """The data set of the flags, or that of the network's training."""
    path = options.data if options.data is not None else origin.data
    mirror = origin.mirror if options.mirror is None else options.mirror
    if path is None:
        return nothing("needs real images, and the network does not say what it was trained on; add --data")
    if options.data is None and not is_here(path):
        return nothing(f"needs real images, and those of the training, {path}, are not here; add --data")
    return data_of_network(path, mirror, G.img_resolution, has_classes=G.c_dim > 0)


def _labels_of(G: AnyGenerator, reference: Reference) -> np.ndarray | None:
    """Class ids to draw from; None for an unconditional network."""
    if not G.c_dim:
        return None
    labels = reference.images.labels
    if labels is None:
        reason = reference.problem or f"{reference.name} has none"
        raise UserError(f"--labels dataset takes the classes of the data set: {reason}; use --labels uniform")
    if int(labels.max()) >= G.c_dim:
        raise UserError(
            f"--labels dataset: {reference.name} has class {int(labels.max())}, the network 0 to {G.c_dim - 1}; give "
            "its own data set, or use --labels uniform"
        )
    return labels


def _unusual(
    options: ScoreOptions, truncation: Truncation, reference: Reference, origin: NetworkOrigin
) -> tuple[str, ...]:
    """What a number of this call differs in from one of the training, a few words each."""
    words = []
    if truncation is not NO_TRUNCATION:
        words.append(f"psi {truncation.psi:g}")
        words += [f"cutoff {truncation.cutoff}"] * (truncation.cutoff is not None)
        if truncation.centroids is not None:
            words.append(f"{len(truncation.centroids)} centroids")
    if options.labels == "dataset":
        words.append("classes of the data set")
    is_other_data = None not in (origin.content_hash, reference.content_hash) and (
        origin.content_hash != reference.content_hash
    )
    if options.reference is not None or is_other_data:
        words.append(f"against {Path(str(reference.name)).name}")
    return tuple(words)


def in_batches(sources: Sources, size: int) -> Sources:
    """The same images, made at most `size` at a time: metrics ask for more than a large network's memory holds."""

    def split(items: np.ndarray) -> list[np.ndarray]:
        return [items[start : start + size] for start in range(0, max(len(items), 1), size)]

    paths, draw_moved = sources.paths, sources.draw_moved

    def draw_paths(items: np.ndarray, epsilon: float) -> tuple[Tensor, Tensor]:
        assert paths is not None
        parts = [paths(part, epsilon) for part in split(items)]
        return torch.cat([first for first, _ in parts]), torch.cat([second for _, second in parts])

    def draw(items: np.ndarray, motion: Tensor) -> Tensor:
        assert draw_moved is not None
        return torch.cat([draw_moved(part, motion) for part in split(items)])

    return replace(
        sources,
        generate=lambda items: torch.cat([sources.generate(part) for part in split(items)]),
        paths=None if paths is None else draw_paths,
        draw_moved=None if draw_moved is None else draw,
    )
