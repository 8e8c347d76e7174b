# SPDX-License-Identifier: MIT
"""Run a module, or part of it, without leaving a trace in it: for looking at a foreign discriminator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def preserved_state(module: nn.Module) -> Iterator[None]:
    """Whatever runs inside leaves buffers, tensor attributes, requires_grad flags and random state as they were.

    Tensor attributes: norms that work by hooks keep the last weight there, with its graph, and a module with
    such a tensor cannot be deep-copied.
    """
    buffers = [(m, n, b, b.clone()) for m in module.modules() for n, b in m.named_buffers(recurse=False)]
    attributes = [(m, k, v) for m in module.modules() for k, v in vars(m).items() if isinstance(v, Tensor)]
    flags = [(p, p.requires_grad) for p in module.parameters()]
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, values in buffers:
                buffer.copy_(values)
                setattr(owner, name, buffer)
        for owner, name, value in attributes:
            setattr(owner, name, value)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
