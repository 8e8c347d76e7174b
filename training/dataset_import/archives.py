# SPDX-License-Identifier: MIT
"""Published data sets in their own formats: MNIST's idx files and LSUN's LMDB folders. For CIFAR see cifar.py."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from torch_utils.errors import UserError
from training.dataset_import.image_list import ArrayImages, ImageList
from training.dataset_import.labels import SourceLabels

MNIST_IMAGES, MNIST_LABELS = 2051, 2049  # magic numbers of idx files with bytes, in 3 and 1 dimensions
MNIST_PADDING = 2  # pixels on every side: 28 -> 32, a power of two


def open_mnist(path: str) -> ArrayImages:
    """Images of an MNIST-like `...-images-idx3-ubyte.gz`, with a black border of 2 pixels, and their labels.

    The labels are read from the `...-labels-idx1-ubyte.gz` in the same folder.
    """
    label_path = Path(path).with_name(Path(path).name.replace("images-idx3", "labels-idx1"))
    if not label_path.exists():
        raise UserError(
            f"--source {path}: its labels are missing; put {label_path.name} into the same folder"
        )
    pixels = _read_idx(Path(path), MNIST_IMAGES, num_dimensions=3)
    labels = _read_idx(label_path, MNIST_LABELS, num_dimensions=1)
    if len(pixels) != len(labels):
        raise UserError(
            f"--source {path}: {len(pixels)} images, but {len(labels)} labels; download both again"
        )
    border = (MNIST_PADDING, MNIST_PADDING)
    return ArrayImages(path, np.pad(pixels, ((0, 0), border, border)), SourceLabels(labels.tolist()))


def _read_idx(path: Path, magic: int, num_dimensions: int) -> np.ndarray:
    try:
        with gzip.open(path) as file:
            header = np.frombuffer(file.read(4 * (1 + num_dimensions)), dtype=">u4").tolist()
            if len(header) <= num_dimensions or header[0] != magic:
                raise ValueError("another kind of file")
            content = file.read()
        return np.frombuffer(content, dtype=np.uint8).reshape(header[1:])
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: not a complete MNIST file ({error}); download it again") from error


class LmdbImages(ImageList):
    """Encoded images of an LMDB folder, in the order of their keys."""

    def __init__(self, path: str) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise UserError(
                f"--source {path}: reading LMDB needs the package lmdb, which is not installed: pip install lmdb"
            ) from error
        try:
            self._environment = lmdb.open(path, readonly=True, lock=False)
            with self._environment.begin() as transaction:
                self._keys = list(transaction.cursor().iternext(keys=True, values=False))
        except lmdb.Error as error:
            raise UserError(
                f"--source {path}: not a readable LMDB folder ({error}); copy it again"
            ) from error
        names = [key.decode("utf-8", errors="backslashreplace") for key in self._keys]
        super().__init__(path, names, SourceLabels([None] * len(names)), ignored=[])

    def open(self, index: int) -> Image.Image:
        with self._environment.begin() as transaction:
            return Image.open(io.BytesIO(transaction.get(self._keys[index])))

    def close(self) -> None:
        self._environment.close()


def open_lmdb(path: str) -> LmdbImages:
    """Images of an LMDB folder such as LSUN's, without labels."""
    return LmdbImages(path)
