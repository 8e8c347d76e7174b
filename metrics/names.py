# SPDX-License-Identifier: MIT
"""Metrics by name.

The first names and their result keys are StyleGAN-XL's. `_full` compares with the whole unmirrored data set; the
others with its first images, mirrored ones included where the run mirrors. Whatever changes the number has another
name: another network (`fd50k_dinov2`), another resize (`fid50k_full_clean`), another number of images.
"""

from __future__ import annotations

import math
from dataclasses import replace

from metrics.plans import (
    MAX_ROWS,
    Plan,
    density_and_coverage,
    frechet,
    frechet_per_class,
    gaussian_kernel,
    kernel,
    precision_and_recall,
    score,
)
from torch_utils.errors import UserError

MAX_KID_REALS = 1_000_000  # the official cap; no more of them are held than subsets are made of

_FID = Plan(formula=frechet, detector="inception")
_KID = Plan(formula=kernel, detector="inception", keeps="rows", max_reals=MAX_KID_REALS, uses_subsets=True)
_PR = Plan(
    formula=precision_and_recall,
    detector="vgg16",
    keeps="rows",
    max_reals=MAX_ROWS,
    picks="random",
    suffixes=("_precision", "_recall"),
    is_higher_better=True,
)
_DC = replace(_PR, formula=density_and_coverage, suffixes=("_density", "_coverage"))
_IS = Plan(
    formula=score,
    detector="inception",
    tap="probabilities",
    keeps="rows",
    max_reals=0,
    suffixes=("_mean", "_std"),
    is_higher_better=True,
)
_PER_CLASS = Plan(
    formula=frechet_per_class,
    detector="inception",
    keeps="rows",
    max_reals=MAX_ROWS,
    picks="random",
    uses_labels=True,
    suffixes=("_mean", "_worst"),
)
_PATHS = Plan(formula=None, detector="lpips", max_reals=0)
_MOTION = Plan(formula=None, detector=None, max_reals=0, is_higher_better=True)

METRICS: dict[str, Plan] = {
    "fid50k_full": _FID,
    "fid10k_full": replace(_FID, num_fakes=10_000),
    "kid50k_full": _KID,
    "pr50k3_full": _PR,
    "ppl2_wend": _PATHS,
    "eqt50k_int": replace(_MOTION, motion="translation_int"),
    "eqt50k_frac": replace(_MOTION, motion="translation_frac"),
    "eqr50k": replace(_MOTION, motion="rotation"),
    "sfid50k_full": replace(_FID, tap="sfid"),
    "rfid50k_full": replace(_FID, detector="inception_random"),
    "fid50k": replace(_FID, max_reals=50_000, uses_mirrored=True),
    "kid50k": replace(_KID, max_reals=50_000, uses_mirrored=True),
    "pr50k3": replace(_PR, max_reals=50_000, picks="first", uses_mirrored=True),
    "pr10k3": replace(_PR, max_reals=10_000, num_fakes=10_000, picks="first", uses_mirrored=True),
    "is50k": _IS,
    # Not in the official code.
    "fid50k_full_clean": replace(_FID, detector="inception_clean"),
    "kid50k_full_clean": replace(_KID, detector="inception_clean"),
    "fid50k_per_class": _PER_CLASS,
    "dc50k5_full": _DC,
    "fd50k_dinov2": replace(_FID, detector="dinov2"),
    "kd50k_dinov2": replace(_KID, detector="dinov2"),
    "pr50k3_dinov2": replace(_PR, detector="dinov2"),
    "dc50k5_dinov2": replace(_DC, detector="dinov2"),
    "cmmd50k": Plan(
        formula=gaussian_kernel,
        detector="clip",
        keeps="rows",
        max_reals=MAX_ROWS,
        picks="random",
    ),
    # Offline: the network comes with the package. As many generated images as real ones.
    "fd_lite0": replace(_FID, detector="lite0", num_fakes=None),
    "kd_lite0": replace(_KID, detector="lite0", num_fakes=None),
    "pr3_lite0": replace(_PR, detector="lite0", num_fakes=None),
    "dc5_lite0": replace(_DC, detector="lite0", num_fakes=None),
    "fd_lite0_per_class": replace(_PER_CLASS, detector="lite0", num_fakes=None),
}


def get_plan(name: str) -> Plan:
    """How the metric `name` is computed. Raises UserError, listing the valid names, unless it is in METRICS."""
    if name not in METRICS:
        raise UserError(f"metric {name!r} is not available; valid metrics: {', '.join(METRICS)}")
    return METRICS[name]


def is_better(key: str, value: float, other: float) -> bool:
    """Whether `value` of the result `key` is better than `other`; nan is worse than all others."""
    if math.isnan(value) or math.isnan(other):
        return math.isnan(other) and not math.isnan(value)
    return value > other if is_higher_better(key) else value < other


def is_higher_better(key: str) -> bool:
    """Whether a larger result under `key` means better images; False for a key of no metric that is known."""
    return any(plan.is_higher_better for name, plan in METRICS.items() if key in plan.keys(name))
