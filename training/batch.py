# SPDX-License-Identifier: MIT
"""What one update of a network sees, cut into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Real images (N, 3, H, W) in [-1, 1], latents (N, z_dim), and class ids (N,) of both; None = no classes."""

    images: Tensor
    labels: Tensor | None
    z: Tensor
    fake_labels: Tensor | None

    def split(self, microbatch_size: int) -> list[Batch]:
        """Consecutive parts of `microbatch_size` samples."""
        parts = []
        for start in range(0, len(self.z), microbatch_size):
            part = slice(start, start + microbatch_size)
            labels, fake_labels = (None if t is None else t[part] for t in (self.labels, self.fake_labels))
            parts.append(Batch(self.images[part], labels, self.z[part], fake_labels))
        return parts
