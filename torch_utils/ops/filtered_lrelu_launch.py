# SPDX-License-Identifier: MIT
"""From tensors to launches of the Triton kernel of filtered leaky ReLU: filters as terms, tiles, arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.filtered_lrelu_tiles import (
    MAX_TERMS,
    Axis,
    Resampling,
    TilePlan,
    maps_per_program,
    plan_tiles,
)
from torch_utils.ops.separable import separable_terms

# Of float32: fused multiply-adds, no tensor cores. "tf32x3" would use these at nearly the same precision.
FLOAT32_PRODUCTS = "ieee"
MAX_VECTOR = 4  # pixels per load


class KernelArguments(NamedTuple):
    """Arguments of filtered leaky ReLU that are no tensors, in the order of the registered operators."""

    up: int
    down: int
    padding: Sequence[int]  # x0, x1, y0, y1
    gain: float
    slope: float
    clamp: float | None
    flip_filter: bool


class _Filter(NamedTuple):
    """Separable terms, padded with zeros to a power of two; no taps stand for one tap of 1."""

    taps_y: Tensor | None  # (terms, num_taps_y) float32, contiguous
    taps_x: Tensor | None
    num_taps_y: int
    num_taps_x: int
    num_terms: int


def _parts(f: Tensor | None, dtype: torch.dtype) -> list[_Filter]:
    """The filters, at most MAX_TERMS terms each, that sum to `f`."""
    if f is None:
        return [_Filter(None, None, 1, 1, 1)]
    if f.ndim == 1:
        taps = f.detach().float().contiguous()
        return [_Filter(taps, taps, len(taps), len(taps), 1)]
    taps_y, taps_x = separable_terms(f, dtype)
    parts = []
    for y, x in zip(taps_y.split(MAX_TERMS), taps_x.split(MAX_TERMS), strict=True):
        num_terms = power_of_two(len(y))
        y, x = (F.pad(taps, [0, 0, 0, num_terms - len(taps)]) for taps in (y, x))
        parts.append(_Filter(y, x, y.shape[1], x.shape[1], num_terms))
    return parts


def run_kernel(
    other: Tensor | None,
    x: Tensor,
    b: Tensor | None,
    fu: Tensor | None,
    fd: Tensor | None,
    arguments: KernelArguments,
    out_size: tuple[int, int],
    is_adjoint: bool,
) -> Tensor:
    """The forward pass; with `other`, a change of x, the tangent; with `is_adjoint`, where `other` is the gradient
    of the output, the gradient of x."""
    size = x.shape[2:] if is_adjoint else out_size
    result = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device)
    if result.numel() == 0:
        return result
    x = x.contiguous()
    b = None if b is None else b.contiguous()
    other = None if other is None else other.to(x.dtype).contiguous()
    (up_filter,) = _parts(fu, x.dtype)
    for index, down_filter in enumerate(_parts(fd, x.dtype)):
        part = result if index == 0 else torch.empty_like(result)
        _launch(part, other, x, b, up_filter, down_filter, arguments, out_size, is_adjoint)
        if index > 0:
            result += part
    return result


def _launch(
    result: Tensor,
    other: Tensor | None,
    x: Tensor,
    b: Tensor | None,
    fu: _Filter,
    fd: _Filter,
    arguments: KernelArguments,
    out_size: tuple[int, int],
    is_adjoint: bool,
) -> None:
    from torch_utils.ops.filtered_lrelu_kernel import filtered_lrelu_kernel  # triton is not everywhere

    up, down, (x0, _, y0, _), gain, slope, clamp, flip_filter = arguments
    in_vector, out_vector = (math.gcd(width, MAX_VECTOR) for width in (x.shape[3], out_size[1]))
    plan = plan_tiles(
        Axis(result.shape[2], fu.num_taps_y, fd.num_taps_y),
        Axis(result.shape[3], fu.num_taps_x, fd.num_taps_x, in_vector, out_vector),
        Resampling(up, down, fu.num_terms, fd.num_terms, x.element_size(), is_adjoint, other is not None),
    )
    num_maps, num_tiles = x.shape[0] * x.shape[1], plan.num_tiles_y * plan.num_tiles_x
    maps_each = maps_per_program(num_maps, num_tiles)
    # g * max(min(a, c / g), -c / g) = max(min(g * a, c), -c): the gain moves behind the clamp.
    has_limit = clamp is not None and gain != 0
    limit = clamp / abs(gain) if has_limit else 0.0
    # fmt: off
    with torch.cuda.device_of(x):
        filtered_lrelu_kernel[(num_tiles * -(-num_maps // maps_each),)](
            x, b, other, result, fu.taps_y, fu.taps_x, fd.taps_y, fd.taps_x,
            fu.num_taps_y, fu.num_taps_x, fd.num_taps_y, fd.num_taps_x,
            num_maps, x.shape[1], *x.shape[2:], *out_size, y0, x0, gain, slope, limit,
            plan.y.tile, plan.x.tile, plan.num_tiles_x, num_tiles, maps_each,
            ADJOINT=is_adjoint, UP=up, DOWN=down, HAS_LIMIT=has_limit, FLIP=flip_filter,
            RANK_UP=fu.num_terms, RANK_DOWN=fd.num_terms,
            **_block_sizes(plan), IN_VECTOR=in_vector, OUT_VECTOR=out_vector,
            PRECISION=FLOAT32_PRODUCTS, num_warps=plan.num_warps,
        )
    # fmt: on


def _block_sizes(plan: TilePlan) -> dict[str, int]:
    """Sides of the kernel's tiles by the names of its parameters."""
    names = ("IN", "UP", "OTHER", "RESULT")
    sizes = {f"{name}_Y": size for name, size in zip(names, plan.y[1:], strict=True)}
    return sizes | {f"{name}_X": size for name, size in zip(names, plan.x[1:], strict=True)}


def power_of_two(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
