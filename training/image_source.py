# SPDX-License-Identifier: MIT
"""Where images come from: the files of a folder or a zip, or arrays in memory.

Every source gives uint8 images by index, a checksum per image, one class id per image and the names of the
classes, for files from `dataset.json`. Whatever is wrong with a file is a DatasetError of one line that names it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from training.dataset_labels import LABEL_FILE, Annotations, DatasetError, NoLabelsError, parse_annotations
from training.storage_errors import (
    READ_ERRORS,
    RETRY_DELAYS_S,
    StorageError,
    describe_error,
    is_transient_error,
)

T = TypeVar("T")

MAX_HASHED_FOLDER_BYTES = 2**30  # a larger folder has no content hash: computing it reads every file
SUPPORTED_MODES = {1: ("L",), 3: ("RGB", "L")}  # channels -> Pillow's modes that can become so many


class ImageHeader(NamedTuple):
    """What an image file says about itself before it is decoded."""

    mode: str  # Pillow's mode: "RGB", "L" (grey), "RGBA", "P" (palette) ...
    width: int  # pixels
    height: int  # pixels


def has_image_suffix(name: str) -> bool:
    """True for names that Pillow would open, except hidden files and macOS's `__MACOSX` copies."""
    path = PurePosixPath(name)
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return False
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def check_resolution(header: ImageHeader, location: str) -> int:
    """Side in pixels. Raises DatasetError unless the image is square and its side a power of two >= 4."""
    width, height = header.width, header.height
    if width != height:
        raise DatasetError(f"{location}: {width}x{height} pixels is not square; crop or pad all images")
    if width < 4 or width & (width - 1):
        side = max(4, 1 << (width - 1).bit_length())
        raise DatasetError(
            f"{location}: {width}x{width} pixels, but the side must be a power of two, at least 4; "
            f"resize all images, e.g. to {side}x{side}"
        )
    return width


def check_header(header: ImageHeader, num_channels: int, resolution: int, location: str) -> None:
    """Raise DatasetError unless the image can become uint8 (num_channels, resolution, resolution)."""
    modes = SUPPORTED_MODES[num_channels]
    if header.mode not in modes:
        raise DatasetError(
            f"{location}: Pillow mode {header.mode} is not supported here, only {' or '.join(modes)}; "
            f'convert it, e.g. Image.open(file).convert("{modes[0]}").save(file)'
        )
    if (header.width, header.height) != (resolution, resolution):
        raise DatasetError(
            f"{location}: {header.width}x{header.height} pixels, but the first image has "
            f"{resolution}x{resolution}; resize all images to one size"
        )


def hash_content(items: Iterable[tuple[int, int, int]]) -> str:
    """16 hex digits for what a data set holds, from (CRC-32, bytes, class id or -1) of every image file.

    Not of paths, names or order: a folder and a zip of the same files agree. Reading options do not enter
    either, so it tells which data a run saw. It shows accidents, not forgery: the CRCs of equally large PNG files
    share some 2**16 values, so one exchanged image goes unseen in one of 65,000 cases.
    """
    return hashlib.sha256(repr(sorted(items)).encode()).hexdigest()[:16]


def read_header(stream: BinaryIO) -> ImageHeader:
    """Mode and size of an image file."""
    with Image.open(stream) as image:
        return ImageHeader(image.mode, *image.size)


def read_image(stream: BinaryIO) -> tuple[ImageHeader, np.ndarray]:
    """Header and pixels of an image file."""
    with Image.open(stream) as image:
        return ImageHeader(image.mode, *image.size), np.array(image)


def read_checksum(stream: BinaryIO) -> tuple[int, int]:
    """(CRC-32, bytes) of a file."""
    content = stream.read()
    return zlib.crc32(content), len(content)


