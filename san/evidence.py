# SPDX-License-Identifier: MIT
"""What one SAN layer's calls say about its directions: weighted feature sums and slices, per direction.

Evidence of several calls adds up. `san.diagnostics` collects it, and `measure_layer` turns both sides' into numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from san.conditions import compare_slices, direction_angle, direction_cosine, expansion_ratios
from san.layers import SANEmbedding, SANLayer, split_norms

MAX_COMPARED = 32  # samples of a pass that are compared in pairs
MEASURES = (  # of a layer; explained in `SANDiagnostics`
    "cosine",
    "mean_difference",
    "agreement",
    "in_order",
    "separability_gap",
    "slice_distance",
    "collision",
    "drift_deg",
    "scale",
)


@dataclass
class Evidence:
    """Of one side's samples. Where the first axis is 2, every other sample counts to the other half."""

    features: Tensor  # (2, directions, ...): sums of features, weighted by r_J
    counts: Tensor  # (2, directions): terms in these sums
    slices: Tensor  # (n,): <direction, features> of each term, unweighted, with the sign of D's factor on it
    owners: Tensor  # (n,): index of each term's direction
    collisions: list[float] = field(default_factory=list)  # smallest over median expansion ratio, per pass

    def add(self, other: Evidence) -> None:
        self.features = self.features + other.features
        self.counts = self.counts + other.counts
        self.slices = torch.cat([self.slices, other.slices])
        self.owners = torch.cat([self.owners, other.owners])
        self.collisions = self.collisions + other.collisions

    def means(self) -> Tensor:
        """r_J-weighted feature means of one half, the other, and all: (3, directions, C)."""
        features = torch.cat([self.features, self.features.sum(0, keepdim=True)]).flatten(2)
        counts = torch.cat([self.counts, self.counts.sum(0, keepdim=True)])
        return features / counts.clamp_min(1).unsqueeze(2)


def weigh_product(layer: Any, x: Tensor, slope: Tensor, unit: Tensor) -> tuple[Evidence, Tensor]:
    """Evidence of a call of a linear or convolutional layer, and the features per sample.

    x: the layer's input. Of its logits' shape, slope: r_J at each of them, and unit: 1 there, both with any factor that
    D puts on the logit: 0 at those that it drops, as when it keeps the one of a sample's class. Terms are logits: a
    sample each, or a patch.
    """
    if x.ndim < layer.weight.ndim:  # a single sample without a batch axis
        x, slope, unit = x.unsqueeze(0), slope.unsqueeze(0), unit.unsqueeze(0)
    h = x.float()
    if layer.bias is not None:
        h = h + layer.bias.float().view(-1, *[1] * layer.num_spatial_dims)
    directions = split_norms(layer.weight.float())[0]
    sums, counts, slices, owners = [], [], [], []
    for parity in (0, 1):
        # As a function of its directions the layer is linear; its transpose sums up the features under its taps.
        part, weights = h[parity::2], slope[parity::2]
        projections, transpose = torch.func.vjp(lambda d, part=part: layer.operate(part, d), directions)
        sums.append(transpose(weights.to(projections.dtype))[0])
        channel_axis = projections.ndim - 1 - layer.num_spatial_dims
        signs = unit[parity::2].sign().movedim(channel_axis, 0).flatten(1)  # (directions, n)
        kept = signs != 0
        counts.append(kept.sum(1))
        slices.append((projections.movedim(channel_axis, 0).flatten(1) * signs)[kept])
        owners.append(kept.nonzero()[:, 0])
    return Evidence(torch.stack(sums), torch.stack(counts), torch.cat(slices), torch.cat(owners)), h


def weigh_classes(
    layer: SANEmbedding, labels: Tensor, weighted: Tensor, plain: Tensor
) -> tuple[Evidence, Tensor]:
    """Evidence of a call of an embedding, and the features per label.

    labels: (...). weighted, plain: features that met each label's class vector, with weight r_J and 1, summed over
    the positions of a map: (..., C). Terms are labels, halves those of each class.
    """
    labels, weighted, plain = labels.flatten(), weighted.flatten(0, -2), plain.flatten(0, -2)
    num_classes, dim = layer.weight.shape
    ranks = (labels.unsqueeze(1) == labels).tril(-1).sum(1)  # how many of its class came before
    rows = ranks % 2 * num_classes + labels
    sums = weighted.new_zeros(2 * num_classes, dim).index_add_(0, rows, weighted)
    counts = weighted.new_zeros(2 * num_classes).index_add_(0, rows, weighted.new_ones(len(rows)))
    slices = (split_norms(layer.weight[labels].float())[0] * plain).sum(1)
    return Evidence(sums.view(2, -1, dim), counts.view(2, -1), slices, labels), plain


def list_collisions(inputs: Tensor, features: Tensor) -> list[float]:
    """Smallest over median expansion ratio of the first samples, 0 to 1, or nothing without two different inputs.

    >>> x = torch.tensor([[-1.0], [1.0], [3.0]])
    >>> list_collisions(x, 2 * x), list_collisions(x, x.abs()), list_collisions(x[:1], x[:1])
    ([1.0], [0.0], [])
    """
    if len(inputs) != len(features):
        return []
    inputs, features = inputs[:MAX_COMPARED], features[:MAX_COMPARED]
    if not (inputs != inputs[:1]).any():
        return []
    ratios = expansion_ratios(inputs, features)
    median = ratios.median()
    return [(ratios.min() / median).item() if median > 0 else 0.0]


def measure_layer(layer: SANLayer, before: Tensor, real: Evidence, fake: Evidence) -> dict[str, float]:
    """Those of MEASURES that there is evidence for, as means over the directions that both sides saw.

    before: unit directions at the recording, (directions, ...). Where the scale is negative, logits rise against the
    direction, which is then optimal when it is opposite to the difference of means: such directions count reversed.
    """
    seen = (real.counts.sum(0) > 0) & (fake.counts.sum(0) > 0)
    if not seen.any():
        return {}
    before, now = before.flatten(1), split_norms(layer.weight.float())[0].flatten(1)
    *halves, difference = real.means() - fake.means()
    scale = layer.scale.float().flatten()
    signs = torch.where(scale < 0, -1.0, 1.0)
    orders = [
        compare_slices(signs[i] * real.slices[real.owners == i], signs[i] * fake.slices[fake.owners == i])
        for i in seen.nonzero().flatten().tolist()
    ]
    measures = {
        "cosine": (signs * direction_cosine(before, difference))[seen],
        "mean_difference": difference.norm(dim=1)[seen],
        "in_order": torch.stack([order.in_order for order in orders]),
        "separability_gap": torch.stack([order.gap for order in orders]),
        "slice_distance": torch.stack([order.wasserstein for order in orders]),
        "drift_deg": direction_angle(before, now)[seen],
        "scale": scale[seen],
    }
    halved = (real.counts > 0).all(0) & (fake.counts > 0).all(0)
    if halved.any():
        measures["agreement"] = direction_cosine(*halves)[halved]
    if real.collisions:
        measures["collision"] = torch.tensor(real.collisions)
    return {name: measures[name].mean().item() for name in MEASURES if name in measures}
