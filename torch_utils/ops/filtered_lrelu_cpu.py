# SPDX-License-Identifier: MIT
"""Filtered leaky ReLU on a CPU as one fused C++ operator per pass; the same function as `filtered_lrelu.py`.

Two operators (csrc/filtered_lrelu.cpp). `filtered_lrelu` is the forward pass; in training it also records two bits
per up-sampled pixel, whether it was positive and whether it was clamped: a third of the size of a float32 input,
which itself need not be kept. `masked_resampling` up-samples, multiplies by the slopes that the bits stand for and
down-samples: every derivative of every order is of that form, with the filters exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_utils.ops.banded import num_positions
from torch_utils.ops.cpu_extension import NAME, Operators
from torch_utils.ops.upfirdn2d import Padding, filter_size, parse_padding

DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # bfloat16 is computed in float32
MAPS_PER_BLOCK = 8  # maps of one image that share a word of the mask; kLanes in C++


def supports(x: Tensor) -> bool:
    """Whether `filtered_lrelu_cpu` could serve such images, if its operators can be built.

    On the meta device, where memory is counted, images are taken for those of a CPU.
    """
    return x.device.type in ("cpu", "meta") and x.ndim == 4 and x.dtype in DTYPES


def filtered_lrelu_cpu(
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor | None,
    up: int,
    down: int,
    padding: Padding,
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool,
) -> Tensor:
    """`filtered_lrelu.filtered_lrelu` for what `supports` accepts, with checked arguments; same memory format.

    Call it only if there is no `reason_for_absence`.
    """
    # max(min(g * a, c), -c) = g * max(min(a, c / g), -c / g): the gain moves behind the clamp, into the filter.
    limit = None if clamp is None or gain == 0 else clamp / abs(gain)
    is_training = torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad))
    x0, x1, y0, y1 = parse_padding(padding)
    operator = torch.ops.stylesan_cpu.filtered_lrelu
    out, _ = operator(x, b, fu, fd, up, down, [x0, x1, y0, y1], gain, slope, limit, flip_filter, is_training)
    return out


def _register_rules() -> None:
    """Tell torch the operators' shapes and derivatives."""
    torch.library.register_fake(f"{NAME}::filtered_lrelu", _fake_forward)
    torch.library.register_fake(f"{NAME}::masked_resampling", _fake_resampling)
    torch.library.register_autograd(f"{NAME}::filtered_lrelu", _forward_gradient, setup_context=_keep_forward)
    torch.library.register_autograd(
        f"{NAME}::masked_resampling", _resampling_gradient, setup_context=_keep_resampling
    )


def _fake_forward(x, b, fu, fd, up, down, padding, gain, slope, limit, flip_filter, keep_mask):
    (taps_ux, taps_uy), (taps_dx, taps_dy) = filter_size(fu), filter_size(fd)
    num_images, channels, height, width = x.shape
    x0, x1, y0, y1 = padding
    mid_x = num_positions(width, up, 1, x0, x1, taps_ux)
    mid_y = num_positions(height, up, 1, y0, y1, taps_uy)
    out = x.new_empty(
        num_images,
        channels,
        num_positions(mid_y, 1, down, 0, 0, taps_dy),
        num_positions(mid_x, 1, down, 0, 0, taps_dx),
    )
    blocks = (channels + MAPS_PER_BLOCK - 1) // MAPS_PER_BLOCK
    mask_shape = (num_images, blocks, mid_y, mid_x) if keep_mask else (0,)
    return _in_format_of(x, out), x.new_empty(mask_shape, dtype=torch.int16)


def _fake_resampling(x, mask, fu, fd, up, down, up_offset, down_offset, out_size, gain, slope, flip_filter):
    return _in_format_of(x, x.new_empty(*x.shape[:2], *out_size))


def _in_format_of(x: Tensor, out: Tensor) -> Tensor:
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return out.to(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)


def _keep_forward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, b, fu, fd, up, down, padding, gain, slope, _, flip_filter, _ = inputs
    mask = output[1]
    ctx.mark_non_differentiable(mask)
    ctx.save_for_backward(mask, fu, fd)
    ctx.size = x.shape[2:]
    ctx.bias_dtype = None if b is None else b.dtype
    ctx.arguments = up, down, [padding[0], padding[2]], [0, 0], gain * up**2, slope, flip_filter


def _forward_gradient(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    mask, fu, fd = ctx.saved_tensors
    grad_x = _adjoint(grad, mask, fu, fd, ctx.size, *ctx.arguments)
    grad_b = grad_x.sum(dim=[0, 2, 3], dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    return grad_x, grad_b, *[None] * 10


def _keep_resampling(ctx, inputs: tuple, output: Tensor) -> None:
    x, mask, fu, fd, up, down, up_offset, down_offset, _, gain, slope, flip_filter = inputs
    ctx.save_for_backward(mask, fu, fd)
    ctx.size = x.shape[2:]
    ctx.arguments = up, down, up_offset, down_offset, gain, slope, flip_filter


def _resampling_gradient(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    mask, fu, fd = ctx.saved_tensors
    return _adjoint(grad, mask, fu, fd, ctx.size, *ctx.arguments), *[None] * 11


def _adjoint(
    grad: Tensor,
    mask: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    size: Sequence[int],
    up: int,
    down: int,
    up_offset: Sequence[int],
    down_offset: Sequence[int],
    gain: float,
    slope: float,
    flip_filter: bool,
) -> Tensor:
    """Gradient of the images, of `size` (height, width), before a masked resampling; offsets are (x, y)."""
    reversed_up = [taps - 1 - offset for taps, offset in zip(filter_size(fd), down_offset, strict=True)]
    reversed_down = [taps - 1 - offset for taps, offset in zip(filter_size(fu), up_offset, strict=True)]
    return torch.ops.stylesan_cpu.masked_resampling(
        grad, mask, fd, fu, down, up, reversed_up, reversed_down, size, gain, slope, not flip_filter
    )


reason_for_absence = Operators(_register_rules).reason_for_absence
