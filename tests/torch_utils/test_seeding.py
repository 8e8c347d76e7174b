# SPDX-License-Identifier: MIT
"""seed_everything: the same numbers from all three generators, other ones for another seed or process."""

import random

import numpy as np
import pytest
import torch

from torch_utils import seeding
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


def test_processes_differ_from_each_other_and_from_other_seeds(monkeypatch):
    """Seed * processes + rank, as StyleGAN does: no two runs of neighbouring seeds share a process's numbers."""
    monkeypatch.setattr(seeding, "world_size", lambda: 4)
    seen = set()
    for seed in range(3):
        for rank in range(4):
            monkeypatch.setattr(seeding, "rank", lambda rank=rank: rank)
            seen.add(drawn_after(seed))
    assert len(seen) == 12
    monkeypatch.setattr(seeding, "rank", lambda: 2)
    several = drawn_after(5)
    monkeypatch.undo()
    assert drawn_after(22) == several


@pytest.mark.parametrize("seed", [2**32 - 1, 2**40])
def test_large_seeds(seed):
    assert drawn_after(seed) == drawn_after(seed)
