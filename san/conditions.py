# SPDX-License-Identifier: MIT
"""SAN's three conditions as numbers: pure functions of features, slices and directions, without gradients.

A discriminator <direction, h(x)> is a distance for the generator when its direction is optimal, its slice of the
data separable and its feature map h injective (SAN, arXiv:2301.12811). `san.diagnostics` reads them off a training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def mean_difference(
    real: Tensor, fake: Tensor, real_weights: Tensor | None = None, fake_weights: Tensor | None = None
) -> Tensor:
    """E[r h] of real samples minus that of generated ones: the optimal direction, with its length. (..., C).

    real: features (..., N, C), fake: (..., M, C). Weights r_J, (..., N) and (..., M), are those of
    `san.direction_weights` at the logits; None stands for 1, as for the hinge and Wasserstein objectives.

    >>> mean_difference(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.zeros(5, 2))
    tensor([2., 1.])
    """
    sides = ((real, real_weights), (fake, fake_weights))
    real_mean, fake_mean = (h.mean(-2) if r is None else (h * r.unsqueeze(-1)).mean(-2) for h, r in sides)
    return real_mean - fake_mean


@torch.no_grad()
def direction_cosine(direction: Tensor, difference: Tensor) -> Tensor:
    """Cosine between a direction and the optimal one, in [-1, 1]; 0 where one of them is zero. (..., C) -> (...).

    Read it beside the length of `difference`: where real and fake features have the same mean, the optimal
    direction is sampling noise, and the cosine of the best direction falls to 0 as well.

    >>> direction_cosine(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))
    tensor(0.6000)
    """
    return (F.normalize(direction, dim=-1) * F.normalize(difference, dim=-1)).sum(-1)


@torch.no_grad()
def direction_angle(before: Tensor, after: Tensor) -> Tensor:
    """Angle between directions in degrees, exact for small angles too. (..., C) -> (...).

    >>> direction_angle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    tensor(90.)
    """
    before, after = F.normalize(before, dim=-1), F.normalize(after, dim=-1)
    half = torch.atan2((after - before).norm(dim=-1), (after + before).norm(dim=-1))
    return torch.rad2deg(2 * half)


@dataclass(frozen=True)
class SliceOrder:
    """How two sets of numbers lie to each other, by their quantile functions. Tensors (...)."""

    mean_difference: Tensor  # mean of the real numbers minus mean of the fake ones
    wasserstein: Tensor  # Wasserstein-1 distance of the two; at least |mean_difference|
    in_order: Tensor  # fraction of levels at which the real quantile is at least the fake one, in [0, 1]

    @property
    def gap(self) -> Tensor:
        """(wasserstein - mean_difference) / wasserstein: 0 = separable, 1 = no order, 2 = the wrong way round."""
        tiny = torch.finfo(self.wasserstein.dtype).tiny
        return (self.wasserstein - self.mean_difference).clamp_min(0) / self.wasserstein.clamp_min(tiny)


@torch.no_grad()
def compare_slices(real: Tensor, fake: Tensor) -> SliceOrder:
    """Separability along a direction, from the projections <direction, h> of real and of generated samples.

    real: (..., N), fake: (..., M), floating point. The slice is separable when the real numbers dominate the fake
    ones: no real quantile below the fake one of the same level. Then the mean difference that SAN maximises equals
    the Wasserstein distance, and the gap is 0. Exact for the two samples, whatever their sizes; two samples of the
    same distribution have a gap near 1, about half of the quantiles in order, and a distance near 0.

    Raises ValueError for an empty set.

    >>> order = compare_slices(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 4.0]))
    >>> [round(value.item(), 3) for value in (order.mean_difference, order.wasserstein, order.in_order, order.gap)]
    [1.0, 1.667, 0.833, 0.4]
    """
    num_real, num_fake = real.shape[-1], fake.shape[-1]
    if not (num_real and num_fake):
        raise ValueError(f"compare_slices() got {num_real} real and {num_fake} fake numbers: both need some")
    # Quantile functions are steps: between neighbours of the joint grid of levels both are constant. Levels are
    # counted in units of 1 / total, in whole numbers.
    total = num_real * num_fake
    levels = [torch.arange(step, total + 1, step) for step in (num_fake, num_real)]
    ends = torch.cat(levels).unique()
    starts = F.pad(ends[:-1], (1, 0))
    shares = ((ends - starts).double() / total).to(real.device, real.dtype)
    real_steps, fake_steps = ((starts // step).to(real.device) for step in (num_fake, num_real))
    ahead = real.sort(-1).values[..., real_steps] - fake.sort(-1).values[..., fake_steps]
    return SliceOrder(
        mean_difference=(shares * ahead).sum(-1),
        wasserstein=(shares * ahead.abs()).sum(-1),
        in_order=(shares * (ahead >= 0)).sum(-1),
    )


@torch.no_grad()
def expansion_ratios(inputs: Tensor, features: Tensor) -> Tensor:
    """|h(x) - h(y)| / |x - y| for every pair of different inputs: (pairs,), in feature units per input unit.

    inputs: (N, ...), features: h of each, (N, ...), real numbers. An injective h has no ratio 0; a smallest ratio far
    below the median one is a near collision. Limits: it sees pairs of the sample only, and distances of
    images are not what the eye sees, so it can show that h is not injective, and never that it is.

    Raises ValueError when there is no pair of different inputs.

    >>> x = torch.tensor([[-1.0], [1.0], [3.0]])
    >>> expansion_ratios(x, x.abs())  # |-1| and |1| collide
    tensor([0.0000, 0.5000, 1.0000])
    """
    if len(inputs) != len(features):
        raise ValueError(f"expansion_ratios() got {len(inputs)} inputs and {len(features)} features")
    distances, feature_distances = (_pairwise_distances(t) for t in (inputs, features))
    is_pair = distances > 0
    if not is_pair.any():
        raise ValueError(f"expansion_ratios() needs at least two different inputs among the {len(inputs)}")
    return feature_distances[is_pair] / distances[is_pair]


def _pairwise_distances(points: Tensor) -> Tensor:
    """Euclidean distance of each pair, (N (N - 1) / 2,), without the cancellation of the matrix-product form."""
    flat = points.detach().flatten(1).float()
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    first, second = torch.triu_indices(len(flat), len(flat), offset=1, device=flat.device)
    return distances[first, second]


def jacobian_singular_values(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    num_directions: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Singular values of h's Jacobian at each input, largest first: (N, min(num_directions, features)).

    function: h, from inputs (N, ...) to features (N, ...), each sample by itself (batch norm in evaluation mode).
    num_directions: None takes the whole Jacobian, for few input dimensions; otherwise the Jacobian is restricted to
    so many random orthonormal input directions, each of which costs one forward pass (forward-mode derivatives).

    A map that is injective around x, with a smooth inverse, has full rank there. Restricted to k directions, a rank
    of k shows that the rank is at least k, and the smallest value is an upper bound on the Jacobian's own. Limits:
    it is local, says nothing about inputs far apart, and at the kink of a ReLU one side is taken.

    Raises ValueError when num_directions is not between 1 and the size of an input.

    >>> projection = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> jacobian_singular_values(lambda x: x @ projection, torch.randn(1, 2))
    tensor([[2., 0.]])
    """
    size = inputs[0].numel()
    num_directions = size if num_directions is None else num_directions
    if not 1 <= num_directions <= size:
        raise ValueError(f"num_directions={num_directions} is not between 1 and the input's size of {size}")
    if num_directions == size:
        basis = torch.eye(size)
    else:
        basis = torch.linalg.qr(torch.randn(size, num_directions, generator=generator)).Q.T
    inputs = inputs.detach()
    basis = basis.to(inputs.device, inputs.dtype)
    columns = []
    for direction in basis:
        tangents = direction.view(1, *inputs.shape[1:]).expand_as(inputs)
        columns.append(torch.func.jvp(function, (inputs,), (tangents,))[1].detach().flatten(1))
    return torch.linalg.svdvals(torch.stack(columns, dim=2))


def local_rank(singular_values: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Number of singular values above `tolerance` times the largest of their row: int64, (..., K) -> (...).

    >>> local_rank(torch.tensor([[3.0, 1.0, 1e-6], [0.0, 0.0, 0.0]]))
    tensor([2, 0])
    """
    largest = singular_values.amax(-1, keepdim=True)
    return ((singular_values > tolerance * largest) & (singular_values > 0)).sum(-1)
