# SPDX-License-Identifier: MIT
"""The Triton kernel of filtered leaky ReLU: up-sampling, activation and down-sampling of one tile, on chip.

A program makes one tile of the result for several maps in turn. Filtering is a product with a banded matrix per
axis, as in `banded.py`; the matrices are made from the taps once per program. Each product is
`matrix @ previous.T`: on tensor cores a result lies in registers just as its transpose is wanted as the right
operand of the next product, so that a program of one warp passes intermediates on without shared memory.
"""

# Parameters are grouped by hand: one per line, they would fill pages.
# fmt: off

from __future__ import annotations

import os

import triton
import triton.language as tl

IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Not compiled in: layers and batches of all sizes share a kernel, as compiling one takes seconds.
RUN_TIME_INTEGERS = [
    *(f"num_{stage}_taps_{axis}" for stage in ("up", "down") for axis in "yx"),
    *(f"{image}_{side}" for image in ("in", "out", "tile") for side in ("height", "width")),
    *("num_maps", "num_channels", "before_y", "before_x", "num_tiles_x", "num_tiles", "maps_per_program"),
]
SHIFT = tl.constexpr(2**16)  # makes numerators positive: integer division rounds towards zero


@triton.jit(do_not_specialize=RUN_TIME_INTEGERS)
def filtered_lrelu_kernel(
    x, bias,  # (num_maps, in_height, in_width); (num_channels,) or None
    other,  # None: activate; else multiply by the local slope: maps as x, or as the output if ADJOINT
    result,  # maps as the output, or as x if ADJOINT
    up_taps_y, up_taps_x, down_taps_y, down_taps_x,  # (RANK, num_taps) float32, or None: one tap of 1
    num_up_taps_y, num_up_taps_x, num_down_taps_y, num_down_taps_x,
    num_maps, num_channels, in_height, in_width, out_height, out_width,
    before_y, before_x,  # padding in up-sampled pixels
    gain, slope, limit,  # the limit bounds the activation before the gain
    tile_height, tile_width, num_tiles_x, num_tiles, maps_per_program,  # a tile counts results
    ADJOINT: tl.constexpr,  # the gradient: down-sampling transposed, slope, up-sampling transposed
    UP: tl.constexpr, DOWN: tl.constexpr, HAS_LIMIT: tl.constexpr, FLIP: tl.constexpr,  # flip = correlate
    RANK_UP: tl.constexpr, RANK_DOWN: tl.constexpr,  # separable terms of the filters; powers of two
    IN_Y: tl.constexpr, IN_X: tl.constexpr,  # sides of tiles, powers of two: of x ...
    UP_Y: tl.constexpr, UP_X: tl.constexpr,  # ... up-sampled ...
    OTHER_Y: tl.constexpr, OTHER_X: tl.constexpr,  # ... of `other` ...
    RESULT_Y: tl.constexpr, RESULT_X: tl.constexpr,  # ... and of the result
    IN_VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr,  # pixels per load; divide the widths
    PRECISION: tl.constexpr,  # of float32 products
):
    tile = tl.program_id(0) % num_tiles
    first_map = tl.program_id(0) // num_tiles * maps_per_program
    y = tile // num_tiles_x * tile_height
    x_ = tile % num_tiles_x * tile_width
    dtype: tl.constexpr = x.dtype.element_ty
    in_y, end_in_y, out_y, end_out_y, upsample_y, spread_y, gather_y = _prepare_axis(
        y, tile_height, before_y, up_taps_y, down_taps_y, num_up_taps_y, num_down_taps_y, in_height, out_height,
        ADJOINT, UP, DOWN, FLIP, RANK_UP, RANK_DOWN, IN_Y, UP_Y, OTHER_Y, RESULT_Y, 1, 1, False, dtype)
    in_x, end_in_x, out_x, end_out_x, upsample_x, spread_x, gather_x = _prepare_axis(
        x_, tile_width, before_x, up_taps_x, down_taps_x, num_up_taps_x, num_down_taps_x, in_width, out_width,
        ADJOINT, UP, DOWN, FLIP, RANK_UP, RANK_DOWN, IN_X, UP_X, OTHER_X, RESULT_X, IN_VECTOR, OUT_VECTOR,
        True, dtype)
    for step in range(0, tl.minimum(maps_per_program, num_maps - first_map)):
        map_index = first_map + step
        image = _load_tile(
            x, map_index, in_y, in_x, end_in_y, end_in_x, in_height, in_width, bias, num_channels,
            IN_Y, IN_X, IN_VECTOR)
        z = _resample(tl.trans(image), upsample_y, upsample_x, RANK_UP, UP_X, IN_Y, PRECISION)
        if other is None:
            activated = _activate(tl.trans(z), slope, limit, HAS_LIMIT, dtype)
        else:
            if ADJOINT:
                image = _load_tile(
                    other, map_index, out_y, out_x, end_out_y, end_out_x, out_height, out_width, None, 1,
                    OTHER_Y, OTHER_X, OUT_VECTOR)
                tangent = _resample(tl.trans(image), spread_y, spread_x, RANK_DOWN, UP_X, OTHER_Y, PRECISION)
            else:
                image = _load_tile(
                    other, map_index, in_y, in_x, end_in_y, end_in_x, in_height, in_width, None, 1,
                    IN_Y, IN_X, IN_VECTOR)
                tangent = _resample(tl.trans(image), upsample_y, upsample_x, RANK_UP, UP_X, IN_Y, PRECISION)
            activated = tl.trans(tangent * _local_slope(z, slope, limit, HAS_LIMIT)).to(dtype)
        if ADJOINT:
            out = _resample(activated, gather_y, gather_x, RANK_UP, RESULT_X, UP_Y, PRECISION) * gain
            _store_tile(result, out.to(dtype), map_index, y, x_, tile_height, tile_width, in_height, in_width,
                        RESULT_Y, RESULT_X)
        else:
            out = _resample(activated, gather_y, gather_x, RANK_DOWN, RESULT_X, UP_Y, PRECISION) * gain
            _store_tile(result, out.to(dtype), map_index, y, x_, tile_height, tile_width, out_height, out_width,
                        RESULT_Y, RESULT_X)


