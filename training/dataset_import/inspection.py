# SPDX-License-Identifier: MIT
"""A data set looked at file by file: everything that training would refuse or that a person should know."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from training.dataset import ArraySource, FileSource, open_source
from training.dataset_import.decoding import describe_read_error, hash_pixels
from training.dataset_import.parallel import map_in_order
from training.dataset_import.plan import QUIET_COUNT
from training.dataset_import.report import (
    Findings,
    class_lines,
    describe_classes,
    describe_counts,
    describe_size,
)
from training.dataset_labels import DatasetError
from training.image_source import SUPPORTED_MODES, ImageHeader, check_resolution, hash_content

NOT_READABLE = "not readable"
IMBALANCE_RATIO = 10  # largest class over smallest, from which on the text says so


@dataclass
class Inspection:
    """What there is to say about one data set."""

    path: str  # or built-in name
    num_bytes: int = 0  # of all image files
    content_hash: str = ""  # see training.image_source.hash_content
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) in pixels -> images
    modes: Counter[str] = field(default_factory=Counter)  # Pillow's mode -> images
    unusable: Findings = field(default_factory=Findings)  # images that training refuses, once each
    duplicates: Findings = field(default_factory=Findings)  # images equal to an earlier one
    class_counts: np.ndarray | None = None  # int64 (number of classes,); None = no usable labels
    class_names: tuple[str, ...] | None = None  # by class id
    label_problem: str | None = None  # why --cond 1 would be refused
    unlabelled: Findings = field(default_factory=Findings)  # images without label, where others have one

    @property
    def num_images(self) -> int:
        """All files with an image's suffix."""
        return self.sizes.total() + self.unusable.counts[NOT_READABLE]

    @property
    def is_usable(self) -> bool:
        """True if it can be trained on, at least without --cond."""
        return not self.unusable.total

    def text(self) -> str:
        """Everything, several lines; the last one is the verdict."""
        sizes = Counter({f"{width}x{height}": count for (width, height), count in self.sizes.items()})
        lines = [
            f"{self.path}: {self.num_images:,} images, {describe_size(self.num_bytes)}, "
            f"content hash {self.content_hash}",
            f"Pixels: {describe_counts(sizes) or 'unknown'}; mode: {describe_counts(self.modes) or 'unknown'}",
            *self._label_lines(),
        ]
        if self.duplicates.total:
            lines += ["Duplicates:", *self.duplicates.lines()]
        if self.is_usable:
            return "\n".join([*lines, "Usable for training."])
        return "\n".join(
            [
                *lines,
                f"Training refuses {self.unusable.total:,} of {self.num_images:,} images:",
                *self.unusable.lines(),
                f"Not usable for training. dataset_tool.py --source {self.path} --dest NEW.zip keeps what can be kept.",
            ]
        )

    def _label_lines(self) -> list[str]:
        if self.class_counts is None:
            return [f"Labels: --cond 1 would be refused: {self.label_problem}", *self.unlabelled.lines()]
        counts = self.class_counts
        lines = [
            f"Labels: --cond 1 trains on {describe_classes(counts)}",
            *class_lines(counts, self.class_names),
        ]
        filled = counts[counts > 0]
        if filled.max() >= IMBALANCE_RATIO * filled.min():
            lines.append(
                f"Unbalanced: the largest class has {filled.max() / filled.min():.0f} times the images of the "
                "smallest; metrics draw all classes alike, training as often as they occur"
            )
        return lines


class _File(NamedTuple):
    checksum: tuple[int, int]  # (CRC-32, bytes); zeros if not even those can be read
    header: ImageHeader | None  # None if the image cannot be decoded ...
    digest: bytes | None  # of the pixels
    problem: str | None = None  # ... and why


def inspect_dataset(path: str) -> Inspection:
    """Read every image of a zip, a folder or a built-in set. Raises UserError if it cannot be opened at all."""
    source = open_source(path)
    inspection = Inspection(path)
    names = [source.location(index).removeprefix(f"{path}/") for index in range(len(source))]
    files: list[_File] = []
    first_with: dict[bytes | None, str] = {}  # digest of pixels -> file
    results = map_in_order(functools.partial(_read_file, source), len(source))
    for file in tqdm(
        results, total=len(source), desc="Reading", unit="img", disable=len(source) < QUIET_COUNT
    ):
        name = names[len(files)]
        if files and name == names[len(files) - 1]:  # names are sorted
            inspection.duplicates.add("a name that the archive holds twice", name)
        files.append(file)
        if file.problem is not None:
            inspection.unusable.add(NOT_READABLE, f"{name}: {file.problem}")
        elif (first := first_with.setdefault(file.digest, name)) != name:
            inspection.duplicates.add("identical to an earlier image", f"{name} = {first}")
    inspection.num_bytes = sum(file.checksum[1] for file in files)
    _check_headers(inspection, [(n, f.header) for n, f in zip(names, files, strict=True) if f.header])
    class_ids = _check_labels(inspection, source)
    items = ((*file.checksum, int(label)) for file, label in zip(files, class_ids, strict=True))
    inspection.content_hash = hash_content(items)
    source.close()
    return inspection


def _read_file(source: FileSource | ArraySource, index: int) -> _File:
    checksum = (0, 0)
    try:
        checksum = source.checksum(index)
        header, pixels = source.read(index)
        return _File(checksum, header, hash_pixels(pixels))
    except DatasetError as error:
        return _File(checksum, None, None, describe_read_error(error.__cause__ or error))


def _check_headers(inspection: Inspection, headers: list[tuple[str, ImageHeader]]) -> None:
    """Modes and sizes: training takes one size, that of the majority."""
    for _, header in headers:
        inspection.sizes[header.width, header.height] += 1
        inspection.modes[header.mode] += 1
    if not headers:
        return
    width, height = inspection.sizes.most_common(1)[0][0]
    try:
        check_resolution(ImageHeader("RGB", width, height), "")
        usual_problem = None
    except DatasetError as error:
        usual_problem = str(error).removeprefix(": ")
    for name, header in headers:
        if header.mode not in SUPPORTED_MODES[3]:
            kind = f"mode {header.mode}, but only {' and '.join(SUPPORTED_MODES[3])} are supported"
        elif (header.width, header.height) != (width, height):
            name, kind = (
                f"{name}: {header.width}x{header.height}",
                f"not {width}x{height} pixels, as most are",
            )
        elif usual_problem is not None:
            kind = usual_problem
        else:
            continue
        inspection.unusable.add(kind, name)


def _check_labels(inspection: Inspection, source: FileSource | ArraySource) -> np.ndarray:
    """Fill in what is known about the classes. Returns the class id of every image, -1 without usable labels."""
    try:
        class_ids = source.labels()
        inspection.class_names = source.class_names()
        inspection.class_counts = np.bincount(class_ids)
        return class_ids
    except DatasetError as error:
        inspection.label_problem = str(error).removeprefix(f"{inspection.path}: ")
        if isinstance(source, FileSource):
            for name in _unlabelled_files(source):
                inspection.unlabelled.add("images without label", name)
        return np.full(len(source), -1)


def _unlabelled_files(source: FileSource) -> list[str]:
    """Images that `dataset.json` leaves out; none if it cannot be read or holds no labels at all."""
    try:
        labelled = {name.replace("\\", "/") for name, _ in json.loads(source.label_text())["labels"] or []}
    except (DatasetError, ValueError, KeyError, TypeError, AttributeError):
        return []  # already said as the label problem
    return [name for name in source.names if labelled and name not in labelled]
