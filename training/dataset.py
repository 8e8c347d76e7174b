# SPDX-License-Identifier: MIT
"""Training images: a data set over a zip, a folder or a built-in name.

The formats, the subset and the order of the images are those of StyleGAN's data loader, so its data sets work
as they are. `data_loader.py` draws batches from it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.digits import open_digits, open_digits8
from training.image_source import (
    ArraySource,
    DatasetError,
    FileSource,
    FolderSource,
    ImageHeader,
    ZipSource,
    check_header,
    check_resolution,
)

BUILT_IN = {"digits": open_digits, "digits8": open_digits8}  # name -> function that returns an ArraySource
IN_MEMORY_BYTES = 256 * 2**20  # sets up to this size, decoded, are decoded (so checked) once, when opened
MAX_HEADERS_CHECKED = 20_000  # of larger sets, so many headers are checked when opened: about 0.1 ms each


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Square uint8 images of one size with class ids.

    Item i is `(image (channels, resolution, resolution) uint8, class id)`. With `mirror`, the second half of
    the items is the first half flipped left to right. Made by `open_dataset`, which describes the arguments.

    What is checked, and when: the first image always; every image if the decoded set fits IN_MEMORY_BYTES (it
    then stays in memory); else every header if there are at most MAX_HEADERS_CHECKED; else each image when it
    is read. The error is the same DatasetError.
    """

    def __init__(
        self,
        source: FileSource | ArraySource,
        *,
        use_labels: bool = False,
        mirror: bool = False,
        max_size: int | None = None,
        seed: int = 0,
        channels: int = 3,
    ) -> None:
        self._source = source
        self.name = source.name
        self.num_channels = channels
        self.mirror = mirror
        class_ids = source.labels() if use_labels else np.zeros(len(source), dtype=np.int64)
        self.c_dim = int(class_ids.max()) + 1 if use_labels else 0  # of the whole set, whatever max_size
        self.class_names = source.class_names() if use_labels else None  # by class id; None = not known
        self._kept = choose_subset(len(source), max_size, seed)  # source index of every unmirrored item
        self.labels = np.tile(class_ids[self._kept], 1 + mirror)  # int64 (len(self),); 0 without labels
        first = int(self._kept[0])
        self.resolution = check_resolution(source.header(first), source.location(first))
        self._images = self._check_images()

    def _check_images(self) -> Tensor | None:
        """All decoded images, uint8 (number kept, C, H, W), if they are few; else None, headers checked."""
        num_bytes = len(self._kept) * self.num_channels * self.resolution**2
        if num_bytes <= IN_MEMORY_BYTES:
            return torch.stack([self._read(int(i)) for i in self._kept])
        if len(self._kept) <= MAX_HEADERS_CHECKED:
            for index in self._kept.tolist():
                self._check(index, self._source.header(index))
        else:
            self._read(int(self._kept[0]))
        return None

    def _check(self, index: int, header: ImageHeader) -> None:
        check_header(header, self.num_channels, self.resolution, self._source.location(index))

    def _read(self, index: int) -> Tensor:
        """Image by source index: uint8 (C, H, W). The one place where grey files get 3 channels."""
        header, pixels = self._source.read(index)
        self._check(index, header)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], self.num_channels, axis=2)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0 ... {len(self) - 1}")
        kept_index = index % len(self._kept)
        is_mirrored = index >= len(self._kept)
        image = self._read(int(self._kept[kept_index])) if self._images is None else self._images[kept_index]
        return (image.flip(2) if is_mirrored else image.clone()), int(
            self.labels[index]
        )  # callers may write into it

    @property
    def is_in_memory(self) -> bool:
        """True if all images are decoded already."""
        return self._images is not None

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Items by index: images uint8 (N, C, H, W) and class ids int64 (N,)."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        labels = torch.from_numpy(self.labels)[index]
        if self._images is None:
            return torch.stack([self[i][0] for i in index.tolist()]), labels
        images = self._images[index % len(self._kept)]
        is_mirrored = index >= len(self._kept)
        if self.mirror and is_mirrored.any():
            images[is_mirrored] = images[is_mirrored].flip(3)
        return images, labels

    def image_batches(self, batch_size: int = 64) -> Iterator[Tensor]:
        """All images in order, uint8 (at most batch_size, C, H, W) at a time."""
        for start in range(0, len(self), batch_size):
            yield self.batch(np.arange(start, min(start + batch_size, len(self))))[0]

    def fingerprint(self) -> str:
        """Hex digest of what the items hold: image files, class ids, mirroring; not of paths, names or order.

        A folder and a zip of the same files agree. Use it as the key of anything computed from this set.
        """
        return self._digest(sorted(self._contents()))

    def ordered_fingerprint(self) -> str:
        """As `fingerprint`, and of the order: the key of anything that is kept item by item."""
        return self._digest(self._contents())

    def _contents(self) -> list[tuple[int | str, ...]]:
        return [
            (*self._source.checksum(int(k)), int(label))
            for k, label in zip(self._kept, self.labels, strict=False)
        ]

    def _digest(self, items: list[tuple[int | str, ...]]) -> str:
        text = repr((items, self.mirror, self.num_channels, self.c_dim))
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def content_hash(self) -> str | None:
        """16 hex digits for the whole set's images and labels, whatever the options; see `hash_content`.

        Cheap for a zip, whose directory holds checksums; None for a large folder, which would have to be read.
        """
        return self._source.content_hash()

    def reference_set(self) -> ImageDataset:
        """The whole set, unmirrored: what StyleGAN's "full" metrics compare with."""
        if not self.mirror and len(self._kept) == len(self._source):
            return self
        return ImageDataset(self._source, use_labels=self.c_dim > 0, channels=self.num_channels)

    def take_notes(self) -> list[str]:
        """What went wrong for a moment in reading since the last call, a line each."""
        return self._source.take_notes()

    def close(self) -> None:
        """Release file handles; a later read opens them again."""
        self._source.close()


