# SPDX-License-Identifier: MIT
"""Every place where the rank of a process matters, and nothing else.

One process needs no set-up: all functions are then no-ops. With torch.distributed initialised they act on
the default process group, so the training step reads the same for one process and for many.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process, 0 without torch.distributed."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if _is_initialized() else 1


def is_main() -> bool:
    """True on the one process that prints and writes files."""
    return rank() == 0


def average_gradients_(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes, in one flat all-reduce. Missing gradients stay missing."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over processes; the tensor itself with one process."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
