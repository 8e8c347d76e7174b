# SPDX-License-Identifier: MIT
"""What one update of a network sees, cut into micro-batches; and what several updates make theirs of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from training.draws import Draws


@dataclass(frozen=True)
class Reals:
    """Real images (N, 3, H, W) in [-1, 1], their class ids (N,), and the random numbers that belong to them."""

    images: Tensor
    labels: Tensor | None  # None = no classes
    draws: Draws


@dataclass(frozen=True)
class Batch:
    """Real images (N, 3, H, W) in [-1, 1], latents (N, z_dim), and class ids (N,) of both; None = no classes."""

    images: Tensor
    labels: Tensor | None
    z: Tensor
    fake_labels: Tensor | None
    draws: Draws  # random numbers of the same N samples, for whatever a step draws beside

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, part: slice) -> Batch:
        """Some of the samples."""
        labels, fake_labels = (None if t is None else t[part] for t in (self.labels, self.fake_labels))
        return Batch(self.images[part], labels, self.z[part], fake_labels, self.draws[part])

    def split(self, microbatch_size: int) -> list[Batch]:
        """Consecutive parts of `microbatch_size` samples; the last may be smaller."""
        starts = range(0, len(self), microbatch_size)
        return [self[start : start + microbatch_size] for start in starts]
