# SPDX-License-Identifier: MIT
"""Layers shared by the mapping and the synthesis network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torch_utils.ops.bias_act import bias_act, get_activation


class FullyConnectedLayer(nn.Module):
    """Linear layer with equalised learning rate (Progressive GAN, arXiv:1710.10196, Section 4.1).

    x: `(N, in_features)` -> `(N, out_features)`. `weight` is `(out_features, in_features)`, drawn from
    N(0, 1) * weight_init / lr_multiplier and scaled at run time by lr_multiplier / sqrt(in_features); `bias`
    likewise, without the square root. Activations other than "linear" apply their default gain.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "linear",
        bias: bool = True,
        lr_multiplier: float = 1,
        weight_init: float = 1,
        bias_init: float | list[float] = 0,
    ) -> None:
        super().__init__()
        get_activation(activation)  # an unknown name fails here rather than in the first forward
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * (weight_init / lr_multiplier))
        initial_bias = torch.as_tensor(bias_init, dtype=torch.float32).expand(out_features) / lr_multiplier
        self.bias = nn.Parameter(initial_bias.clone()) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer in the dtype of `x`."""
        weight = self.weight.to(x.dtype) * self.weight_gain
        bias = None if self.bias is None else self.bias.to(x.dtype) * self.bias_gain
        if self.activation == "linear":
            return nn.functional.linear(x, weight, bias)
        return bias_act(nn.functional.linear(x, weight), bias, act=self.activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"
        )