@triton.jit
def _activate(z, slope, limit, HAS_LIMIT: tl.constexpr, dtype: tl.constexpr):
    """Leaky ReLU and clamp of float32, rounded to dtype."""
    # Comparisons of pairs of float16 take one instruction; those of bfloat16 do not on every GPU.
    compute: tl.constexpr = tl.float32 if dtype == tl.bfloat16 else dtype
    activated = tl.where(z > 0, z, z * slope).to(compute)
    if HAS_LIMIT:  # after rounding, which keeps order: the same values, and half the work
        bound = tl.full((1, 1), limit, compute)
        activated = tl.minimum(tl.maximum(activated, -bound), bound)
    return activated.to(dtype)


@triton.jit
def _local_slope(z, slope, limit, HAS_LIMIT: tl.constexpr):
    """Derivative of the activation."""
    local_slope = tl.where(z > 0, 1.0, slope)
    if HAS_LIMIT:
        local_slope = tl.where(tl.abs(z * local_slope) > limit, 0.0, local_slope)
    return local_slope


@triton.jit
def _resample(
    transposed, to_height, to_width,
    RANK: tl.constexpr, TO_X: tl.constexpr, FROM_Y: tl.constexpr, PRECISION: tl.constexpr,
):
    """Sum over terms of `to_height[term] @ image @ to_width[term].T` in float32, of the transposed image.

    The terms are stacked: as rows of `to_width`, as columns of `to_height`.
    """
    wide = _product(to_width, transposed, PRECISION)  # (RANK * TO_X, FROM_Y)
    if RANK > 1:
        wide = tl.permute(tl.reshape(wide, (RANK, TO_X, FROM_Y)), (1, 0, 2))
        wide = tl.reshape(wide, (TO_X, RANK * FROM_Y))
    # Transposed before it is rounded: in the other order the compiler takes the way through shared memory.
    return _product(to_height, tl.trans(wide).to(transposed.dtype), PRECISION)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """`a @ b`, accumulated in float32."""
    if IS_INTERPRETED:  # the interpreter multiplies bfloat16 as if it were integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _load_tile(
    maps, map_index, y, x, end_y, end_x, height, width, bias, num_channels,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):
    """`(ROWS, COLS)` pixels from (y, x) on, plus bias; zero outside the image and from the ends on."""
    dtype: tl.constexpr = maps.dtype.element_ty
    compute: tl.constexpr = tl.float32 if dtype == tl.bfloat16 else dtype
    width = width // VECTOR * VECTOR  # no change; tells the compiler how rows are aligned
    rows = y + tl.arange(0, ROWS)
    cols = x + tl.arange(0, COLS)
    inside = ((rows >= 0) & (rows < end_y))[:, None] & ((cols >= 0) & (cols < end_x))[None, :]
    start = maps + map_index.to(tl.int64) * height * width
    image = tl.load(start + rows[:, None] * width + cols[None, :], mask=inside, other=0.0)
    if bias is not None:
        b = tl.load(bias + map_index % num_channels).to(dtype).to(compute)
        image = (image.to(compute) + b * inside.to(compute)).to(dtype)
    return image


