# SPDX-License-Identifier: MIT
"""Ways to run frozen networks faster than in float32: bfloat16 weights, and TF32 in their two passes only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def round_to_bfloat16_(network: nn.Module) -> None:
    """Round all weights to bfloat16, but for those and the statistics of BatchNorms, which stay as they are.

    PyTorch normalises bfloat16 maps with float32 numbers at no cost; rounded variances would scale whole channels.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    exact = [{name: value.clone() for name, value in norm.state_dict().items()} for norm in norms]
    network.to(torch.bfloat16)
    for norm, state in zip(norms, exact, strict=True):
        norm.float().load_state_dict(state)


@contextlib.contextmanager
def tf32_allowed() -> Iterator[None]:
    """TF32 in this process's convolutions and matrix products on CUDA, until the end of the block."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def run_in_tf32(network: Callable[[Tensor], list[Tensor]], images: Tensor) -> list[Tensor]:
    """`network(images)` with TF32 allowed in its forward pass and in its backward pass, and nowhere else.

    The switch is process-wide, and autograd runs backward passes of everything in one go; so the network has a graph of
    its own, which is walked inside its node of the outer graph. Once: gradients have no gradients.
    """
    if torch.is_grad_enabled() and images.requires_grad:
        return list(_InTF32.apply(images, network))
    with tf32_allowed():
        return network(images)


class _InTF32(torch.autograd.Function):
    """`network(images)` as one node, its graph inside."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, network: Callable[[Tensor], list[Tensor]]) -> tuple[Tensor, ...]:
        with tf32_allowed(), torch.enable_grad():
            ctx.images = images.detach().requires_grad_()
            ctx.results = network(ctx.images)
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        with tf32_allowed():
            (gradient,) = torch.autograd.grad(ctx.results, ctx.images, gradients)
        return gradient, None
