# SPDX-License-Identifier: MIT
"""The data of the synthetic experiment, a ring of Gaussians, and how well samples cover it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEAR_STDS = 3.0  # a sample belongs to a mode within so many standard deviations of its centre ...
MIN_SHARE = 0.01  # ... and the mode is covered when so large a fraction of the samples does
NUM_SLICES = 64  # directions of the sliced Wasserstein distance, evenly spaced over half a turn


@dataclass(frozen=True, kw_only=True)
class Ring:
    """A mixture of equal, isotropic Gaussians, evenly spaced on a circle."""

    num_modes: int = 8
    radius: float = 1.0
    std: float = 0.05

    def centres(self) -> Tensor:
        """(num_modes, 2)."""
        angles = torch.arange(self.num_modes) * (2 * math.pi / self.num_modes)
        return self.radius * torch.stack([angles.cos(), angles.sin()], dim=1)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """(num, 2)."""
        modes = torch.randint(self.num_modes, (num,), generator=generator)
        return self.place(modes, torch.randn(num, 2, generator=generator))

    def place(self, modes: Tensor, noise: Tensor) -> Tensor:
        """Points of the given modes (...) from standard normal noise (..., 2)."""
        return self.centres().to(noise.device)[modes] + self.std * noise


def count_modes(samples: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
    """Modes covered, and fraction of high-quality samples: those within 3 standard deviations of a centre.

    samples: (..., N, 2). A mode is covered when at least 1 % of the samples are near it.

    >>> modes, quality = count_modes(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), Ring())
    >>> modes.item(), round(quality.item(), 2)
    (2, 0.67)
    """
    centres = ring.centres().to(samples.device, samples.dtype)
    offsets = samples.unsqueeze(-2) - centres  # (..., N, num_modes, 2)
    is_near = offsets.square().sum(-1) <= (NEAR_STDS * ring.std) ** 2
    return (is_near.float().mean(-2) >= MIN_SHARE).sum(-1), is_near.any(-1).float().mean(-1)


def sliced_wasserstein(first: Tensor, second: Tensor) -> Tensor:
    """Mean over directions in the plane of the Wasserstein-1 distance of the projections: (..., N, 2) twice -> (...).

    Exact for the samples along each of 64 evenly spaced directions.

    >>> a = torch.randn(100, 2)
    >>> round(sliced_wasserstein(a, a + torch.tensor([1.0, 0.0])).item(), 2)  # mean of |cos| is 2 / pi
    0.64
    """
    angles = torch.arange(NUM_SLICES, device=first.device) * (math.pi / NUM_SLICES)
    directions = torch.stack([angles.cos(), angles.sin()]).to(first.dtype)  # (2, slices)
    ahead = (first @ directions).sort(-2).values - (second @ directions).sort(-2).values
    return ahead.abs().mean((-2, -1))
