# SPDX-License-Identifier: MIT
"""Samples beside the training images nearest to them: whether a network has learned images by heart.

A distance says something only beside others, so the same is measured between training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metrics.detectors import get_detector
from metrics.nearest import Neighbours, find_neighbours, neighbour_picture
from metrics.needs import ImageSet
from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError
from training.score_options import ScoreOptions
from training.score_subject import Subject

if TYPE_CHECKING:
    from metrics.features import Detector

MIN_SIDE = 72  # pixels of an image in the picture, so that captions fit below; small images are magnified
GAP = 1  # pixels of the images between a sample and its neighbours
CAPTION_HEIGHT = 16
NUM_COMPARED = 256  # training images whose own neighbours show what a distance means


@dataclass(frozen=True)
class NearestImages:
    """What was found, samples in the order of their nearest distance."""

    samples: Tensor  # uint8 (N, 3, H, W)
    items: np.ndarray  # number of each sample, (N,)
    neighbours: Neighbours  # of each sample
    typical_distance: float  # of a training image to the nearest other one, median


def find_nearest(subject: Subject, options: ScoreOptions, device: torch.device) -> NearestImages:
    """The training images nearest to the first samples of the seed. Raises UserError."""
    real = subject.reference.images
    if subject.reference.problem is not None:
        raise UserError(f"--nearest {subject.reference.problem}")
    count = min(options.nearest_samples, subject.num_images or options.nearest_samples)
    detector = get_detector(
        options.nearest_detector, device, options.detector_paths.get(options.nearest_detector)
    )
    items = np.arange(count, dtype=np.int64)
    samples = subject.make_sources(options.seed).generate(items).cpu().expand(-1, 3, -1, -1)
    if (size := (samples.shape[3], samples.shape[2])) != subject.reference.size:
        raise UserError(
            f"--nearest: samples of {size} px and real images of {subject.reference.size} px do not stand side by "
            "side; give images of one size"
        )
    neighbours = find_neighbours(samples, real, detector, options.nearest_k, options.is_verbose)
    order = neighbours.distances[:, 0].argsort()
    sorted_neighbours = Neighbours(neighbours.indices[order], neighbours.distances[order])
    typical = typical_distance(real, detector, options.seed, options.is_verbose)
    return NearestImages(samples[order], items[order.numpy()], sorted_neighbours, typical)


def typical_distance(real: ImageSet, detector: Detector, seed: int, show_progress: bool) -> float:
    """Median distance of some real images to the nearest other one; nan for a single image."""
    if real.count < 2:
        return float("nan")
    chosen = np.sort(np.random.RandomState(seed).permutation(real.count)[:NUM_COMPARED])
    found = find_neighbours(real.load(chosen), real, detector, 2, show_progress)
    is_other = found.indices != torch.from_numpy(chosen)[:, None]  # a copy may come before the image itself
    nearest_other = torch.where(is_other, found.distances, torch.inf).min(dim=1).values
    return float(nearest_other.median())


def save_nearest(path: Path, found: NearestImages, real: ImageSet) -> None:
    """Draw and write. Raises UserError for a file that cannot be written."""
    try:
        with atomic_write(path) as temporary:
            draw_nearest(found, real).save(temporary, format="PNG")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); choose another --nearest"
        ) from error


def draw_nearest(found: NearestImages, real: ImageSet) -> Image.Image:
    """A row for each sample: it, its neighbours, and below each its number and distance."""
    zoom = max(1, -(-MIN_SIDE // found.samples.shape[3]))
    rows = [_row(found, real, index, zoom) for index in range(len(found.samples))]
    heading = (
        "left: samples, closest first; right: nearest training images, typical distance among these: "
        f"{found.typical_distance:.3g}"
    )
    font = ImageFont.load_default()
    picture_width = max(rows[0].width, round(font.getlength(heading)) + 8)
    picture = Image.new("RGB", (picture_width, CAPTION_HEIGHT + sum(row.height for row in rows)), "white")
    ImageDraw.Draw(picture).text((2, 2), heading, fill="black", font=font)
    for index, row in enumerate(rows):
        picture.paste(row, (0, CAPTION_HEIGHT + index * row.height))
    return picture


def _row(found: NearestImages, real: ImageSet, index: int, zoom: int) -> Image.Image:
    sample = found.samples[index : index + 1]
    neighbours = Neighbours(*(part[index : index + 1] for part in found.neighbours))
    pixels = neighbour_picture(sample, neighbours, real, GAP).permute(1, 2, 0).contiguous().numpy()
    strip = Image.fromarray(pixels)
    strip = strip.resize((strip.width * zoom, strip.height * zoom), Image.Resampling.NEAREST)
    row = Image.new("RGB", (strip.width, strip.height + CAPTION_HEIGHT), "white")
    row.paste(strip, (0, 0))
    draw, side = ImageDraw.Draw(row), sample.shape[3]
    captions = [f"sample {found.items[index]}"]
    captions += [
        f"#{item} {distance:.3g}"
        for item, distance in zip(*(part[0].tolist() for part in neighbours), strict=True)
    ]
    for column, caption in enumerate(captions):
        left = (column * side + GAP * (column > 0)) * zoom
        draw.text((left + 2, strip.height + 1), caption, fill="black", font=ImageFont.load_default())
    return row


def summarize_nearest(path: Path, found: NearestImages) -> str:
    """What the picture shows, in two lines."""
    nearest = found.neighbours.distances[:, 0]
    return (
        f"Wrote {path}: {len(nearest)} samples, nearest training images at distances {float(nearest.min()):.3g} to "
        f"{float(nearest.max()):.3g} (median {float(nearest.median()):.3g}).\n"
        f"Training images are {found.typical_distance:.3g} from the nearest other one (median): samples that are much "
        "closer than that are copies."
    )
