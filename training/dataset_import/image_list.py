# SPDX-License-Identifier: MIT
"""What all sources have in common: a list of images with labels, opened one at a time."""

from __future__ import annotations

import numpy as np
from PIL import Image

from training.dataset_import.labels import SourceLabels


class ImageList:
    """Images in a fixed order. An image's place in it gives the name of its output, whether others drop out or not.

    Subclasses say how to open one. `open` is called from several threads.
    """

    is_imagenet = False  # published in ImageNet's layout

    def __init__(self, path: str, names: list[str], labels: SourceLabels, ignored: list[str]) -> None:
        self.path = path
        self.names = names  # of the images, as messages show them
        self.labels = labels.labels  # by image; None = has none
        self.class_names = labels.class_names  # by class id; None = not known
        self.remarks = labels.remarks  # for the summary
        self.ignored = ignored  # names of files that are no images

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Image.Image:
        """The image, its pixels not decoded yet. Raises what Pillow or the archive raises for a damaged one."""
        raise NotImplementedError

    def is_repetition(self, index: int) -> bool:
        """True for an image whose name already stood before, in the same archive."""
        return False

    def close(self) -> None:
        """Release file handles."""


class ArrayImages(ImageList):
    """Images decoded already: uint8 (N, H, W) or (N, H, W, 3)."""

    def __init__(self, path: str, pixels: np.ndarray, labels: SourceLabels) -> None:
        super().__init__(path, [f"image {index}" for index in range(len(pixels))], labels, ignored=[])
        self._pixels = pixels

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])
