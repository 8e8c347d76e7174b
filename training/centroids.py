# SPDX-License-Identifier: MIT
"""Centroids of w, the means that multi-modal truncation chooses from (arXiv:2202.12211): computed, saved, read.

That paper clusters images by the features of a perceptual network; here, as nothing else is needed for it, the
style vectors themselves are clustered by k-means. A file is a NumPy array (K, w_dim), as the official tools read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import vq
from torch import Tensor
from tqdm import tqdm

from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError
from training.generator.generator import Generator
from training.sampling import require_styles

DEFAULT_SAMPLES = 60_000  # style vectors that are clustered
MAX_ITERATIONS = 300
TOLERANCE = 1e-5  # k-means ends when a step lowers the mean squared distance by less than this share
_MAPPING_BATCH = 1024


def compute_centroids(
    G: Generator,
    num_centroids: int,
    *,
    num_samples: int = DEFAULT_SAMPLES,
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> Tensor:
    """Centroids, float32 (num_centroids, w_dim) on the CPU, of `num_samples` untruncated style vectors of G.

    classes: drawn uniformly from these; None = from all of the network's. The same seed gives the same
    centroids. UserError when there are fewer samples than centroids.
    """
    require_styles(G, "--centroids")
    if num_centroids > num_samples:
        raise UserError(
            f"{num_centroids} centroids cannot be found among {num_samples} samples; ask for fewer, such as 64"
        )
    return torch.from_numpy(kmeans(sample_w(G, num_samples, classes, seed).numpy(), num_centroids, seed))


@torch.inference_mode()
def sample_w(G: Generator, num_samples: int, classes: Sequence[int] | None, seed: int) -> Tensor:
    """Style vectors, float32 (num_samples, w_dim) on the CPU, of random latents and random ones of `classes`."""
    device = next(G.parameters()).device
    random_state = np.random.RandomState(seed)
    allowed = np.arange(G.c_dim) if classes is None else np.unique(classes)
    parts = []
    with tqdm(total=num_samples, unit="w", desc="Sampling w") as bar:
        while bar.n < num_samples:
            n = min(_MAPPING_BATCH, num_samples - bar.n)
            z = torch.from_numpy(random_state.randn(n, G.z_dim)).float().to(device)
            labels = torch.from_numpy(random_state.choice(allowed, n)).to(device) if G.c_dim else None
            parts.append(G.mapping(z, labels)[:, 0].cpu())
            bar.update(n)
    return torch.cat(parts)


def kmeans(samples: np.ndarray, num_centroids: int, seed: int = 0) -> np.ndarray:
    """Centroids, float32 (num_centroids, features), of samples (N, features): Lloyd's algorithm from k-means++.

    Every centroid has samples: one that loses them all moves to the sample farthest from its own.
    """
    centroids = _spread_start(samples, num_centroids, np.random.RandomState(seed))
    previous = np.inf
    with tqdm(range(MAX_ITERATIONS), unit="it", desc="Clustering w") as bar:
        for _ in bar:
            nearest, distances = vq(samples, centroids, check_finite=False)
            error = np.square(distances).mean(dtype=np.float64)
            if previous - error <= TOLERANCE * error:
                break
            previous = error
            centroids = _means(samples, nearest, distances, num_centroids)
            bar.set_postfix_str(f"mean squared distance {error:.4g}")
    return centroids


def _spread_start(samples: np.ndarray, num_centroids: int, random_state: np.random.RandomState) -> np.ndarray:
    """Samples to start from, each drawn with probability proportional to its squared distance to those before."""
    norms = np.square(samples).sum(axis=1)
    latest = samples[random_state.randint(len(samples))]
    chosen = [latest]
    squared = np.full(len(samples), np.inf)
    for _ in tqdm(range(num_centroids - 1), unit="centroid", desc="Starting points"):
        # By a product: many times faster than differences, and exact enough to draw by.
        squared = np.minimum(squared, (norms - 2 * (samples @ latest) + latest @ latest).clip(min=0))
        total = squared.sum(dtype=np.float64)
        weights = squared / total if total > 0 else None  # all are chosen already: any will do
        latest = samples[random_state.choice(len(samples), p=weights)]
        chosen.append(latest)
    return np.stack(chosen)


def _means(samples: np.ndarray, nearest: np.ndarray, distances: np.ndarray, num_centroids: int) -> np.ndarray:
    index = torch.from_numpy(nearest.astype(np.int64))
    sums = torch.zeros(num_centroids, samples.shape[1], dtype=torch.float64)
    sums.index_add_(0, index, torch.from_numpy(samples).double())
    counts = torch.bincount(index, minlength=num_centroids)
    means = (sums / counts.clamp(min=1).unsqueeze(1)).float().numpy()
    empty = np.flatnonzero(counts.numpy() == 0)
    means[empty] = samples[np.argsort(distances)[::-1][: len(empty)]]
    return means


def save_centroids(path: str | os.PathLike[str], centroids: Tensor) -> None:
    """Write centroids (K, w_dim) as a .npy file, atomically. OSError when it cannot be written."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, centroids.numpy())


def load_centroids(path: str | os.PathLike[str], w_dim: int) -> Tensor:
    """Centroids, float32 (K, w_dim), of a .npy file. UserError when it holds none for a network of that w_dim."""
    advice = f"give a .npy file of shape (K, {w_dim}), such as --centroids writes"
    if not Path(path).is_file():
        raise UserError(f"--centroids-path {path} is not a file; {advice}")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:  # ValueError: pickled objects, which are not loaded
        raise UserError(f"--centroids-path {path} is not a NumPy array file; {advice}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"--centroids-path {path} is an archive of arrays; {advice}")
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] != w_dim:
        raise UserError(f"--centroids-path {path} has shape {array.shape}; {advice}")
    with np.errstate(over="ignore"):
        values = array.astype(np.float32) if array.dtype.kind in "fiu" else np.full(1, np.nan, np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"--centroids-path {path} holds values that are not finite numbers; {advice}")
    return torch.from_numpy(values)
