# SPDX-License-Identifier: MIT
"""Filtered leaky ReLU on GPUs as one fused Triton kernel per pass; the same function as `filtered_lrelu.py`.

Three linear-in-something passes call each other's adjoints, so that gradients of any order exist: forward,
tangent (the forward pass of a perturbation) and adjoint (the gradient). All are registered with torch.library.

Bytes: forward reads x once and writes the result once; the up-sampled image, 4 to 16 times x, stays on chip. The
backward pass needs the slope at every up-sampled pixel. Kept as a mask of two bits (sign, clamped), that is
written once and read once: 2 bytes per pixel of x when up=2, 8 when up=4. Recomputed from x it is one read of x:
2 bytes in half precision, 4 in float32, and nothing to write. So it is recomputed, which costs two more
products on tensor cores that wait for memory and scalar work anyway, and leaves no pass with a second output.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from torch_utils.ops.banded import num_positions
from torch_utils.ops.filtered_lrelu_launch import MAX_VECTOR, KernelArguments, power_of_two, run_kernel
from torch_utils.ops.filtered_lrelu_tiles import MAX_TERMS, Axis, Resampling, fits
from torch_utils.ops.upfirdn2d import Padding, filter_size, parse_padding

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on CPU tensors, slowly, in Python
MAX_PADDING = 2**14  # up-sampled pixels; the kernel's integers are good for more


def supports(x: Tensor, fu: Tensor | None, fd: Tensor | None, up: int, down: int, padding: Padding) -> bool:
    """Whether `filtered_lrelu_triton` serves such a call; looks at sizes and types only, never at values.

    Not: float64, layers that resample nothing, filters of more taps than a tile has pixels, two-dimensional
    up-sampling filters of more than 8 taps a side, images without pixels, GPUs before Ampere, AMD's.
    """
    is_pointwise = fu is None and fd is None and up == 1 and down == 1
    if x.ndim != 4 or x.dtype not in DTYPES or is_pointwise or up < 1 or down < 1 or not _has_device(x):
        return False
    if max(abs(p) for p in parse_padding(padding)) > MAX_PADDING or 0 in x.shape[1:]:
        return False
    up_terms = 1 if fu is None or fu.ndim == 1 else power_of_two(min(fu.shape))
    down_terms = 1 if fd is None or fd.ndim == 1 else power_of_two(min(*fd.shape, MAX_TERMS))
    if up_terms > MAX_TERMS:
        return False
    (up_x, up_y), (down_x, down_y) = filter_size(fu), filter_size(fd)
    y, x_ = Axis(1, up_y, down_y), Axis(1, up_x, down_x, MAX_VECTOR, MAX_VECTOR)
    return all(
        fits(y, x_, Resampling(up, down, up_terms, down_terms, x.element_size(), is_adjoint, True))
        for is_adjoint in (False, True)
    )


def filtered_lrelu_triton(
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
    """`filtered_lrelu.filtered_lrelu` of a call that `supports` accepts, with arguments that were checked there.

    x: float16, bfloat16 or float32, accumulated in float32; between the products, pixels are rounded to the
    dtype of x. Other memory formats are copied to NCHW. Raises ValueError if the padded image is too small.
    """
    padding = list(parse_padding(padding))
    return _forward(x, b, fu, fd, up, down, padding, gain, slope, clamp, flip_filter)


_SCHEMA = (
    "Tensor x, Tensor? b, Tensor? fu, Tensor? fd, int up, int down, int[] padding, "
    "float gain, float slope, float? clamp, bool flip_filter) -> Tensor"
)


@torch.library.custom_op("stylesan::filtered_lrelu", mutates_args=(), schema=f"({_SCHEMA}")
def _forward(x, b, fu, fd, *arguments):
    return _run(None, x, b, fu, fd, arguments, is_adjoint=False)


@torch.library.custom_op("stylesan::filtered_lrelu_tangent", mutates_args=(), schema=f"(Tensor v, {_SCHEMA}")
def _tangent(v, x, b, fu, fd, *arguments):
    """Directional derivative of `_forward` at x along v, a change of x."""
    return _run(v, x, b, fu, fd, arguments, is_adjoint=False)


@torch.library.custom_op("stylesan::filtered_lrelu_adjoint", mutates_args=(), schema=f"(Tensor g, {_SCHEMA}")
def _adjoint(g, x, b, fu, fd, *arguments):
    """Gradient of x from the gradient g of `_forward`'s result."""
    return _run(g, x, b, fu, fd, arguments, is_adjoint=True)


@_forward.register_fake
def _(x, b, fu, fd, *arguments):
    return x.new_empty(_out_shape(x, fu, fd, KernelArguments(*arguments)))


@_tangent.register_fake
def _(v, x, b, fu, fd, *arguments):
    return x.new_empty(_out_shape(x, fu, fd, KernelArguments(*arguments)))


@_adjoint.register_fake
def _(g, x, b, fu, fd, *arguments):
    return x.new_empty(x.shape)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    """Keep x, b and the filters, the last four tensors of each operator."""
    first = len(inputs) - len(KernelArguments._fields) - 4
    ctx.save_for_backward(*inputs[first : first + 4])
    ctx.arguments = inputs[first + 4 :]


def _forward_gradient(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
    x, b, fu, fd = ctx.saved_tensors
    grad_x = _adjoint(g, x, b, fu, fd, *ctx.arguments)
    grad_b = grad_x.sum(dim=[0, 2, 3]).to(b.dtype) if ctx.needs_input_grad[1] else None
    return grad_x, grad_b, *[None] * (2 + len(ctx.arguments))


def _linear_gradient(transposed: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Gradient of a pass that is linear in its first argument and piecewise constant in x and b."""

    def gradient(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, b, fu, fd = ctx.saved_tensors
        return transposed(g, x, b, fu, fd, *ctx.arguments), *[None] * (4 + len(ctx.arguments))

    return gradient


_forward.register_autograd(_forward_gradient, setup_context=_keep)
_tangent.register_autograd(_linear_gradient(_adjoint), setup_context=_keep)
_adjoint.register_autograd(_linear_gradient(_tangent), setup_context=_keep)


def _run(other, x, b, fu, fd, arguments: tuple, is_adjoint: bool) -> Tensor:
    arguments = KernelArguments(*arguments)
    out_size = _out_shape(x, fu, fd, arguments)[2:]
    return run_kernel(other, x, b, fu, fd, arguments, out_size, is_adjoint)


def _out_shape(
    x: Tensor, fu: Tensor | None, fd: Tensor | None, arguments: KernelArguments
) -> tuple[int, ...]:
    """Shape of the forward pass's result. Raises ValueError if a padded axis is smaller than its filter."""
    x0, x1, y0, y1 = arguments.padding
    size = []
    for axis, before, after in ((2, y0, y1), (3, x0, x1)):
        taps_u, taps_d = filter_size(fu)[3 - axis], filter_size(fd)[3 - axis]
        up_size = num_positions(x.shape[axis], arguments.up, 1, before, after, taps_u)
        size.append(num_positions(up_size, 1, arguments.down, 0, 0, taps_d))
    return *x.shape[:2], *size


def _has_device(x: Tensor) -> bool:
    if not HAS_TRITON:
        return False
    if x.is_cuda and torch.version.hip is None:
        return torch.cuda.get_device_properties(x.device).major >= 8
    return IS_INTERPRETED