def open_dataset(
    path: str | os.PathLike[str],
    use_labels: bool = False,
    mirror: bool = False,
    max_size: int | None = None,
    seed: int = 0,
    channels: int = 3,
) -> ImageDataset:
    """Data set from a zip, a folder with its subfolders, or a built-in name.

    path: "digits" and "digits8" are built in; write ./digits for a folder of that name. use_labels: class ids from
    `dataset.json`; without, `c_dim` is 0 and every class id 0. max_size: a random subset, drawn with `seed`,
    in the original order; None = all. channels: 3 repeats grey files, 1 takes grey files only. Raises
    DatasetError for anything that cannot be trained on, see ImageDataset for what is checked when.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    return ImageDataset(
        open_source(os.fspath(path)),
        use_labels=use_labels,
        mirror=mirror,
        max_size=max_size,
        seed=seed,
        channels=channels,
    )


def open_source(path: str) -> FileSource | ArraySource:
    """The images behind a path or built-in name, nothing checked but that there are some."""
    if path in BUILT_IN:
        return BUILT_IN[path]()
    if not os.path.exists(path):
        names = ", ".join(BUILT_IN)
        raise DatasetError(f"{path}: no such file or folder; give a zip, a folder or a built-in set: {names}")
    if os.path.isdir(path):
        return FolderSource(path)
    if path.lower().endswith(".zip"):
        return ZipSource(path)
    raise DatasetError(f"{path}: neither a folder nor a .zip; put the images into one of these")


def choose_subset(num_images: int, max_size: int | None, seed: int) -> np.ndarray:
    """Indices, int64, sorted: all images, or a random `max_size` of them (as StyleGAN draws them)."""
    if max_size is not None and max_size < 1:
        raise DatasetError(f"a data set of at most {max_size} images is empty; give a number >= 1")
    indices = np.arange(num_images, dtype=np.int64)
    if max_size is None or max_size >= num_images:
        return indices
    np.random.RandomState(seed % 2**32).shuffle(indices)
    return np.sort(indices[:max_size])
