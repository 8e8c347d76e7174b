# SPDX-License-Identifier: MIT
"""EQ-T and EQ-R (arXiv:2106.12423, Section 2.2 and Appendix E.3): does a generator move its drawing as told?

For each image a motion is drawn; the image as it is, moved by the ideal filter, is compared with what the generator
draws when its Fourier features are moved. Results are PSNR in dB, more is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from metrics.image_motion import Moved, pseudo_rotate, rotate, translate, translate_pixels
from torch_utils.errors import UserError

Kind = Literal["translation_int", "translation_frac", "rotation"]

MAX_TRANSLATION = 0.125  # of the image's side, each way
IMAGES_PER_MOTION = 4  # consecutive items share a motion, as batches of the official code do
DYNAMIC_RANGE = 2.0  # of images in [-1, 1]

# (items, motion (3, 3) float64 of the image plane, in image widths and heights) -> images (n, 3, H, W) in about [-1, 1]
DrawMoved = Callable[[np.ndarray, Tensor], Tensor]


def masked_error(reference: Moved, images: Moved) -> Tensor:
    """Sum of squared differences where both are valid, and the number of values there: float64 (N, 2)."""
    mask = (reference.mask * images.mask).double()
    errors = (reference.images.double() - images.images.double()).square() * mask
    return torch.stack([errors.sum(dim=(1, 2, 3)), mask.sum(dim=(1, 2, 3))], dim=1)


def psnr(errors: Tensor) -> float:
    """dB of all images together, from `masked_error`'s rows (N, 2). Infinite for no error at all."""
    squared, count = (float(x) for x in errors.double().sum(dim=0))
    if count == 0:
        raise UserError(
            "no pixel of the moved images is valid; equivariance needs images of 16 pixels or more"
        )
    return math.inf if squared == 0 else 20 * math.log10(DYNAMIC_RANGE) - 10 * math.log10(squared / count)


def motion_matrix(dx: float, dy: float, angle: float) -> Tensor:
    """What moves a drawing by (dx, dy), in image widths and heights, y down, and turns it counterclockwise. (3, 3)."""
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, sin, dx], [-sin, cos, dy], [0, 0, 1]], dtype=torch.float64)


def compare(kind: Kind, items: np.ndarray, still: Tensor, draw_moved: DrawMoved, draws: np.ndarray) -> Tensor:
    """`masked_error` of one motion of `items`, of which `still` are the unmoved images. draws: (2,) in [-1, 1)."""
    height, width = still.shape[2:]
    if kind == "rotation":
        angle = float(draws[0]) * math.pi
        images = draw_moved(items, motion_matrix(0, 0, angle))
        return masked_error(rotate(still, angle), pseudo_rotate(images.to(still), angle))
    dx, dy = float(draws[0]) * MAX_TRANSLATION * width, float(draws[1]) * MAX_TRANSLATION * height
    if kind == "translation_int":
        dx, dy = round(dx), round(dy)
        reference = translate_pixels(still, dx, dy)
    else:
        reference = translate(still, dx, dy)
    images = draw_moved(items, motion_matrix(dx / width, dy / height, 0))
    return masked_error(reference, Moved(images.to(still), torch.ones_like(still)))


def as_measure(
    kinds: tuple[Kind, ...], draw_moved: DrawMoved, num_images: int, seed: int
) -> Callable[[np.ndarray], Tensor]:
    """Numbers of motions (n,) -> float64 (n, 2 * kinds): for each kind, error and count of the images that share one.

    Motions depend on their number and the seed alone. There are num_motions(num_images) of them.
    """

    def measure_one(number: int) -> Tensor:
        first = number * IMAGES_PER_MOTION
        items = np.arange(first, min(first + IMAGES_PER_MOTION, num_images))
        still = draw_moved(items, motion_matrix(0, 0, 0))
        errors = [compare(kind, items, still, draw_moved, _draw(kind, number, seed)) for kind in kinds]
        return torch.cat([error.sum(dim=0) for error in errors]).cpu()

    @torch.inference_mode()
    def measure(numbers: np.ndarray) -> Tensor:
        return torch.stack([measure_one(number) for number in numbers.tolist()])

    return measure


def num_motions(num_images: int) -> int:
    """How many motions so many images are moved by."""
    return math.ceil(num_images / IMAGES_PER_MOTION)


def _draw(kind: Kind, number: int, seed: int) -> np.ndarray:
    # The fractional motions are the ones that the integral ones are rounded from, so that the two compare.
    bits = np.random.Philox(key=seed, counter=[0, 0, int(kind == "rotation"), number])
    return np.random.Generator(bits).uniform(-1, 1, 2)
