# SPDX-License-Identifier: MIT
"""Time of one call of filtered leaky ReLU and of its gradient, beside the bytes that it cannot avoid moving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.benchmark import Timer


@dataclass(frozen=True)
class FilteredLReLUTiming:
    """Medians on one device."""

    forward_ms: float  # without a graph
    backward_ms: float  # gradients of x and b alone
    forward_bytes: int  # x read and the result written, once
    backward_bytes: int  # x and the result's gradient read, x's gradient written, once


def time_filtered_lrelu(
    function: Callable[..., Tensor],
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor,
    up: int,
    down: int,
    padding: Sequence[int],
    clamp: float | None = 256.0,
    min_run_time: float = 0.2,
) -> FilteredLReLUTiming:
    """Time `function`, any implementation with the signature of `filtered_lrelu`; seconds `min_run_time` per number.

    Warmed up; on a GPU, from start to end of the kernels.
    """
    x, b = x.detach().requires_grad_(), b.detach().requires_grad_()

    def forward() -> Tensor:
        return function(x, fu, fd, b, up=up, down=down, padding=list(padding), clamp=clamp)

    def infer() -> None:
        with torch.no_grad():
            forward()

    out = forward()
    grad = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, [x, b], grad, retain_graph=True)

    forward_ms, backward_ms = (_milliseconds(run, min_run_time) for run in (infer, backward))
    x_bytes, out_bytes = (tensor.numel() * tensor.element_size() for tensor in (x, out))
    return FilteredLReLUTiming(forward_ms, backward_ms, x_bytes + out_bytes, 2 * x_bytes + out_bytes)


def _milliseconds(run: Callable[[], None], min_run_time: float) -> float:
    run()
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median * 1e3
