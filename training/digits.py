# SPDX-License-Identifier: MIT
"""The built-in data sets "digits" and "digits8": scikit-learn's 1,797 scanned handwritten digits as RGB images.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository
(test part), shipped inside scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from training.image_source import ArraySource, DatasetError

MAX_VALUE = 16  # scikit-learn counts the dark pixels of a 4x4 block: 0 to 16
RESOLUTION = 16  # of "digits", pixels; the scans, and "digits8", are 8x8


def open_digits() -> ArraySource:
    """1,797 images, uint8 (16, 16, 3), white strokes on black, classes 0 to 9, in scikit-learn's order.

    The 8x8 scans are enlarged with Pillow's bicubic filter, which works in integers: the bytes are the same
    everywhere. Raises DatasetError if scikit-learn is not installed.
    """
    grey, labels = _load_scans()
    enlarged = [
        Image.fromarray(scan).resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC) for scan in grey
    ]
    return _as_rgb("digits", np.stack([np.asarray(image) for image in enlarged]), labels)


def open_digits8() -> ArraySource:
    """The same images as they were scanned, uint8 (8, 8, 3)."""
    return _as_rgb("digits8", *_load_scans())


def _load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Grey images, uint8 (N, 8, 8), and class ids (N,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            'the built-in set "digits" needs scikit-learn, which is not installed: pip install scikit-learn'
        ) from error
    scans = load_digits()
    grey = np.rint(scans.images * (255 / MAX_VALUE)).astype(np.uint8)  # (N, 8, 8)
    return grey, scans.target


def _as_rgb(name: str, grey: np.ndarray, labels: np.ndarray) -> ArraySource:
    return ArraySource(name, np.repeat(grey[..., None], 3, axis=3), labels, class_names=tuple("0123456789"))