class FileSource:
    """Image files below one path, sorted by name as strings. Subclasses say how to list and open them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = Path(os.path.abspath(path)).stem
        self._notes: list[str] = []
        self.names = sorted(name for name in self._list_names() if has_image_suffix(name))
        if not self.names:
            raise DatasetError(f"{path}: no image files found; expected PNG or JPEG files, in any subfolder")

    def _list_names(self) -> list[str]:
        raise NotImplementedError

    def _open(self, name: str) -> BinaryIO:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def location(self, index: int) -> str:
        """The file as an error message should name it."""
        return f"{self.path}/{self.names[index]}"

    def header(self, index: int) -> ImageHeader:
        """Mode and size, without decoding. Raises DatasetError if the file is not an image."""
        return self._use(index, read_header)

    def read(self, index: int) -> tuple[ImageHeader, np.ndarray]:
        """Header and pixels, (H, W) or (H, W, channels). Raises DatasetError for a damaged file."""
        return self._use(index, read_image)

    def checksum(self, index: int) -> tuple[int, int]:
        """(CRC-32, bytes) of the file: equal for the same file in a folder and in a zip."""
        return self._use(index, read_checksum)

    def _use(self, index: int, use: Callable[[BinaryIO], T]) -> T:
        """What `use` makes of the opened file. Tried again while the storage fails for a moment."""
        failures: list[Exception] = []
        while True:
            try:
                with self._open(self.names[index]) as stream:
                    result = use(stream)
                break
            except READ_ERRORS as error:
                if not is_transient_error(error) or len(failures) == len(RETRY_DELAYS_S):
                    raise self._unreadable(index, error, len(failures)) from error
                failures.append(error)
            self.close()  # a handle that went stale stays so
            time.sleep(RETRY_DELAYS_S[len(failures) - 1])
        if failures:
            reason = describe_error(failures[-1])
            self._notes.append(f"{self.location(index)}: read at attempt {len(failures) + 1} ({reason})")
        return result

    def _unreadable(self, index: int, error: Exception, failures: int) -> DatasetError:
        if failures:
            return StorageError(
                f"{self.location(index)}: the storage still fails after {failures + 1} attempts "
                f"({describe_error(error)}); check it, or copy the images to a local disk with --cache-data DIR"
            )
        if isinstance(error, DatasetError):
            return error
        return DatasetError(
            f"{self.location(index)}: not readable as an image ({describe_error(error)}); replace or remove it"
        )

    def take_notes(self) -> list[str]:
        """What went wrong for a moment since the last call, a line each."""
        notes, self._notes = self._notes, []
        return notes

    def labels(self) -> np.ndarray:
        """Class id of every image, int64 (len(self),), read from `dataset.json`."""
        return self._annotations.class_ids

    def class_names(self) -> tuple[str, ...] | None:
        """Names by class id from `dataset.json`, one for each of its classes; None if it holds none."""
        return self._annotations.class_names

    @functools.cached_property
    def _annotations(self) -> Annotations:
        return parse_annotations(self.label_text(), self.names, f"{self.path}/{LABEL_FILE}")

    def label_text(self) -> bytes:
        """The content of `dataset.json`. Raises DatasetError if there is none or it cannot be read."""
        try:
            with self._open(LABEL_FILE) as stream:
                return stream.read()
        except DatasetError:
            raise
        except (KeyError, FileNotFoundError) as error:
            raise NoLabelsError(
                f"{self.path}: no labels, as there is no {LABEL_FILE} at its root; add it, or use no --cond"
            ) from error
        except READ_ERRORS as error:
            raise DatasetError(
                f"{self.path}/{LABEL_FILE}: cannot be read ({error}); write it again"
            ) from error

    def content_hash(self) -> str | None:
        """`hash_content` of the whole set; None for a folder of more than MAX_HASHED_FOLDER_BYTES."""
        try:
            class_ids = self.labels()
        except DatasetError:  # no or unusable labels: the images alone
            class_ids = np.full(len(self), -1)
        return hash_content((*self.checksum(i), int(class_ids[i])) for i in range(len(self)))

    def close(self) -> None:
        """Release file handles; the next read opens them again."""


class FolderSource(FileSource):
    """Images in a folder and its subfolders."""

    def _list_names(self) -> list[str]:
        return [
            Path(folder, file).relative_to(self.path).as_posix()
            for folder, _, files in os.walk(self.path)
            for file in files
        ]

    def _open(self, name: str) -> BinaryIO:
        return open(Path(self.path, name), "rb")

    def content_hash(self) -> str | None:
        num_bytes = sum(Path(self.path, name).stat().st_size for name in self.names)
        return super().content_hash() if num_bytes <= MAX_HASHED_FOLDER_BYTES else None


class ZipSource(FileSource):
    """Images in a zip. Each process opens its own handle: a shared one would share the file position."""

    def __init__(self, path: str) -> None:
        self._handle: zipfile.ZipFile | None = None
        self._handle_pid = -1
        super().__init__(path)

    @property
    def _zip(self) -> zipfile.ZipFile:
        if self._handle is None or self._handle_pid != os.getpid():
            try:
                self._handle, self._handle_pid = zipfile.ZipFile(self.path), os.getpid()
            except zipfile.BadZipFile as error:
                raise DatasetError(
                    f"{self.path}: not a complete zip file ({error}); create or copy it again"
                ) from error
            except OSError as error:
                raise DatasetError(
                    f"{self.path}: cannot be opened ({error.strerror}); check the path"
                ) from error
        return self._handle

    def _list_names(self) -> list[str]:
        return [name for name in self._zip.namelist() if not name.endswith("/")]

    def _open(self, name: str) -> BinaryIO:
        return self._zip.open(name)  # type: ignore[return-value]

    def checksum(self, index: int) -> tuple[int, int]:
        """(CRC-32, bytes) from the zip's directory: nothing is read."""
        info = self._zip.getinfo(self.names[index])
        return info.CRC, info.file_size

    def close(self) -> None:
        if self._handle is not None and self._handle_pid == os.getpid():
            self._handle.close()
        self._handle = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}


class ArraySource:
    """Images in memory: uint8 (N, H, W, 3) with class ids (N,), and the names of the classes by id."""

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...] | None = None
    ) -> None:
        self.path = self.name = name
        self._images = images
        self._labels = labels.astype(np.int64)
        self._class_names = class_names

    def __len__(self) -> int:
        return len(self._images)

    def location(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def header(self, index: int) -> ImageHeader:
        _, height, width, _ = self._images.shape
        return ImageHeader("RGB", width, height)

    def read(self, index: int) -> tuple[ImageHeader, np.ndarray]:
        return self.header(index), self._images[index]

    def checksum(self, index: int) -> tuple[int, int]:
        content = self._images[index].tobytes()
        return zlib.crc32(content), len(content)

    def labels(self) -> np.ndarray:
        return self._labels

    def class_names(self) -> tuple[str, ...] | None:
        return self._class_names

    def content_hash(self) -> str:
        return hash_content((*self.checksum(i), int(self._labels[i])) for i in range(len(self)))

    def take_notes(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing to release."""