@triton.jit
def _store_tile(
    maps, image, map_index, y, x, tile_height, tile_width, height, width,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Write what of a tile is in use and in the image."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside_y = (rows < tile_height) & (y + rows < height)
    inside_x = (cols < tile_width) & (x + cols < width)
    start = maps + map_index.to(tl.int64) * height * width
    tl.store(
        start + (y + rows)[:, None] * width + (x + cols)[None, :], image,
        mask=inside_y[:, None] & inside_x[None, :])


@triton.jit
def _prepare_axis(
    first, tile_size, before, up_taps, down_taps, num_up_taps, num_down_taps, in_size, out_size,
    ADJOINT: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, FLIP: tl.constexpr,
    RANK_UP: tl.constexpr, RANK_DOWN: tl.constexpr,
    IN: tl.constexpr, MIDDLE: tl.constexpr, OTHER: tl.constexpr, RESULT: tl.constexpr,
    IN_VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, IS_WIDTH: tl.constexpr, dtype: tl.constexpr,
):
    """What a tile that starts at result `first` reads along one axis, and its matrices.

    First pixel of x and end, first pixel of the output and end (both if ADJOINT); the matrices from x to
    up-sampled pixels, from the output to these (if ADJOINT; else no matter), from these to the result.
    """
    if ADJOINT:
        up = first * UP + before - (num_up_taps - 1)
        last_up = (first + tile_size - 1) * UP + before
    else:
        up = first * DOWN
        last_up = (first + tile_size - 1) * DOWN + num_down_taps - 1
    # Pixel i of x reaches up-sampled pixels i * UP + before - (0 ... num_up_taps - 1), pixel o of the output
    # those from o * DOWN on.
    x = (up - before + UP - 1 + SHIFT * UP) // UP - SHIFT
    end_x = (last_up - before + num_up_taps - 1 + SHIFT * UP) // UP - SHIFT + 1
    out = (up - num_down_taps + DOWN + SHIFT * DOWN) // DOWN - SHIFT
    end_out = (last_up + SHIFT * DOWN) // DOWN - SHIFT + 1
    x = (x + SHIFT) // IN_VECTOR * IN_VECTOR - SHIFT
    end_x = (tl.minimum(end_x, in_size) + IN_VECTOR - 1) // IN_VECTOR * IN_VECTOR
    out = (out + SHIFT) // OUT_VECTOR * OUT_VECTOR - SHIFT
    end_out = (tl.minimum(end_out, out_size) + OUT_VECTOR - 1) // OUT_VECTOR * OUT_VECTOR
    upsample = _matrix(
        up_taps, num_up_taps, x * UP - up + before, -1, UP, UP, FLIP, RANK_UP, MIDDLE, IN, IS_WIDTH, dtype)
    if ADJOINT:
        spread = _matrix(
            down_taps, num_down_taps, up - out * DOWN, 1, -DOWN, 1, FLIP, RANK_DOWN, MIDDLE, OTHER, IS_WIDTH, dtype)
        gather = _matrix(
            up_taps, num_up_taps, first * UP - up + before, UP, -1, UP, FLIP, RANK_UP, RESULT, MIDDLE, IS_WIDTH,
            dtype)
    else:
        spread = upsample
        gather = _matrix(
            down_taps, num_down_taps, 0, -DOWN, 1, 1, FLIP, RANK_DOWN, RESULT, MIDDLE, IS_WIDTH, dtype)
    return x, end_x, out, end_out, upsample, spread, gather


@triton.jit
def _matrix(
    taps, num_taps, offset,
    ROW_STEP: tl.constexpr, COL_STEP: tl.constexpr, SCALE: tl.constexpr, FLIP: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, IS_WIDTH: tl.constexpr, dtype: tl.constexpr,
):
    """Entry (row, col) is tap row * ROW_STEP + col * COL_STEP + offset, of a filter that correlates, times SCALE.

    The matrices of all terms, one below the other if IS_WIDTH, else side by side.
    """
    if IS_WIDTH:
        row = tl.arange(0, RANK * ROWS)[:, None]
        col = tl.arange(0, COLS)[None, :]
        term = row // ROWS
        index = row % ROWS * ROW_STEP + col * COL_STEP + offset
    else:
        row = tl.arange(0, ROWS)[:, None]
        col = tl.arange(0, RANK * COLS)[None, :]
        term = col // COLS
        index = row * ROW_STEP + col % COLS * COL_STEP + offset
    inside = (index >= 0) & (index < num_taps)
    if taps is None:
        values = tl.where(inside, 1.0, 0.0)
    else:
        if not FLIP:
            index = num_taps - 1 - index
        values = tl.load(taps + term * num_taps + index, mask=inside, other=0.0)
    return (values * SCALE).to(dtype)
