# SPDX-License-Identifier: MIT
"""Bias, activation, gain and clamp in one call, with the conventions of StyleGAN2 (arXiv:1912.04958)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """An activation function of `(x, alpha)` and what `bias_act` assumes when it is not told."""

    function: Callable[[Tensor, float], Tensor]
    default_alpha: float  # shape parameter; only lrelu has one
    default_gain: float  # keeps the second moment of a unit Gaussian near one


ACTIVATIONS = {
    "linear": Activation(lambda x, alpha: x, 0.0, 1.0),
    "relu": Activation(lambda x, alpha: F.relu(x), 0.0, math.sqrt(2)),
    "lrelu": Activation(F.leaky_relu, 0.2, math.sqrt(2)),
    "tanh": Activation(lambda x, alpha: torch.tanh(x), 0.0, 1.0),
    "sigmoid": Activation(lambda x, alpha: torch.sigmoid(x), 0.0, 1.0),
    "elu": Activation(lambda x, alpha: F.elu(x), 0.0, 1.0),
    "selu": Activation(lambda x, alpha: F.selu(x), 0.0, 1.0),
    "softplus": Activation(lambda x, alpha: F.softplus(x), 0.0, 1.0),
    "swish": Activation(lambda x, alpha: F.silu(x), 0.0, math.sqrt(2)),
}


def get_activation(name: str) -> Activation:
    """Entry of `ACTIVATIONS`; ValueError that lists the valid names for any other."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """`clamp(gain * act(x + b), -clamp, clamp)`, same shape and dtype as `x`.

    `b` has shape `(x.shape[dim],)`. None means: no bias, the activation's own alpha and gain, no clamp.
    Twice differentiable. Raises ValueError for an unknown `act`, a bias that does not fit, or a negative
    clamp.
    """
    activation = get_activation(act)
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp={clamp} must not be negative")
    if b is not None:
        if not -x.ndim <= dim < x.ndim or b.shape != x.shape[dim : dim + 1 or None]:
            raise ValueError(f"bias of shape {tuple(b.shape)} does not fit axis {dim} of {tuple(x.shape)}")
        shape = [1] * x.ndim
        shape[dim] = -1
        x = x + b.to(x.dtype).reshape(shape)
    x = activation.function(x, activation.default_alpha if alpha is None else alpha)
    gain = activation.default_gain if gain is None else gain
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)
