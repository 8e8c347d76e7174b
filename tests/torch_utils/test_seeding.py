# SPDX-License-Identifier: MIT
"""seed_everything: the same numbers from all three generators, other ones for another seed."""

import random

import numpy as np
import torch

from torch_utils.seeding import seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def drawn_after(seed: int) -> tuple[float, float, float]:
    seed_everything(seed)
    return draw()


def test_all_generators_repeat():
    first = drawn_after(3)
    assert draw() != first
    assert drawn_after(3) == first
    assert all(a != b for a, b in zip(drawn_after(4), first, strict=True))
