# SPDX-License-Identifier: MIT
"""3x3 convolutions with a quarter of the multiplications, on a CPU: Winograd's minimal filtering F(4x4, 3x3).

Tiles of 4x4 outputs come from patches of 6x6 inputs by 36 products per pair of channels, in place of 144; those are
matrix products (A. Lavin and S. Gray, arXiv:1509.09308). Two C++ operators (csrc/winograd.cpp), of which each is what
the other's derivatives need. Rounding is that of the direct convolution (csrc/winograd_axes.h says why).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_utils.ops.choice import backend
from torch_utils.ops.cpu_extension import NAME, Operators

DTYPES = (torch.float32, torch.float64)
FEWEST_CHANNELS = 64  # in and out: with fewer the transforms of images cost about what they save
FEWEST_PIXELS = 1024  # of an output: with fewer the transforms of weights do


def pays(x: Tensor, w: Tensor, padding: int) -> bool:
    """Whether `conv3x3` is there, wanted (`choice.backend`) and faster than `F.conv2d` for these arguments."""
    if x.device.type != "cpu" or w.device.type != "cpu" or x.dtype != torch.float32 or w.dtype != x.dtype:
        return False
    if x.ndim != 4 or w.ndim != 4 or w.shape[2:] != (3, 3) or min(w.shape[:2]) < FEWEST_CHANNELS:
        return False
    height, width = (size + 2 * padding - 2 for size in x.shape[2:])
    if min(height, width) < 1 or height * width < FEWEST_PIXELS:
        return False
    return backend() in ("auto", "cpp") and not reason_for_absence()


def conv3x3(x: Tensor, w: Tensor, padding: int = 0) -> Tensor:
    """The correlation `F.conv2d(x, w, padding=padding)`: `(N, O, H + 2 * padding - 2, W + 2 * padding - 2)`.

    x: `(N, I, H, W)`; w: `(O, I, 3, 3)`, of the same dtype, float32 or float64, on the CPU. A negative padding crops.
    Differentiable in both any number of times. An image's result does not depend on its batch, to the last bit.
    Needs up to 36 * O * I numbers of memory for its duration. Raises ValueError for tensors that do not fit. Call it
    only if there is no `reason_for_absence`.
    """
    if x.ndim != 4 or w.ndim != 4 or w.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"weight {tuple(w.shape)} does not fit input {tuple(x.shape)}: need (O, I, 3, 3), (N, I, H, W)"
        )
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        raise ValueError(f"input of {x.dtype} and weight of {w.dtype}: need both in float32 or float64")
    if min(x.shape[2:]) + 2 * padding < 3:
        raise ValueError(
            f"images of {tuple(x.shape[2:])} + padding {padding} are smaller than 3x3: increase it"
        )
    return torch.ops.stylesan_cpu.winograd_conv(x, w, padding, False)


def _register_rules() -> None:
    """Tell torch the operators' shapes and derivatives.

    `winograd_conv` is the convolution of x, or with `is_adjoint` what gives the gradient of its input: that with the
    weight's channels exchanged and its taps reversed. `winograd_weight_gradient` gives that of the weight.
    """
    torch.library.register_fake(f"{NAME}::winograd_conv", _fake_conv)
    torch.library.register_fake(f"{NAME}::winograd_weight_gradient", _fake_weight_gradient)
    torch.library.register_autograd(f"{NAME}::winograd_conv", _conv_gradient, setup_context=_keep_conv)
    torch.library.register_autograd(
        f"{NAME}::winograd_weight_gradient", _weight_gradient_gradient, setup_context=_keep_weight_gradient
    )


def _fake_conv(x, w, padding, is_adjoint):
    height, width = (size + 2 * padding - 2 for size in x.shape[2:])
    return x.new_empty(x.shape[0], w.shape[1 if is_adjoint else 0], height, width)


def _fake_weight_gradient(x, grad, padding):
    return x.new_empty(grad.shape[1], x.shape[1], 3, 3)


def _keep_conv(ctx, inputs: tuple, output: Tensor) -> None:
    x, w, ctx.padding, ctx.is_adjoint = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)


def _conv_gradient(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w = ctx.saved_tensors
    ops, grad_x, grad_w = torch.ops.stylesan_cpu, None, None
    if ctx.needs_input_grad[0]:
        grad_x = ops.winograd_conv(grad, w, 2 - ctx.padding, not ctx.is_adjoint)
    if ctx.needs_input_grad[1]:
        grad_w = (
            ops.winograd_weight_gradient(grad, x, 2 - ctx.padding)
            if ctx.is_adjoint
            else ops.winograd_weight_gradient(x, grad, ctx.padding)
        )
    return grad_x, grad_w, None, None


def _keep_weight_gradient(ctx, inputs: tuple, output: Tensor) -> None:
    x, grad, ctx.padding = inputs
    ctx.save_for_backward(x, grad)


def _weight_gradient_gradient(ctx, grad_w: Tensor) -> tuple[Tensor | None, ...]:
    x, grad = ctx.saved_tensors
    ops, grad_x, grad_grad = torch.ops.stylesan_cpu, None, None
    if ctx.needs_input_grad[0]:
        grad_x = ops.winograd_conv(grad, grad_w, 2 - ctx.padding, True)
    if ctx.needs_input_grad[1]:
        grad_grad = ops.winograd_conv(x, grad_w, ctx.padding, False)
    return grad_x, grad_grad, None


reason_for_absence = Operators(_register_rules).reason_for_absence
