# SPDX-License-Identifier: MIT
"""Filtered leaky ReLU in plain PyTorch: the truth that the fused implementations are tested against.

With separable filters, the whole chain runs on a few maps at a time, so that the up-sampled image, by far the
largest tensor of the generator, stays in the processor's cache. Only the local slope is kept for the backward
pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.banded import BandedMatrix, resample, resample_maps
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import Padding, axis_matrices, parse_padding, upfirdn2d

CHUNK_BYTES = 2**21  # up-sampled maps processed together on a CPU; 1 to 4 MiB measure alike


def filtered_lrelu_reference(
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
    """`filtered_lrelu.filtered_lrelu` with checked arguments, on any device and for any floating-point dtype."""
    if fu is None and fd is None and up == 1 and down == 1:
        x = F.pad(bias_act(x, b), parse_padding(padding))
        return bias_act(x, act="linear" if slope == 1 else "lrelu", alpha=slope, gain=gain, clamp=clamp)

    # g * max(min(a, c / g), -c / g) = max(min(g * a, c), -c): the gain moves behind the clamp, into the
    # filter.
    limit = None if clamp is None or gain == 0 else clamp / abs(gain)
    activation = _Activation(slope, limit)
    if (fu is not None and fu.ndim != 1) or (fd is not None and fd.ndim != 1):
        x = upfirdn2d(bias_act(x, b), fu, up=up, padding=padding, flip_filter=flip_filter, gain=up**2)
        x = _LeakyReLU.apply(x, activation)
        return upfirdn2d(x, fd, down=down, flip_filter=flip_filter, gain=gain)

    upsample = axis_matrices(x, fu, up, 1, padding, flip_filter, up**2)
    upsampled_size = torch.Size([matrix.dense.shape[0] for matrix in upsample])
    downsample = axis_matrices(x, fd, 1, down, 0, flip_filter, gain, size=upsampled_size)
    b = x.new_zeros(x.shape[1]) if b is None else b.to(x.dtype)
    is_training = torch.is_grad_enabled() and (x.requires_grad or b.requires_grad)
    return _FilteredLeakyReLU.apply(x, b, upsample, downsample, activation, is_training)


class _Activation(NamedTuple):
    """Leaky ReLU followed by a clamp, without gain."""

    slope: float
    limit: float | None  # bound on the magnitude of the result; None = no bound

    def apply(self, x: Tensor, local_slope: Tensor, out: Tensor) -> None:
        """Write the activation of `x` to `out`, which may be `x`, and its derivative to `local_slope`."""
        # Arithmetic on floats throughout: comparisons and masks run at a fraction of its speed on CPUs.
        if self.slope <= 1:
            torch.sign(x, out=local_slope).clamp_(min=self.slope)
        else:
            local_slope.copy_(torch.where(x > 0, 1.0, self.slope))
        torch.mul(x, local_slope, out=out)
        if self.limit is not None and self._may_exceed_limit(out):
            local_slope.masked_fill_(out.abs() > self.limit, 0)
            out.clamp_(-self.limit, self.limit)

    def _may_exceed_limit(self, x: Tensor) -> bool:
        """On a CPU, one fast look saves two slow passes, nearly always; a GPU would have to wait for it."""
        if x.device.type != "cpu" or x.numel() == 0:
            return True
        low, high = torch.aminmax(x)
        return max(-low.item(), high.item()) > self.limit


class _LeakyReLU(torch.autograd.Function):
    """The activation alone."""

    @staticmethod
    def forward(ctx, x: Tensor, activation: _Activation) -> Tensor:
        local_slope, out = torch.empty_like(x), torch.empty_like(x)
        activation.apply(x, local_slope, out)
        ctx.save_for_backward(local_slope)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (local_slope,) = ctx.saved_tensors
        return grad * local_slope, None


class _FilteredLeakyReLU(torch.autograd.Function):
    """Bias, up-sampling, activation and down-sampling, chunk by chunk."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        b: Tensor,
        upsample: tuple[BandedMatrix, BandedMatrix],
        downsample: tuple[BandedMatrix, BandedMatrix],
        activation: _Activation,
        is_training: bool,
    ) -> Tensor:
        maps = x.flatten(0, 1)  # (N * C, H, W)
        map_bias = b.repeat(x.shape[0])[:, None, None]
        size = [matrix.dense.shape[0] for matrix in upsample]
        out = maps.new_empty(maps.shape[0], *(matrix.dense.shape[0] for matrix in downsample))
        chunks = _chunks(maps, size)
        slopes = maps.new_empty(maps.shape[0] if is_training else chunks[0].stop, *size)
        work = maps.new_empty(chunks[0].stop, *size)
        for chunk in chunks:
            num_maps = chunk.stop - chunk.start
            images = work[:num_maps]
            resample_maps(maps[chunk] + map_bias[chunk], *upsample, out=images)
            activation.apply(images, slopes[chunk] if is_training else slopes[:num_maps], out=images)
            resample_maps(images, *downsample, out=out[chunk])
        if is_training:
            ctx.save_for_backward(slopes)
        ctx.matrices = upsample, downsample
        return out.unflatten(0, x.shape[:2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        upsample, downsample = ctx.matrices
        if torch.is_grad_enabled():  # a graph of this gradient is wanted
            grad_up = resample(grad, *(matrix.t() for matrix in downsample))
            grad_x = resample(grad_up * slopes.view_as(grad_up), *(matrix.t() for matrix in upsample))
        else:
            grad_x = _backward_maps(grad.flatten(0, 1), slopes, upsample, downsample).unflatten(
                0, grad.shape[:2]
            )
        grad_b = grad_x.sum(dim=[0, 2, 3]) if ctx.needs_input_grad[1] else None
        return grad_x, grad_b, None, None, None, None


def _backward_maps(
    grad: Tensor,
    slopes: Tensor,
    upsample: tuple[BandedMatrix, BandedMatrix],
    downsample: tuple[BandedMatrix, BandedMatrix],
) -> Tensor:
    """Gradient of the maps `(n, H, W)` given that of the result, chunk by chunk, without a graph."""
    grad_x = grad.new_empty(grad.shape[0], *(matrix.dense.shape[1] for matrix in upsample))
    chunks = _chunks(slopes, slopes.shape[1:])
    work = slopes.new_empty(chunks[0].stop, *slopes.shape[1:])
    for chunk in chunks:
        images = work[: chunk.stop - chunk.start]
        resample_maps(grad[chunk], *(matrix.t() for matrix in downsample), out=images)
        images.mul_(slopes[chunk])
        resample_maps(images, *(matrix.t() for matrix in upsample), out=grad_x[chunk])
    return grad_x


def _chunks(maps: Tensor, upsampled_size: tuple[int, ...] | list[int]) -> list[slice]:
    """Runs of maps to process together; the first is the longest."""
    num_maps = maps.shape[0]
    step = num_maps
    if maps.device.type == "cpu":
        step = max(CHUNK_BYTES // (math.prod(upsampled_size) * maps.element_size()), 1)
    return [slice(start, min(start + step, num_maps)) for start in range(0, num_maps, max(step, 1))] or [
        slice(0, 0)
    ]
