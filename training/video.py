# SPDX-License-Identifier: MIT
"""Frames of interpolation videos: style vectors of seeds are keyframes, a cubic spline in W runs through them.

As in StyleGAN3's tool, every cell of a grid runs through its own seeds and comes back to the first, so that the
video can be played in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from torch import Tensor

from torch_utils.errors import UserError
from training.generator.generator import Generator
from training.sampling import (
    NO_TRUNCATION,
    Truncation,
    create_image_grid,
    draw_images,
    labels_for_seed,
    latents_for_seed,
    style_vectors,
    to_uint8_metrics,
)

NUM_WRAPS = 2  # rounds that the spline runs before and after the one shown, so that it has settled there
_MAPPING_BATCH = 1024


def plan_keyframes(
    num_seeds: int, num_cells: int, num_keyframes: int | None = None, shuffle_seed: int | None = None
) -> np.ndarray:
    """Which seed stands where: positions in the list of seeds, int64 (num_cells, keyframes).

    The first cell has the first seeds, and so on; too few seeds are repeated, too many left over. num_keyframes:
    None = as many as use every seed once; UserError when that gives no whole number. shuffle_seed: None = in
    order; else the seed of a shuffle of all positions.
    """
    if num_keyframes is None:
        if num_seeds % num_cells:
            raise UserError(
                f"{num_seeds} seeds do not fill {num_cells} grid cells evenly; give a multiple of {num_cells} "
                "seeds, or --num-keyframes"
            )
        num_keyframes = num_seeds // num_cells
    positions = np.arange(num_cells * num_keyframes) % num_seeds
    if shuffle_seed is not None:
        np.random.RandomState(shuffle_seed).shuffle(positions)
    return positions.reshape(num_cells, num_keyframes)


def keyframe_ws(
    G: Generator,
    seeds: Sequence[int],
    classes: Sequence[int] | None = None,
    truncation: Truncation = NO_TRUNCATION,
) -> Tensor:
    """ws of seeds, float32 (len(seeds), num_ws, w_dim) on the CPU.

    classes: one per seed; None = each seed's random class, or no class for an unconditional network.
    """
    z = torch.cat([latents_for_seed(seed, 1, G.z_dim) for seed in seeds])
    labels = None
    if G.c_dim > 0:
        random_labels = [labels_for_seed(seed, 1, G.c_dim) for seed in seeds] if classes is None else []
        labels = torch.cat(random_labels) if classes is None else torch.tensor(list(classes))
    parts = [
        style_vectors(G, z[index], None if labels is None else labels[index], truncation).cpu()
        for index in torch.arange(len(z)).split(_MAPPING_BATCH)
    ]
    return torch.cat(parts)


def interpolate(keyframes: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """Cubic spline through keyframes (K, ...) that loops: times (T,) in [0, K] -> float64 (T, ...).

    Time is counted in keyframes: keyframe k is shown at time k, and at time K the first one again (nearly: the
    spline runs NUM_WRAPS rounds on both sides with free ends, as in the official tool, and is not periodic).
    """
    num_keyframes, num_rounds = len(keyframes), 2 * NUM_WRAPS + 1
    times = np.arange(-num_keyframes * NUM_WRAPS, num_keyframes * (NUM_WRAPS + 1))
    rounds = np.concatenate([keyframes.double().numpy()] * num_rounds)
    return make_interp_spline(times, rounds, k=3)


def render_frames(
    G: Generator, keyframes: Tensor, w_frames: int, columns: int, batch: int
) -> Iterator[np.ndarray]:
    """Frames, uint8 (rows * H, columns * W, 3), of keyframes (cells, K, num_ws, w_dim); K * w_frames in all.

    Cells fill the grid row by row. At most `batch` images are drawn and at most a batch or a frame of them is
    held at a time. Grey images are repeated to three channels.
    """
    num_cells, num_keyframes = keyframes.shape[:2]
    spline = interpolate(keyframes.transpose(0, 1))
    frames_at_once = max(1, batch // num_cells)
    for start in range(0, num_keyframes * w_frames, frames_at_once):
        frames = np.arange(start, min(start + frames_at_once, num_keyframes * w_frames))
        ws = torch.from_numpy(spline(frames / w_frames)).float()  # (frames, cells, num_ws, w_dim)
        images = torch.cat([to_uint8_metrics(draw_images(G, part)) for part in ws.flatten(0, 1).split(batch)])
        for cells in images.split(num_cells):
            grid = create_image_grid(cells, columns).expand(3, -1, -1)
            yield np.ascontiguousarray(grid.permute(1, 2, 0).numpy())
