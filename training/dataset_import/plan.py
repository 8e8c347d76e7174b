# SPDX-License-Identifier: MIT
"""What an import is asked for, and what follows from it and the source before the first image is converted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

from torch_utils.errors import UserError
from training.dataset_import.decoding import is_grey
from training.dataset_import.image_list import ImageList
from training.dataset_import.writer import check_free_space

QUIET_COUNT = 2000  # headers that are read so fast that no bar is needed
# Of a PNG over its pixels and of a zip over its files, for the estimate of the space.
FILE_OVERHEAD_BYTES = 400


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The flags of dataset_tool.py."""

    source: str  # folder or archive
    dest: str  # zip, if it ends so, or folder
    max_images: int | None = None  # take so many of the source; None = all
    transform: str | None = None  # name in transforms.TRANSFORMS; None = stretch
    resolution: tuple[int, int] | None = None  # (width, height), pixels; None = keep
    labels_from_folders: bool = False  # class = first folder
    # Leave out images without label; else one such image costs all their labels.
    drop_unlabelled: bool = False
    official: bool = False  # EXIF rotation ignored, grey ImageNet images dropped, no class names
    strict: bool = False  # fail at the first image that would be dropped
    overwrite: bool = False  # replace a zip that exists
    num_threads: int | None = None  # None = one for each core, at most MAX_THREADS


@dataclass(frozen=True)
class Plan:
    """What holds for all images of an import, known before the first is converted."""

    count: int  # of source images, after --max-images
    side: int  # pixels
    as_rgb: bool  # else grey


class _Header(NamedTuple):
    size: tuple[int, int]  # (width, height), pixels
    is_grey: bool


def make_plan(images: ImageList, options: ImportOptions) -> Plan:
    """Size and mode of the output, after all checks. Reads headers only as far as it must: see the loop.

    Raises UserError if the images do not agree on a size that suits training, if --drop-unlabelled would drop
    everything, or if the disk is too small.
    """
    count = min(len(images), options.max_images or len(images))
    if options.drop_unlabelled and all(label is None for label in images.labels[:count]):
        raise UserError(f"--drop-unlabelled: no image of {options.source} has a label; leave the flag out")
    sizes: Counter[tuple[int, int]] = Counter()
    as_rgb = False
    for index in tqdm(range(count), desc="Checking", unit="img", leave=False, disable=count < QUIET_COUNT):
        header = _read_header(images, index)
        if header is not None:
            sizes[header.size] += 1
            as_rgb = as_rgb or not header.is_grey
        if as_rgb and options.resolution is not None:
            break  # nothing else to learn; a grey set is one without any colour image
    if not sizes:
        raise UserError(f"--source {options.source}: none of its {count:,} image files can be opened")
    side = options.resolution[0] if options.resolution else _choose_side(sizes, options.source)
    check_free_space(options.dest, count * (side**2 * (3 if as_rgb else 1) + FILE_OVERHEAD_BYTES))
    return Plan(count, side, as_rgb)


def _choose_side(sizes: Counter[tuple[int, int]], source: str) -> int:
    """Side of the most frequent size. Raises UserError if it does not suit, or too many images have another."""
    (width, height), num_alike = sizes.most_common(1)[0]
    num_others = sizes.total() - num_alike
    fix = "add --resolution, e.g. 256x256, and --transform center-crop to keep proportions"
    if num_others >= num_alike:
        raise UserError(
            f"--source {source}: images of {len(sizes):,} sizes, at most {num_alike:,} of {sizes.total():,} alike "
            f"({width}x{height}); {fix}"
        )
    if width != height or width < 4 or width & (width - 1):
        raise UserError(
            f"--source {source}: its images have {width}x{height} pixels, but training needs squares with a "
            f"power-of-two side of at least 4; {fix}"
        )
    return width


def _read_header(images: ImageList, index: int) -> _Header | None:
    """None for an image that cannot be opened; it is dropped, and reported, when its turn comes."""
    try:
        with images.open(index) as image:
            return _Header(image.size, is_grey(image))
    except Exception:  # a damaged file can make Pillow raise almost anything
        return None
