# SPDX-License-Identifier: MIT
"""Where images come from: the files of a folder or a zip, or arrays in memory.

Every source gives uint8 images by index, a checksum per image, and one class id per image from
`dataset.json` (StyleGAN's format: `{"labels": [[file name, class id], ...]}`). Whatever is wrong with a file
is a DatasetError of one line that names it.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from torch_utils.errors import UserError

LABEL_FILE = "dataset.json"
READ_ERRORS = (
    OSError,
    SyntaxError,  # Pillow: broken PNG chunk
    ValueError,
    EOFError,
    NotImplementedError,  # zipfile: unknown compression
    RuntimeError,  # zipfile: encrypted member
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)


class DatasetError(UserError):
    """A data set that cannot be used; the message names the file, what is wrong and the fix."""


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
    modes = {1: ("L",), 3: ("RGB", "L")}[num_channels]
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


class FileSource:
    """Image files below one path, sorted by name as strings. Subclasses say how to list and open them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = Path(os.path.abspath(path)).stem
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
        with self._reading(index) as stream, Image.open(stream) as image:
            return ImageHeader(image.mode, *image.size)

    def read(self, index: int) -> tuple[ImageHeader, np.ndarray]:
        """Header and pixels, (H, W) or (H, W, channels). Raises DatasetError for a damaged file."""
        with self._reading(index) as stream, Image.open(stream) as image:
            return ImageHeader(image.mode, *image.size), np.array(image)

    def checksum(self, index: int) -> tuple[int, int]:
        """(CRC-32, bytes) of the file: equal for the same file in a folder and in a zip."""
        with self._reading(index) as stream:
            content = stream.read()
            return zlib.crc32(content), len(content)

    @contextmanager
    def _reading(self, index: int) -> Iterator[BinaryIO]:
        try:
            with self._open(self.names[index]) as stream:
                yield stream
        except DatasetError:
            raise
        except READ_ERRORS as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if isinstance(error, UnidentifiedImageError):  # Pillow's own text shows a memory address
                reason = "its content is no image format that Pillow knows"
            message = f"{self.location(index)}: not readable as an image ({reason}); replace or remove it"
            raise DatasetError(message) from error

    def labels(self) -> np.ndarray:
        """Class id of every image, int64 (len(self),), read from `dataset.json`."""
        try:
            with self._open(LABEL_FILE) as stream:
                text = stream.read()
        except DatasetError:
            raise
        except (KeyError, FileNotFoundError) as error:
            raise DatasetError(
                f"{self.path}: no labels, as there is no {LABEL_FILE} at its root; add it, or use no --cond"
            ) from error
        except READ_ERRORS as error:
            raise DatasetError(
                f"{self.path}/{LABEL_FILE}: cannot be read ({error}); write it again"
            ) from error
        return parse_labels(text, self.names, f"{self.path}/{LABEL_FILE}")

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
    """Images in memory: uint8 (N, H, W, 3) with class ids (N,)."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray) -> None:
        self.path = self.name = name
        self._images = images
        self._labels = labels.astype(np.int64)

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

    def close(self) -> None:
        """Nothing to release."""


def parse_labels(text: bytes, names: Sequence[str], location: str) -> np.ndarray:
    """Class ids, int64, in the order of `names`, from the text of a `dataset.json`.

    Raises DatasetError, beginning with `location`, unless every name has exactly one label and every label is
    a whole number >= 0.
    """
    try:
        entries = json.loads(text)["labels"]
        labels = None if entries is None else {name.replace("\\", "/"): label for name, label in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f'{location}: not of the form {{"labels": [["file", class id], ...]}}; write it again ({error})'
        ) from error
    if not labels:
        raise DatasetError(f"{location}: its labels are null or empty; list every image, or use no --cond")
    if len(labels) < len(entries):
        raise DatasetError(
            f"{location}: {len(entries) - len(labels)} file names are listed twice; list each once"
        )
    for problem, files in (
        ("images have no label", [name for name in names if name not in labels]),
        ("labels belong to no image", sorted(set(labels).difference(names))),
    ):
        if files:
            raise DatasetError(
                f"{location}: {len(files)} {problem}, the first is {files[0]!r}; make the two agree"
            )
    for name, label in labels.items():
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise DatasetError(
                f"{location}: label {label!r:.40} of {name!r} is not a whole number >= 0; "
                "only class ids are supported (no label vectors)"
            )
    return np.array([labels[name] for name in names], dtype=np.int64)
