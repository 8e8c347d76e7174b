# SPDX-License-Identifier: MIT
"""Crops and resampling, pixel for pixel those of StyleGAN's dataset tool: Pillow's Lanczos filter on uint8.

Every function takes and gives one image, uint8 (H, W) for grey or (H, W, 3) for RGB.
"""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from torch_utils.errors import UserError

TRANSFORMS = ("center-crop", "center-crop-wide")
LANCZOS = Image.Resampling.LANCZOS


def parse_resolution(text: str) -> tuple[int, int]:
    """(width, height) in pixels from `WxH`, `W,H`, or one number for a square. Raises UserError."""
    match = re.fullmatch(r"(\d+)(?:[xX,](\d+))?", text.strip())
    if match is None:
        raise UserError(f"--resolution {text} is no size; write WIDTHxHEIGHT, e.g. 256x256")
    width, height = match[1], match[2] or match[1]
    return int(width), int(height)


def check_resolution(transform: str | None, resolution: tuple[int, int] | None) -> None:
    """Raise UserError unless the output is square with a power-of-two side, and a crop has a size to crop to."""
    if resolution is None:
        if transform is not None:
            raise UserError(f"--transform {transform} needs the size to make: add --resolution, e.g. 256x256")
        return
    width, height = resolution
    if width < 4 or width & (width - 1):
        raise UserError(
            f"--resolution {width}x{height}: {width} is not a power of two of at least 4, which networks need; "
            f"use e.g. {max(4, 1 << (width - 1).bit_length())}"
        )
    if transform == "center-crop-wide":
        if not 1 <= height <= width:
            raise UserError(
                f"--resolution {width}x{height}: center-crop-wide needs a height from 1 to the width {width}, "
                f"e.g. {width}x{width * 3 // 4}"
            )
    elif height != width:
        raise UserError(
            f"--resolution {width}x{height} is not square, which training needs; use {width}x{width}, "
            "or --transform center-crop-wide for a picture between black bars"
        )


def transform_image(
    image: np.ndarray, transform: str | None, resolution: tuple[int, int] | None
) -> np.ndarray | None:
    """The image as it goes into the data set; None if it is too small for center-crop-wide."""
    if resolution is None:
        return image
    width, height = resolution
    if transform == "center-crop":
        return center_crop(image, width, height)
    if transform == "center-crop-wide":
        return center_crop_wide(image, width, height)
    return stretch(image, width, height)


def stretch(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The whole image at (height, width), proportions not kept; unchanged if it has that size."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), LANCZOS))


def center_crop(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest square in the middle, at (height, width)."""
    rows, columns = image.shape[:2]
    side = min(rows, columns)
    square = image[
        (rows - side) // 2 : (rows + side) // 2,
        (columns - side) // 2 : (columns + side) // 2,
    ]
    return np.asarray(Image.fromarray(square).resize((width, height), LANCZOS))


def center_crop_wide(image: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Rows cut off above and below, the rest at (height, width) between black bars in a (width, width) square.

    Keeps `round(width * rows / columns)` rows of the original, which is the official rule, though it measures
    rows of the source by the size of the output. None if there are fewer rows than `height`, or columns than
    `width`.
    """
    rows, columns = image.shape[:2]
    kept = round(width * rows / columns)
    if columns < width or kept < height:
        return None
    band = image[(rows - kept) // 2 : (rows + kept) // 2]
    picture = np.asarray(Image.fromarray(band).resize((width, height), LANCZOS))
    canvas = np.zeros((width, width, *image.shape[2:]), dtype=np.uint8)
    canvas[(width - height) // 2 : (width + height) // 2] = picture
    return canvas
