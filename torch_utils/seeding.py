# SPDX-License-Identifier: MIT
"""Seeds for everything that draws random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices), all processes alike: they build the same networks.

    What differs between processes, such as latents, is drawn from counters of samples instead.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
