# SPDX-License-Identifier: MIT
"""Leaky ReLU between an up- and a down-sampling low-pass filter (StyleGAN3, arXiv:2106.12423, 3.2).

One function, three implementations: plain PyTorch, which is always there and which the others are tested against, a
C++ operator for CPUs and a Triton kernel for GPUs, which has to be asked for until it has been measured on one.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache

from torch import Tensor

from torch_utils.distributed import is_main
from torch_utils.errors import UserError
from torch_utils.ops import filtered_lrelu_cpu
from torch_utils.ops.banded import num_positions
from torch_utils.ops.choice import backend
from torch_utils.ops.filtered_lrelu_reference import filtered_lrelu_reference
from torch_utils.ops.upfirdn2d import Padding, filter_size, parse_factor, parse_padding


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Padding = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """Add bias, up-sample with `fu`, leaky ReLU times `gain`, clamp, down-sample with `fd`: `(N, C, H', W')`.

    x: `(N, C, H, W)`; b: `(C,)`. `padding` counts up-sampled pixels and has to allow for both filters:
    H' = (H * up + y0 + y1 - (taps_u - 1) - (taps_d - 1) + down - 1) // down. The clamp acts between the
    filters. Differentiable in `x` and `b` any number of times. Raises ValueError for a bias that does not
    fit, a negative `slope` or `clamp`, and as `upfirdn2d` does.
    """
    _check(x, fu, fd, b, up, down, padding, slope, clamp)
    arguments = (x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter)
    is_pointwise = fu is None and fd is None and up == 1 and down == 1
    chosen = "reference" if is_pointwise else backend()
    if chosen == "triton":
        from torch_utils.ops import filtered_lrelu_triton  # here, as defining its operators takes a second

        if filtered_lrelu_triton.supports(x, fu, fd, up, down, padding):
            return filtered_lrelu_triton.filtered_lrelu_triton(*arguments)
    elif chosen in ("auto", "cpp") and filtered_lrelu_cpu.supports(x):
        reason = filtered_lrelu_cpu.reason_for_absence()
        if not reason:
            return filtered_lrelu_cpu.filtered_lrelu_cpu(*arguments)
        if chosen == "cpp":
            raise UserError(f"--ops=cpp: the C++ operators cannot be used: {reason}; or leave --ops out")
        _say_what_is_missing(reason)
    return filtered_lrelu_reference(*arguments)


def _check(
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor | None,
    up: int,
    down: int,
    padding: Padding,
    slope: float,
    clamp: float | None,
) -> None:
    """Raises ValueError for arguments that no implementation accepts."""
    if x.ndim != 4:
        raise ValueError(f"images of shape {tuple(x.shape)}: need (N, C, H, W)")
    if b is not None and b.shape != x.shape[1:2]:
        raise ValueError(f"bias of shape {tuple(b.shape)} does not fit axis 1 of {tuple(x.shape)}")
    if slope < 0 or (clamp is not None and clamp < 0):
        raise ValueError(f"slope={slope} and clamp={clamp} must not be negative")
    parse_factor(up)
    parse_factor(down)
    x0, x1, y0, y1 = parse_padding(padding)
    (taps_ux, taps_uy), (taps_dx, taps_dy) = filter_size(fu), filter_size(fd)
    num_positions(num_positions(x.shape[3], up, 1, x0, x1, taps_ux), 1, down, 0, 0, taps_dx)
    num_positions(num_positions(x.shape[2], up, 1, y0, y1, taps_uy), 1, down, 0, 0, taps_dy)


@lru_cache(maxsize=1)
def _say_what_is_missing(reason: str) -> None:
    """Once per process, on the main one."""
    if is_main():
        print(
            f"Fast operators for this processor are off: {reason}. With them the generator's filtered leaky ReLU, "
            "most of its time, takes a fifth.",
            file=sys.stderr,
        )
