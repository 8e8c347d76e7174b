# SPDX-License-Identifier: MIT
"""The optimizers of G and D."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from training.config import OptimizerConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer with its learning rate and betas corrected for lazy regularisation."""
    lr, betas = config.adjusted()
    parameters = list(parameters)
    if config.kind == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, alpha=betas[1], eps=config.eps)
    is_fused = parameters[0].device.type in ("cpu", "cuda")  # one pass over the weights instead of ten
    return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=config.eps, fused=is_fused)
