# SPDX-License-Identifier: MIT
"""How far two computations of the same results differ, by the rule and the tolerances of the golden files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

IMAGES, GRADIENTS = 1e-4, 3e-3  # max|a - b| / max|b|; gradients jump where a leaky ReLU changes sides
HALF_IMAGES, HALF_GRADIENTS = 2e-2, 1e-1  # where layers run in half precision
PIXELS = 1.0  # of 255, by which truncation may differ ...
PIXEL_SHARE = 0.005  # ... on so many of them
FLOOR = 1e-2  # smaller gradients than this share of their network's largest are zero but for rounding


def find_differences(ours: Mapping[str, np.ndarray], naive: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Largest relative difference by kind of result: "images", "pixels", or what is before the colon of a name.

    For pixels, the share of those that differ. What is missing on one side is zero there: autograd leaves out some
    gradients that are.
    """
    zeros = {name: np.zeros_like(values) for name, values in [*ours.items(), *naive.items()]}
    ours, naive = zeros | dict(ours), zeros | dict(naive)
    largest: dict[str, float] = {}
    for name, values in naive.items():
        kind = name.partition(":")[0]
        largest[kind] = max(largest.get(kind, 0.0), float(np.abs(values).max(initial=0)))
    found: dict[str, float] = {}
    for name, values in naive.items():
        kind = name.partition(":")[0]
        distance = np.abs(ours[name].astype(np.float64) - values)
        if kind == "pixels":
            error = float((distance > 0).mean()) if distance.max(initial=0) <= PIXELS else 1.0
        else:
            scale = max(float(np.abs(values).max(initial=0)), FLOOR * largest[kind], 1e-30)
            error = float(distance.max(initial=0)) / scale
        found[kind] = max(found.get(kind, 0.0), error if np.isfinite(error) else float("inf"))
    return found


def find_tolerance(kind: str, has_half_precision: bool) -> float:
    """The largest difference that passes."""
    if kind == "pixels":
        return 1.0 if has_half_precision else PIXEL_SHARE
    if kind == "images":
        return HALF_IMAGES if has_half_precision else IMAGES
    return HALF_GRADIENTS if has_half_precision else GRADIENTS
