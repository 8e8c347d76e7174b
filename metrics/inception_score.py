# SPDX-License-Identifier: MIT
"""Inception score (arXiv:1606.03498, Section 4) of class probabilities."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from torch_utils.errors import UserError


class InceptionScore(NamedTuple):
    """Over splits."""

    mean: float
    std: float  # of the population: divided by the number of splits


def inception_score(probabilities: Tensor, num_splits: int = 10) -> InceptionScore:
    """exp of the mean divergence of p(class | image) from p(class). probabilities: (N, classes), in generated order.

    Splits are contiguous, from i * N // splits. Computed in float64, without the epsilon that some codes add; a
    probability of 0 contributes 0. UserError for fewer images than splits.
    """
    if probabilities.ndim != 2 or len(probabilities) < num_splits:
        raise UserError(
            f"probabilities of shape {tuple(probabilities.shape)} make no {num_splits} splits; take more images"
        )
    bounds = [i * len(probabilities) // num_splits for i in range(num_splits + 1)]
    scores = []
    for start, stop in itertools.pairwise(bounds):
        p = probabilities[start:stop].double()
        divergence = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0))).sum(dim=1)
        scores.append(divergence.mean().exp())
    values = torch.stack(scores)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)))
