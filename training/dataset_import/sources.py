# SPDX-License-Identifier: MIT
"""Where images are imported from: folders, zips, ImageNet as it is published; cifar.py and archives.py have more.

A source lists its images in the official order, which gives every output its name; nothing is decoded yet.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NoReturn

from PIL import Image

from torch_utils.errors import UserError
from training.dataset_import.archives import open_lmdb, open_mnist
from training.dataset_import.cifar import open_cifar
from training.dataset_import.image_list import ImageList
from training.dataset_import.labels import SourceLabels, labels_from_folders, labels_from_json
from training.dataset_labels import LABEL_FILE
from training.image_source import has_image_suffix

IMAGENET_TRAIN = Path("Data", "CLS-LOC", "train")  # inside the unpacked ILSVRC folder
WNID = re.compile(r"n\d{8}")


def open_image_list(path: str, use_folder_labels: bool) -> ImageList:
    """The images behind `--source`. Raises UserError if it is nothing that can be read, or holds no images."""
    path = path.rstrip("/\\") or path
    if not os.path.exists(path):
        raise UserError(f"--source {path}: no such file or folder; check the path")
    if os.path.isdir(path) and not path.endswith("_lmdb"):
        images = _open_folder(Path(path), use_folder_labels)
    elif path.lower().endswith(".zip"):
        images = ZipImages(path, use_folder_labels)
    elif use_folder_labels:
        raise UserError(f"--labels-from-folders: {path} has no folders; leave the flag out")
    elif path.endswith("_lmdb"):
        images = open_lmdb(path)
    elif path.lower().endswith((".tar.gz", ".tgz", ".tar")):
        images = open_cifar(path)
    elif path.endswith("images-idx3-ubyte.gz"):
        images = open_mnist(path)
    else:
        raise UserError(
            f"--source {path}: not a folder, a .zip, a CIFAR .tar.gz, an MNIST ...-images-idx3-ubyte.gz or a "
            "folder ..._lmdb; unpack it and give the folder"
        )
    if not images.names:
        found = describe_suffixes(images.ignored) or "nothing"
        raise UserError(
            f"--source {path}: no image files in it, but {found}; PNG and JPEG files are expected"
        )
    return images


def describe_suffixes(names: list[str]) -> str:
    """How many files of which kind, most frequent first: "4 .txt, 1 hidden"."""
    counts = Counter(map(_kind_of, names))
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common(8))


def _kind_of(name: str) -> str:
    path = PurePosixPath(name)
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return "hidden"
    return path.suffix.lower() or "without suffix"


class FolderImages(ImageList):
    """Image files of a folder and its subfolders, in the order of their path's parts."""

    def __init__(self, root: Path, names: list[str], ignored: list[str], labels: SourceLabels) -> None:
        super().__init__(str(root), names, labels, ignored)
        self.root = root

    def open(self, index: int) -> Image.Image:
        return Image.open(self.root / self.names[index])


class ZipImages(ImageList):
    """Image files of a zip, in the order of their whole names."""

    def __init__(self, path: str, use_folder_labels: bool) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"--source {path}: not a complete zip file ({error}); copy it again") from error
        files = sorted(name for name in self._zip.namelist() if not name.endswith("/"))
        names = [name for name in files if has_image_suffix(name)]
        ignored = [name for name in files if not has_image_suffix(name) and name != LABEL_FILE]
        text = _read_member(self._zip, path) if LABEL_FILE in files else None
        super().__init__(path, names, _find_labels(text, names, path, use_folder_labels), ignored)
        self._twice = {index for index in range(1, len(names)) if names[index] == names[index - 1]}

    def open(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self._zip.read(self.names[index])))

    def is_repetition(self, index: int) -> bool:
        return index in self._twice

    def close(self) -> None:
        self._zip.close()


def _open_folder(path: Path, use_folder_labels: bool) -> FolderImages:
    if (path / IMAGENET_TRAIN).is_dir():
        return _open_imagenet(path / IMAGENET_TRAIN)
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    if entries and all(WNID.fullmatch(entry.name) and entry.is_dir() for entry in entries):
        return _open_imagenet(path)
    names, ignored = list_folder(path)
    labels = _find_labels(_read_labels(path), names, str(path), use_folder_labels)
    return FolderImages(path, names, ignored, labels)


def _open_imagenet(root: Path) -> FolderImages:
    """Images in the folders n01440764 ...; class = rank of the folder. Whatever lies beside them is ignored."""
    wnids = sorted(entry.name for entry in root.iterdir() if WNID.fullmatch(entry.name) and entry.is_dir())
    rank = {wnid: index for index, wnid in enumerate(wnids)}
    names, ignored = list_folder(root)
    inside = [name for name in names if name.partition("/")[0] in rank]
    ignored += [name for name in names if name.partition("/")[0] not in rank]
    labels = SourceLabels([rank[name.partition("/")[0]] for name in inside], tuple(wnids))
    images = FolderImages(root, inside, ignored, labels)
    images.is_imagenet = True
    return images


def _read_labels(folder: Path) -> bytes | None:
    try:
        return (folder / LABEL_FILE).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{folder / LABEL_FILE}: cannot be read ({error.strerror}); check its permissions"
        ) from error


def list_folder(root: Path) -> tuple[list[str], list[str]]:
    """Names below `root`, with forward slashes: image files in the official order, and the other files.

    Linked folders are followed, each folder once. `dataset.json` at the root is in neither list.
    """
    files: list[str] = []
    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        files += [Path(folder, name).relative_to(root).as_posix() for name in names]
    files.sort(key=lambda name: name.split("/"))  # as paths compare: by part, case-sensitive
    images = [name for name in files if has_image_suffix(name)]
    return images, [name for name in files if not has_image_suffix(name) and name != LABEL_FILE]


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(
        f"--source: folder {error.filename} cannot be read ({error.strerror}); check its permissions"
    )


def _find_labels(text: bytes | None, names: list[str], path: str, use_folder_labels: bool) -> SourceLabels:
    if use_folder_labels:
        found = labels_from_folders(names, path)
        if text is not None:
            found.remarks.append(f"{LABEL_FILE} was not read, because of --labels-from-folders")
        return found
    if text is None:
        return SourceLabels([None] * len(names))
    return labels_from_json(text, names, f"{path}/{LABEL_FILE}")


def _read_member(archive: zipfile.ZipFile, path: str) -> bytes:
    try:
        return archive.read(LABEL_FILE)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError) as error:
        raise UserError(f"{path}/{LABEL_FILE}: cannot be read ({error}); copy the zip again") from error
