# SPDX-License-Identifier: MIT
"""Band-limited feature maps from the few of their pixels that determine them.

Fourier features have no frequency above the input's cutoff, which is far below what its sampling rate could hold
(StyleGAN3, arXiv:2106.12423, section 3.2: both leave room for the layers after). So a line of pixels of such a map is a
linear function of some of them, the nodes: of 20 of 36 for all official stems, up to rounding.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 3e-7  # largest error of a wave of amplitude 1 in float64: a little over float32's rounding
NUM_FREQUENCIES = 257  # at which it is looked at


@lru_cache(maxsize=64)  # 30 ms a call, and a square map asks twice, G_ema again
def interpolation_nodes(size: int, sampling_rate: float, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Nodes, int64 (r,), and the matrix, float32 (size, r), that makes `size` pixels of the values there.

    For waves of up to `bandwidth` cycles per unit length, of which the pixels are `sampling_rate`. The fewest of
    `independent_pixels` that are enough; all, where none can be left out. Both are shared: not to be written to.
    """
    positions = (np.arange(size) - (size - 1) / 2) / sampling_rate
    frequencies = bandwidth * np.cos(np.linspace(0, np.pi / 2, NUM_FREQUENCIES))
    angles = 2 * np.pi * np.outer(positions, frequencies)
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)  # (size, any frequency and phase)
    order = independent_pixels(waves)
    for count in range(1, size):
        nodes = np.sort(order[:count])
        matrix = np.linalg.lstsq(waves[nodes].T, waves.T, rcond=None)[0].T
        if np.abs(matrix @ waves[nodes] - waves).max() < TOLERANCE:
            return torch.from_numpy(nodes).long(), torch.from_numpy(matrix).float()
    return torch.from_numpy(np.arange(size)), torch.from_numpy(np.eye(size, dtype=np.float32))


def independent_pixels(waves: np.ndarray) -> list[int]:
    """Rows of (size, W), each time the one furthest from what those before it span: QR with pivoting."""
    rest, order = waves.copy(), []
    for _ in range(len(waves)):
        lengths = np.linalg.norm(rest, axis=1)
        lengths[order] = -1  # of which rounding may have left something
        order.append(int(lengths.argmax()))
        direction = rest[order[-1]] / max(lengths[order[-1]], 1e-300)
        rest -= np.outer(rest @ direction, direction)
    return order


def interpolate(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values at nodes, (N, C, r, s), to whole maps, (N, C, H, W). rows: (H, r), columns: (W, s)."""
    return rows @ (x @ columns.t())
