# SPDX-License-Identifier: MIT
"""Any images as a set that metrics can take: of one size, which need be neither square nor a power of two."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from metrics.needs import ImageSet
from training.dataset import MAX_HEADERS_CHECKED, ImageDataset, open_dataset, open_source
from training.image_source import (
    SUPPORTED_MODES,
    ArraySource,
    DatasetError,
    FileSource,
    ImageHeader,
    NoLabelsError,
)
from training.metric_sources import dataset_reference

READERS = min(8, os.cpu_count() or 1)  # threads that decode images; Pillow lets them run at the same time


class ImageFiles:
    """The images of a folder, a zip or a built-in set, in the order of their names. Raises DatasetError."""

    def __init__(self, path: str) -> None:
        self._source = open_source(path)
        self.name = self._source.name
        first = self._source.header(0)
        self.width, self.height = first.width, first.height
        self.labels = _labels_of(self._source)  # class ids, int64 (count,); None without classes
        if len(self) <= MAX_HEADERS_CHECKED:
            for index in range(len(self)):
                self._check(index, self._source.header(index))
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="images")

    def __len__(self) -> int:
        return len(self._source)

    def load(self, items: np.ndarray) -> Tensor:
        """Images by number, uint8 (n, 3, H, W); grey is repeated. Raises DatasetError for one that differs."""
        images = list(self._readers.map(self._read, items.tolist()))
        return (
            torch.stack(images) if images else torch.zeros(0, 3, self.height, self.width, dtype=torch.uint8)
        )

    def image_set(self) -> ImageSet:
        """For metrics, as real images. Reads every file of a folder for its checksum."""
        contents = [self._source.checksum(index) for index in range(len(self))]
        labels = None if self.labels is None else self.labels.tolist()
        digest = hashlib.sha256(repr(("image files", contents, labels)).encode()).hexdigest()
        return ImageSet(len(self), digest, self.load, self.labels)

    def _check(self, index: int, header: ImageHeader) -> None:
        location = self._source.location(index)
        if header.mode not in SUPPORTED_MODES[3]:
            raise DatasetError(
                f"{location}: Pillow mode {header.mode} is not supported here, only RGB or L; convert it, e.g. "
                'Image.open(file).convert("RGB").save(file)'
            )
        if (header.width, header.height) != (self.width, self.height):
            raise DatasetError(
                f"{location}: {header.width}x{header.height} pixels, but the first image has "
                f"{self.width}x{self.height}; bring all to one size, as how that is done changes every score"
            )

    def _read(self, index: int) -> Tensor:
        header, pixels = self._source.read(index)
        self._check(index, header)
        pixels = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def open_real_images(path: str, mirror: bool = False) -> tuple[ImageSet, tuple[int, int]]:
    """Real images for metrics, and their (width, height). A data set has the fingerprint that it has in training.

    mirror: whether metrics that count mirrored images do so. Raises DatasetError.
    """
    header = open_source(path).header(0)
    side = header.width
    if header.width == header.height and side >= 4 and side & (side - 1) == 0:
        return dataset_reference(open_labelled(path, mirror)), (side, side)
    files = ImageFiles(path)
    real = files.image_set()
    return ImageSet(real.count, real.fingerprint, real.load, real.labels, mirror), (files.width, files.height)


def open_labelled(path: str, mirror: bool = False) -> ImageDataset:
    """A data set with its classes, if it has any."""
    try:
        return open_dataset(path, use_labels=True, mirror=mirror)
    except NoLabelsError:
        return open_dataset(path, mirror=mirror)


def _labels_of(source: FileSource | ArraySource) -> np.ndarray | None:
    try:
        return source.labels()
    except NoLabelsError:
        return None
