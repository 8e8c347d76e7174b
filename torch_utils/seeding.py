# SPDX-License-Identifier: MIT
"""Seeds for everything that draws random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch

from torch_utils.distributed import rank, world_size


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices) with seed * processes + rank, so that no two processes agree."""
    process_seed = seed * world_size() + rank()
    random.seed(process_seed)
    np.random.seed(process_seed % 2**32)
    torch.manual_seed(process_seed)
