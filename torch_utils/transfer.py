# SPDX-License-Identifier: MIT
"""Copies from the CPU to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, on `device`; do not change it afterwards, as the copy may still be under way.

    CUDA reads pinned memory by itself. For other memory the process would wait until all earlier work is done.
    """
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # from a pool that waits until the copy has been read
    return tensor.to(device, non_blocking=True)
