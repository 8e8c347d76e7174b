# SPDX-License-Identifier: MIT
"""One import from beginning to end: check, decode and resize in threads, write in order, report.

Names and contents of the output are those of StyleGAN's tool for everything that it can read; `--official` is for
the two cases where it reads an image otherwise than we think right. See docs/fidelity.md.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from torch_utils.errors import UserError
from training.dataset_import.decoding import (
    EncodedImage,
    UnusableImageError,
    decode_image,
    describe_read_error,
    encode_png,
)
from training.dataset_import.image_list import ImageList
from training.dataset_import.parallel import map_in_order
from training.dataset_import.plan import ImportOptions, Plan, make_plan
from training.dataset_import.report import Findings, ImportReport, describe_classes
from training.dataset_import.sources import describe_suffixes, open_image_list
from training.dataset_import.transforms import check_resolution, transform_image
from training.dataset_import.writer import check_destination, open_writer
from training.dataset_labels import LABEL_FILE, is_class_id
from training.image_source import hash_content


@dataclass(frozen=True)
class Converted:
    """One image, ready to be written."""

    file: EncodedImage  # PNG
    changes: tuple[str, ...]  # see DecodedImage


@dataclass(frozen=True)
class Dropped:
    """One image that is left out."""

    reason: str  # the same for all images of this kind
    detail: str = ""  # of this image


def import_images(options: ImportOptions) -> ImportReport:
    """Write the data set. Raises UserError, with nothing written, for whatever the user can fix."""
    check_resolution(options.transform, options.resolution)
    if options.max_images is not None and options.max_images < 1:
        raise UserError(f"--max-images {options.max_images} leaves nothing; give a number >= 1")
    check_destination(options.dest, options.source, options.overwrite)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # about odd files: what matters is in the report
        images = open_image_list(options.source, options.labels_from_folders)
        try:
            return Import(images, make_plan(images, options), options).run()
        except OSError as error:  # of writing: what cannot be read is dropped
            raise UserError(
                f"--dest {options.dest}: cannot be written ({error.strerror or error})"
            ) from error
        finally:
            images.close()


class Import:
    """The images of one source on their way into one destination."""

    def __init__(self, images: ImageList, plan: Plan, options: ImportOptions) -> None:
        self.images, self.plan, self.options = images, plan, options
        self.changed, self.dropped = Findings(), Findings()
        self.written: list[tuple[str, Any]] = []  # (file name, label or None)
        self.checksums: list[tuple[int, int]] = []  # (CRC-32, bytes) of every written file
        self.digests: set[bytes] = set()  # of the pixels
        self.unlabelled = Findings()

    def run(self) -> ImportReport:
        """Convert, write and report."""
        count = self.plan.count
        results = map_in_order(self.convert, count, self.options.num_threads)
        with open_writer(self.options.dest) as write, contextlib.closing(results):
            for index, result in enumerate(tqdm(results, total=count, desc="Importing", unit="img")):
                if isinstance(result, Dropped):
                    self.drop(index, result)
                else:
                    self.write(index, result, write)
            if not self.written:
                raise UserError(
                    f"--source {self.options.source}: no image is left; {self.describe_dropped()}"
                )
            content = self.annotations()
            write(LABEL_FILE, json.dumps(content).encode())
        return self.report(content)

    def convert(self, index: int) -> Converted | Dropped:
        """One image of the source. Called from several threads, so it changes nothing."""
        options = self.options
        if self.images.is_repetition(index):
            return Dropped("a name that the archive holds twice: the last one used")
        if self.images.labels[index] is None and (options.drop_unlabelled or options.labels_from_folders):
            return Dropped("in no class folder" if options.labels_from_folders else "without label")
        try:
            with self.images.open(index) as image:
                if options.official and self.images.is_imagenet and len(image.getbands()) == 1:
                    return Dropped("grey ImageNet image (--official)")
                decoded = decode_image(image, self.plan.as_rgb, use_exif_rotation=not options.official)
        except UnusableImageError as error:
            return Dropped(str(error))
        except Exception as error:  # a damaged file can make Pillow raise almost anything
            return Dropped("not readable as an image", describe_read_error(error))
        pixels = transform_image(decoded.pixels, options.transform, options.resolution)
        height, width = decoded.pixels.shape[:2]
        if pixels is None:
            return Dropped("too small for center-crop-wide at this resolution", f"{width}x{height}")
        if pixels.shape[:2] != (self.plan.side, self.plan.side):
            side = self.plan.side
            return Dropped(f"not {side}x{side} pixels (--resolution would resize them)", f"{width}x{height}")
        return Converted(encode_png(pixels), decoded.changes)

    def drop(self, index: int, dropped: Dropped) -> None:
        """Count an image that is left out. Raises UserError with --strict."""
        name = self.images.names[index]
        if self.options.strict:
            reason = f"{dropped.reason} ({dropped.detail})" if dropped.detail else dropped.reason
            raise UserError(f"{name}: {reason}; replace or remove it, or leave --strict out to drop it")
        self.dropped.add(dropped.reason, f"{name}: {dropped.detail}" if dropped.detail else name)

    def write(self, index: int, converted: Converted, write: Callable[[str, bytes], None]) -> None:
        """Add an image to the destination, named after its place in the source."""
        number = f"{index:08d}"
        name = f"{number[:5]}/img{number}.png"
        write(name, converted.file.content)
        label = self.images.labels[index]
        self.written.append((name, label))
        self.checksums.append((converted.file.crc, len(converted.file.content)))
        self.digests.add(converted.file.digest)
        for change in converted.changes:
            self.changed.add(change, self.images.names[index])
        if label is None:
            self.unlabelled.add("", self.images.names[index])

    def annotations(self) -> dict[str, Any]:
        """The content of dataset.json: all labels, or null if one is missing; then class names if known."""
        if self.unlabelled.total:
            return {"labels": None}
        content: dict[str, Any] = {"labels": [list(item) for item in self.written]}
        if self.images.class_names is not None and not self.options.official:
            content["class_names"] = list(self.images.class_names)
        return content

    def report(self, content: dict[str, Any]) -> ImportReport:
        """The summary of what was written."""
        labels = [label for _, label in self.written] if content["labels"] else []
        has_classes = bool(labels) and all(is_class_id(label) for label in labels)
        counts = np.bincount(labels) if has_classes else None
        class_ids = labels if has_classes else [-1] * len(self.written)
        items = zip(self.checksums, class_ids, strict=True)
        return ImportReport(
            dest=self.options.dest,
            side=self.plan.side,
            mode="RGB" if self.plan.as_rgb else "grey",
            num_images=len(self.written),
            num_seen=self.plan.count,
            num_bytes=sum(size for _, size in self.checksums),
            content_hash=hash_content((crc, size, class_id) for (crc, size), class_id in items),
            class_counts=counts,
            class_names=tuple(content["class_names"]) if "class_names" in content else None,
            label_text=self.describe_labels(labels, counts),
            changed=self.changed,
            dropped=self.dropped,
            remarks=[*self.images.remarks, *self.describe_last_classes(counts), *self.describe_files()],
        )

    def describe_labels(self, labels: list[Any], counts: np.ndarray | None) -> str:
        """One line for the summary."""
        num_unlabelled = self.unlabelled.total
        if num_unlabelled == len(self.written):
            folders = {name.partition("/")[0] for name in self.images.names if "/" in name}
            hint = f" (--labels-from-folders would make {len(folders):,} classes)" if len(folders) > 1 else ""
            return f"none, so no --cond{hint}"
        if num_unlabelled:
            return (
                f"none written, because {num_unlabelled:,} of {len(self.written):,} images have none (first: "
                f"{self.unlabelled.examples[''][0]}); --drop-unlabelled leaves those images out instead"
            )
        if counts is None:
            return "vectors, which were copied; train.py takes class ids only, so no --cond"
        return describe_classes(counts)

    def describe_last_classes(self, counts: np.ndarray | None) -> list[str]:
        """A remark on classes after the last one with images, which training does not know of."""
        names = self.images.class_names or ()
        if counts is None or len(names) <= len(counts):
            return []
        return [
            f"{len(names) - len(counts):,} classes from {names[len(counts)]!r} on have no image and do not count"
        ]

    def describe_files(self) -> list[str]:
        """Remarks on identical images and on files that are no images."""
        remarks = []
        if num_repeated := len(self.written) - len(self.digests):
            remarks.append(
                f"{num_repeated:,} identical to an earlier image; dataset_tool.py inspect names them"
            )
        if self.images.ignored:
            found = describe_suffixes(self.images.ignored)
            remarks.append(f"{len(self.images.ignored):,} not taken for images: {found}")
        return remarks

    def describe_dropped(self) -> str:
        """Reasons with counts, and one example, in one line."""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.counts.most_common())
        return f"dropped: {counts}; the first: {next(iter(self.dropped.examples.values()))[0]}"
