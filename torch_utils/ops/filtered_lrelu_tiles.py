# SPDX-License-Identifier: MIT
"""How the Triton kernel of filtered leaky ReLU cuts its work: tile sizes, warps, shared memory. Plain arithmetic.

Operands of tensor cores have sides that are powers of two, at least 16; a tile of 11 results may need 32
up-sampled pixels and these 22 of the input, padded to 32. So a large tile is not always a good one. The numbers
of a tile follow from counting instructions in code compiled for Hopper (sm_90).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

MIN_BLOCK = 16  # smallest side of a product that Triton accepts
MAX_BLOCK = 64  # beyond, the accumulators of a product no longer fit in registers
MAX_TERMS = 8  # separable terms of a filter per launch
SHARED_LIMIT = 88 * 1024  # bytes per program, estimated; Hopper has 227 KiB, the smallest recent GPUs 99
TENSOR_RATE = 325  # multiply-adds per cycle of one of the four schedulers, 16-bit operands
WARP_OVERHEAD = 150  # cycles per warp and tile: addresses, exchange and waiting between warps
SCALAR_RATE = 32  # the same, float32 without tensor cores


class Axis(NamedTuple):
    """One axis of the images."""

    result_size: int  # pixels to compute
    num_up_taps: int
    num_down_taps: int
    in_vector: int = 1  # x is read from a multiple of this on
    out_vector: int = 1  # so is the gradient of the output


class Resampling(NamedTuple):
    """What the kernel does, the same for both axes."""

    up: int
    down: int
    up_terms: int  # separable terms of the filter, rounded up to a power of two
    down_terms: int
    item_bytes: int  # 2 or 4, of a pixel
    is_adjoint: bool  # gradient of x from that of the output
    has_other: bool  # a second image is multiplied by the slope


class AxisBlocks(NamedTuple):
    """Tile of one axis."""

    tile: int  # results
    source: int  # side of the tile of x, a power of two, as all that follow
    up: int  # up-sampled
    other: int  # of the tile of the second image
    result: int  # `tile` padded


@dataclass(frozen=True)
class TilePlan:
    """Launch parameters of the kernel."""

    y: AxisBlocks  # height
    x: AxisBlocks  # width
    num_tiles_y: int  # tiles that cover a map, down
    num_tiles_x: int  # and across
    num_warps: int  # per program
    shared_bytes: int  # per program, estimated; Triton 3.9 takes up to 1.15 times as many
    cycles: int  # of one scheduler per map, estimated


@lru_cache(maxsize=1024)
def plan_tiles(y: Axis, x: Axis, work: Resampling) -> TilePlan | None:
    """The fastest tiles by the estimate; None if the filters are too long for any."""
    plans = [
        _plan(y, x, blocks_y, blocks_x, work)
        for blocks_y in _candidates(y, work)
        for blocks_x in _candidates(x, work)
    ]
    fitting = [plan for plan in plans if plan.shared_bytes <= SHARED_LIMIT]
    return min(fitting, key=lambda plan: plan.cycles, default=None)


def fits(y: Axis, x: Axis, work: Resampling) -> bool:
    """Whether `plan_tiles` finds tiles: those of one result need the least."""
    blocks_y, blocks_x = _blocks(y, 1, work), _blocks(x, 1, work)
    return max(blocks_y + blocks_x) <= MAX_BLOCK and _shared_bytes(blocks_y, blocks_x, work) <= SHARED_LIMIT


def maps_per_program(num_maps: int, num_tiles: int) -> int:
    """Maps for which a program reuses its matrices, which cost about as much to make as three maps.

    Enough programs are left for a dozen per multiprocessor and several rounds.
    """
    return min(max(num_maps * num_tiles // 8192, 1), 16)


def _candidates(axis: Axis, work: Resampling) -> Iterator[AxisBlocks]:
    """For each choice of block sizes, the largest tile."""
    largest = {}
    for tile in range(1, min(axis.result_size, MAX_BLOCK) + 1):
        blocks = _blocks(axis, tile, work)
        if max(blocks) <= MAX_BLOCK:
            largest[blocks[1:]] = blocks
    yield from largest.values()


def _blocks(axis: Axis, tile: int, work: Resampling) -> AxisBlocks:
    _, up_taps, down_taps, in_vector, out_vector = axis
    num_up = (tile - 1) * work.up + up_taps if work.is_adjoint else (tile - 1) * work.down + down_taps
    num_in = (num_up + up_taps - 2) // work.up + in_vector  # + 1, and up to in_vector - 1 before the first
    num_out = (num_up + down_taps - 2) // work.down + out_vector
    other = (num_out if work.is_adjoint else num_in) if work.has_other else 1
    return AxisBlocks(tile, *(_block(size) for size in (num_in, num_up, other, tile)))


def _block(size: int) -> int:
    """The next power of two, at least MIN_BLOCK."""
    return max(1 << (size - 1).bit_length(), MIN_BLOCK)


def _plan(y: Axis, x: Axis, blocks_y: AxisBlocks, blocks_x: AxisBlocks, work: Resampling) -> TilePlan:
    num_tiles_y, num_tiles_x = -(-y.result_size // blocks_y.tile), -(-x.result_size // blocks_x.tile)
    num_warps = _num_warps(blocks_y, blocks_x, work)
    return TilePlan(
        y=blocks_y._replace(tile=-(-y.result_size // num_tiles_y)),  # equal tiles
        x=blocks_x._replace(tile=-(-x.result_size // num_tiles_x)),
        num_tiles_y=num_tiles_y,
        num_tiles_x=num_tiles_x,
        num_warps=num_warps,
        shared_bytes=_shared_bytes(blocks_y, blocks_x, work),
        cycles=_tile_cycles(blocks_y, blocks_x, work, num_warps) * num_tiles_y * num_tiles_x,
    )


def _num_warps(y: AxisBlocks, x: AxisBlocks, work: Resampling) -> int:
    """A warp's registers hold 32 x 32 accumulators; without tensor cores, operands take more room than these."""
    per_product = 4 if work.item_bytes == 4 else 1
    return min(max(y.up * x.up // 1024, 1) * per_product, 8)


def _shared_bytes(y: AxisBlocks, x: AxisBlocks, work: Resampling) -> int:
    """Matrices, two tiles of each image in flight, and room to rearrange the up-sampled one."""
    matrices = work.up_terms * (y.up * y.source + x.up * x.source)
    result_terms = work.down_terms
    if work.is_adjoint:
        matrices += work.down_terms * (y.up * y.other + x.up * x.other)
        result_terms = work.up_terms
    matrices += result_terms * (y.up * y.result + x.up * x.result)
    images = y.source * x.source + (y.other * x.other if work.has_other else 0)
    return (matrices + 2 * images + y.up * x.up) * work.item_bytes


def _tile_cycles(y: AxisBlocks, x: AxisBlocks, work: Resampling, num_warps: int) -> int:
    """Cycles of one tile of one map: tensor cores beside the other instructions, or all by the latter."""
    other_terms, result_terms = work.up_terms, work.down_terms
    if work.is_adjoint:
        other_terms, result_terms = result_terms, other_terms
    products = work.up_terms * (y.source * x.source * x.up + y.up * y.source * x.up)
    products += result_terms * (y.up * x.up * x.result + y.result * y.up * x.result)
    pixels = 5 * y.source * x.source + 4 * y.up * x.up + 5 * y.result * x.result
    if work.has_other:
        products += other_terms * (y.other * x.other * x.up + y.up * y.other * x.up)
        pixels += 4 * y.other * x.other + 4 * y.up * x.up
    instructions = WARP_OVERHEAD * num_warps + pixels // 32 + products // 2048
    if work.item_bytes == 4:
        return products // SCALAR_RATE + instructions
    return max(products // TENSOR_RATE, instructions)
