# SPDX-License-Identifier: MIT
"""How far two computations of the same results differ, and how far they may.

Where rounding carries an activation of D across a corner of ReLU6 or leaky ReLU, single numbers of a gradient jump, by
up to a twentieth of the largest: so do those of either form and of float64. Hence gradients are compared by norms, and
those that pass D may differ by a few times what moving each weight by a rounding does to ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

IMAGES = 1e-4  # max|a - b| / max|b|
GRADIENTS = 3e-3  # |a - b| / |b| of a parameter
ROUNDING = 2.0**-24  # of a float32, relative to it
JUMPS = 4.0  # times what one such move of the weights makes: of five, one made 3.1 times another's
HALF_IMAGES, HALF_GRADIENTS = 2e-2, 1e-1  # where layers run in half precision
PIXELS = 1.0  # of 255, by which truncation may differ ...
PIXEL_SHARE = 0.005  # ... on so many of them
FLOOR = 1e-2  # smaller gradients than this share of their network's largest are zero but for rounding


def find_differences(ours: Mapping[str, np.ndarray], naive: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Largest relative difference by kind of result: "images", "pixels", or what is before the colon of a name.

    Of the largest number for images, of Euclidean norms for gradients; for pixels, the share of those that differ. What
    is missing on one side is zero there: autograd leaves out some gradients that are.
    """
    zeros = {name: np.zeros_like(values) for name, values in [*ours.items(), *naive.items()]}
    ours, naive = zeros | dict(ours), zeros | dict(naive)
    sizes = {name: _size(name, values) for name, values in naive.items()}
    largest: dict[str, float] = {}
    for name, size in sizes.items():
        kind = kind_of(name)
        largest[kind] = max(largest.get(kind, 0.0), size)
    found: dict[str, float] = {}
    for name, values in naive.items():
        kind = kind_of(name)
        distance = ours[name].astype(np.float64) - values
        if kind == "pixels":
            error = float((distance != 0).mean()) if np.abs(distance).max(initial=0) <= PIXELS else 1.0
        else:
            error = _size(name, distance) / max(sizes[name], FLOOR * largest[kind], 1e-30)
        found[kind] = max(found.get(kind, 0.0), error if np.isfinite(error) else float("inf"))
    return found


def kind_of(name: str) -> str:
    """Of the result of this name."""
    return name.partition(":")[0]


def _size(name: str, values: np.ndarray) -> float:
    if kind_of(name) in ("images", "pixels"):
        return float(np.abs(values).max(initial=0))
    return float(np.linalg.norm(values.astype(np.float64)))


def find_tolerance(kind: str, has_half_precision: bool, jump: float = 0.0) -> float:
    """The largest difference that passes; jump: the one that weights moved by a rounding make."""
    if kind == "pixels":
        return 1.0 if has_half_precision else PIXEL_SHARE
    if kind == "images":
        return HALF_IMAGES if has_half_precision else IMAGES
    if has_half_precision:
        return HALF_GRADIENTS
    return max(GRADIENTS, JUMPS * jump) if kind in ("G through D", "D") else GRADIENTS
