# SPDX-License-Identifier: MIT
"""BEGAN's equilibrium between the reconstruction errors of real and generated images (arXiv:1703.10717).

D minimises L(x) - k L(G(z)), G minimises L(G(z)), and k moves so that E[L(G(z))] = gamma E[L(x)].
"""

from __future__ import annotations

from torch import Tensor


def next_k(k: Tensor, real_error: Tensor, fake_error: Tensor, gamma: float, k_lr: float) -> Tensor:
    """k + k_lr (gamma E[L(x)] - E[L(G(z))]), held in [0, 1]. Scalars; errors are means over the batch."""
    return (k + k_lr * (gamma * real_error - fake_error)).clamp(0, 1)


def convergence_measure(real_error: Tensor, fake_error: Tensor, gamma: float) -> Tensor:
    """M = E[L(x)] + |gamma E[L(x)] - E[L(G(z))]|, BEGAN's global measure; falls as training goes well. Scalar."""
    return real_error + (gamma * real_error - fake_error).abs()
