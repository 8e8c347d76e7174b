# SPDX-License-Identifier: MIT
"""Resampling of an image axis as a product with a banded matrix: up-sample, pad or crop, filter, down-sample.

Entry (o, i) of such a matrix is the filter tap that links input i to output o, and zero away from a diagonal
band. Small matrices are multiplied whole: a dense product of this size runs at the processor's full speed.
Large ones are cut into blocks along the band, so that the cost grows with the size of the image and not with
its square.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_DENSE_SIZE = 64  # larger matrices are cut into blocks
BLOCK_ROWS = 48  # fewer rows: more, smaller products to start; more rows: more zeros to multiply


class BandedMatrix(NamedTuple):
    """`dense` `(rows, cols)` is zero unless first <= col * col_step - row * row_step <= last."""

    dense: Tensor
    row_step: int
    col_step: int
    first: int
    last: int

    def t(self) -> BandedMatrix:
        """The transpose; shares memory."""
        return BandedMatrix(self.dense.t(), self.col_step, self.row_step, -self.last, -self.first)

    def blocks(self) -> tuple[tuple[slice, slice], ...]:
        """(rows, cols) of blocks that contain every nonzero entry; the row slices tile the matrix."""
        return _blocks(*self.dense.shape, self.row_step, self.col_step, self.first, self.last)


def resampling_matrix(
    taps: Tensor, in_size: int, up: int, down: int, before: int, after: int
) -> BandedMatrix:
    """`(out_size, in_size)` matrix that up-samples, pads, correlates with `taps` and down-samples.

    Gathered from `taps` on every call, so it follows a filter that is moved, cast or loaded anew; that costs
    some ten microseconds. Only the positions, which depend on sizes alone, are cached. Raises ValueError if
    the padded axis is smaller than the filter.
    """
    num_taps = taps.shape[0]
    out_size = num_positions(in_size, up, down, before, after, num_taps)
    index = _tap_index(num_taps, in_size, out_size, up, down, before, taps.device)
    return BandedMatrix(F.pad(taps, [0, 1])[index], down, up, -before, num_taps - 1 - before)


def num_positions(in_size: int, up: int, down: int, before: int, after: int, num_taps: int) -> int:
    """Output size of one axis. Raises ValueError if the padded axis is smaller than the filter."""
    padded_size = in_size * up + before + after
    if padded_size < num_taps:
        raise ValueError(
            f"image axis of {in_size} pixels x up {up} + padding {before} + {after} = {padded_size} is "
            f"smaller than the filter's {num_taps} taps: increase the padding"
        )
    return (padded_size - num_taps) // down + 1


def resample(x: Tensor, to_height: BandedMatrix, to_width: BandedMatrix) -> Tensor:
    """`to_height @ x @ to_width.T` for each map of x: `(..., H, W)` -> `(..., H', W')`.

    Differentiable in `x` any number of times; never in the matrices.
    """
    return _Resample.apply(x.flatten(0, -3), to_height, to_width).unflatten(0, x.shape[:-2])


class _Resample(torch.autograd.Function):
    """The adjoint of resampling is resampling with the transposed matrices."""

    @staticmethod
    def forward(ctx, maps: Tensor, to_height: BandedMatrix, to_width: BandedMatrix) -> Tensor:
        ctx.matrices = to_height, to_width
        return resample_maps(maps, to_height, to_width)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None]:
        to_height, to_width = ctx.matrices
        return _Resample.apply(grad, to_height.t(), to_width.t()), None, None


def resample_maps(
    maps: Tensor, to_height: BandedMatrix, to_width: BandedMatrix, out: Tensor | None = None
) -> Tensor:
    """`resample` of `(n, H, W)` without a graph, into `out` if given."""
    # Rows of all maps form one large product, columns need one product per map: do the latter on the smaller
    # side.
    if to_height.dense.shape[0] > to_height.dense.shape[1]:
        return _multiply_width(_multiply_height(maps, to_height), to_width, out)
    return _multiply_height(_multiply_width(maps, to_width), to_height, out)


def _multiply_height(maps: Tensor, matrix: BandedMatrix, out: Tensor | None = None) -> Tensor:
    """`matrix @ maps`, `(n, H, W)` -> `(n, H', W)`."""
    if out is None:
        out = maps.new_empty(maps.shape[0], matrix.dense.shape[0], maps.shape[2])
    for rows, cols in matrix.blocks():
        block = matrix.dense[rows, cols].expand(maps.shape[0], -1, -1)
        torch.bmm(block, maps[:, cols], out=out[:, rows])
    return out


def _multiply_width(maps: Tensor, matrix: BandedMatrix, out: Tensor | None = None) -> Tensor:
    """`maps @ matrix.T`, `(n, H, W)` -> `(n, H, W')`."""
    if out is None:
        out = maps.new_empty(maps.shape[0], maps.shape[1], matrix.dense.shape[0])
    lines, out_lines = maps.flatten(0, 1), out.flatten(0, 1)  # views: `out` is contiguous
    for rows, cols in matrix.blocks():
        torch.mm(lines[:, cols], matrix.dense[rows, cols].t(), out=out_lines[:, rows])
    return out


@lru_cache(maxsize=1024)
def _blocks(
    num_rows: int, num_cols: int, row_step: int, col_step: int, first: int, last: int
) -> tuple[tuple[slice, slice], ...]:
    if max(num_rows, num_cols) <= MAX_DENSE_SIZE:
        return ((slice(0, num_rows), slice(0, num_cols)),)
    blocks = []
    for row in range(0, num_rows, BLOCK_ROWS):
        row_end = min(row + BLOCK_ROWS, num_rows)
        col = -(-(row * row_step + first) // col_step)  # rounded up
        col_end = ((row_end - 1) * row_step + last) // col_step + 1
        col = min(max(col, 0), num_cols)
        blocks.append((slice(row, row_end), slice(col, min(max(col_end, col), num_cols))))
    return tuple(blocks)


@lru_cache(maxsize=1024)
def _tap_index(
    num_taps: int, in_size: int, out_size: int, up: int, down: int, before: int, device: torch.device
) -> Tensor:
    """Which tap links input i to output o; `num_taps`, where `resampling_matrix` puts a zero, for none."""
    inputs = torch.arange(in_size, device=device) * up + before
    outputs = torch.arange(out_size, device=device) * down
    index = inputs[None, :] - outputs[:, None]
    return index.masked_fill_((index < 0) | (index >= num_taps), num_taps)
