# SPDX-License-Identifier: MIT
"""The picture that shows a run's progress: which items stand in its grid, and how it is saved.

Two layouts: StyleGAN's, which fills about 8k x 4k pixels, and one row per class for sets of few classes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLASS_GRID_COLUMNS = 16  # images per row when every class has one row


class GridPlan(NamedTuple):
    """Items of the data set, row by row."""

    indices: np.ndarray  # int64 (columns * rows,)
    grid_size: tuple[int, int]  # (columns, rows)


def default_grid_size(img_resolution: int) -> tuple[int, int]:
    """(columns, rows) that fill 7680x4320 pixels, within 7 ... 32 and 4 ... 32: StyleGAN's grid."""
    return int(np.clip(7680 // img_resolution, 7, 32)), int(np.clip(4320 // img_resolution, 4, 32))


def plan_grid(labels: np.ndarray, c_dim: int, img_resolution: int) -> GridPlan:
    """The grid for a run: one row per class if the classes fit below each other, else StyleGAN's.

    labels: class ids of all items, int64 (number of items,); c_dim: 0 = not conditional.
    """
    columns, rows = default_grid_size(img_resolution)
    num_classes = len(np.unique(labels))
    if c_dim > 0 and num_classes <= rows:
        columns, rows = min(columns, CLASS_GRID_COLUMNS), num_classes
    return GridPlan(select_grid_items(labels, c_dim, (columns, rows)), (columns, rows))


def select_grid_items(
    labels: np.ndarray, c_dim: int, grid_size: tuple[int, int], seed: int = 0
) -> np.ndarray:
    """Indices of the items in a grid, int64 (columns * rows,), as StyleGAN chooses them.

    Without classes: items in random order, repeated if they are too few. With: one class per row, classes in
    rising order and around again; a class's items are shuffled once and taken in turn.
    """
    columns, rows = grid_size
    random_state = np.random.RandomState(seed)
    if c_dim == 0:
        order = np.arange(len(labels))
        random_state.shuffle(order)
        return np.resize(order, columns * rows)
    groups = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
    for group in groups.values():
        random_state.shuffle(group)
    classes = list(groups)
    picks = []
    for row in range(rows):
        label = classes[row % len(classes)]
        picks.append(np.resize(groups[label], columns))
        groups[label] = np.roll(groups[label], -columns)
    return np.concatenate(picks)


def save_image_grid(
    images: Tensor | np.ndarray,
    path: str | os.PathLike[str],
    drange: tuple[float, float] = (-1.0, 1.0),
    grid_size: tuple[int, int] | None = None,
) -> None:
    """Write images (N, 1 or 3, H, W), row by row, as one picture; the file appears complete or not at all.

    drange: the values that become black and white; outside is clipped, between is rounded to the nearest.
    grid_size: (columns, rows) with columns * rows = N; None = one row. The suffix of `path` picks the format.
    """
    pixels = (
        images.detach().to("cpu", torch.float32).numpy() if isinstance(images, Tensor) else np.asarray(images)
    )
    columns, rows = (len(pixels), 1) if grid_size is None else grid_size
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or len(pixels) != columns * rows:
        raise ValueError(f"images {pixels.shape} are not {columns} x {rows} pictures of 1 or 3 channels")
    low, high = drange
    levels = np.rint((pixels.astype(np.float32) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    _, channels, height, width = levels.shape
    tiles = levels.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    picture = tiles.reshape(rows * height, columns * width, channels)
    _save_atomically(Image.fromarray(picture[..., 0] if channels == 1 else picture), Path(path))


def _save_atomically(picture: Image.Image, path: Path) -> None:
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        picture.save(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
