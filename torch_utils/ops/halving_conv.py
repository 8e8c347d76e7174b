# SPDX-License-Identifier: MIT
"""Convolution with 4x4 kernels of stride 2, which halves an image: the work of a discriminator's heads.

On a CPU with AVX2 it is a C++ operator with 9/16 of the multiplications (csrc/halving_conv.cpp), as exact as the direct
form, for the gradients too. Everywhere else it is torch's convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_utils.ops.choice import backend
from torch_utils.ops.cpu_extension import NAME, Operators

KERNEL_SIZE, STRIDE = 4, 2
CHANNEL_MULTIPLE = 16  # of what the operator serves; kColumns in C++
# Of all outputs of a batch: with fewer, transforming the kernels takes longer than it saves.
MIN_POSITIONS = 128


def halving_conv2d(x: Tensor, w: Tensor, b: Tensor | None = None, padding: int = 1) -> Tensor:
    """`F.conv2d(x, w, b, stride=2, padding=padding)`, up to rounding: x (N, C, H, W), w (O, C, 4, 4), b (O,).

    Differentiable any number of times. Best in channels_last format, which the C++ operator always returns.
    """
    chosen = backend()
    is_wanted = chosen == "cpp" or (chosen == "auto" and _is_fastest(x, padding))
    if is_wanted and supports(x, w, padding) and not reason_for_absence():
        return torch.ops.stylesan_cpu.halving_conv(x, w, b, padding)
    return F.conv2d(x, w, b, STRIDE, padding)


def supports(x: Tensor, w: Tensor, padding: int) -> bool:
    """Whether the operator could serve such tensors, if it can be built."""
    return (
        x.device.type == "cpu"
        and x.dtype == w.dtype == torch.float32
        and w.shape[2:] == (KERNEL_SIZE, KERNEL_SIZE)
        and w.shape[0] % CHANNEL_MULTIPLE == w.shape[1] % CHANNEL_MULTIPLE == 0
        and _num_positions(x, padding) > 0
    )


def _is_fastest(x: Tensor, padding: int) -> bool:
    """Measured with AVX2. With wider vectors torch's convolution doubles its speed, and the operator does not."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and _num_positions(x, padding) >= MIN_POSITIONS


def _num_positions(x: Tensor, padding: int) -> int:
    height, width = (_out_size(side, padding) for side in x.shape[2:])
    return len(x) * height * width if min(height, width) > 0 else 0


def _out_size(size: int, padding: int) -> int:
    return (size + 2 * padding - KERNEL_SIZE) // STRIDE + 1


def _register_rules() -> None:
    """Tell torch the operators' shapes and derivatives."""
    torch.library.register_fake(f"{NAME}::halving_conv", _fake_forward)
    torch.library.register_fake(f"{NAME}::halving_conv_input_gradient", _fake_input_gradient)
    torch.library.register_fake(f"{NAME}::halving_conv_kernel_gradient", _fake_kernel_gradient)
    torch.library.register_autograd(f"{NAME}::halving_conv", _gradients, setup_context=_keep)


def _fake_forward(x, w, b, padding):
    height, width = (_out_size(side, padding) for side in x.shape[2:])
    return x.new_empty(len(x), len(w), height, width).to(memory_format=torch.channels_last)


def _fake_input_gradient(gradient, w, size, padding):
    out = gradient.new_empty(len(gradient), w.shape[1], *size)
    return out.to(memory_format=torch.channels_last)


def _fake_kernel_gradient(x, gradient, like, padding):
    return torch.empty_like(like)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    x, w, b, ctx.padding = inputs
    ctx.bias_sizes = None if b is None else [len(b)]
    ctx.save_for_backward(x, w)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, w = ctx.saved_tensors
    wants_x, wants_w, wants_b, _ = ctx.needs_input_grad
    if torch.is_grad_enabled():  # the gradient will be differentiated: torch knows how for its own operator
        mask = [wants_x, wants_w, wants_b]
        stride, padding = [STRIDE] * 2, [ctx.padding] * 2
        return *torch.ops.aten.convolution_backward(
            gradient, x, w, ctx.bias_sizes, stride, padding, [1, 1], False, [0, 0], 1, mask
        ), None
    ops, padding = torch.ops.stylesan_cpu, ctx.padding
    grad_x = ops.halving_conv_input_gradient(gradient, w, x.shape[2:], padding) if wants_x else None
    grad_w = ops.halving_conv_kernel_gradient(x, gradient, w, padding) if wants_w else None
    return grad_x, grad_w, gradient.sum(dim=[0, 2, 3]) if wants_b else None, None


reason_for_absence = Operators(_register_rules).reason_for_absence
