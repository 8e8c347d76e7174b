# SPDX-License-Identifier: MIT
"""Exponential moving average of a network's weights, with a half-life counted in images."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def ema_beta(batch_size: int, cur_nimg: int, halflife_kimg: float, rampup: float | None) -> float:
    """Weight of the old average in one update, for a half-life of `halflife_kimg` thousand images.

    cur_nimg: images seen before this step. While training is young the half-life is `rampup` times that count, so the
    first update copies the weights; rampup None means no such limit.
    """
    halflife_nimg = halflife_kimg * 1000
    if rampup is not None:
        halflife_nimg = min(halflife_nimg, cur_nimg * rampup)
    return 0.5 ** (batch_size / max(halflife_nimg, 1e-8))


@torch.no_grad()
def update_ema_(ema: nn.Module, live: nn.Module, beta: float) -> None:
    """Move the parameters of `ema` towards those of `live` (beta = share of the old value); copy the buffers."""
    pairs = zip(ema.parameters(), live.parameters(), strict=True)
    averages, weights = (list(side) for side in zip(*pairs, strict=True))
    get_ema_multi_avg_fn(beta)(averages, weights, None)  # on a GPU a few kernels instead of one per parameter
    for averaged, current in zip(ema.buffers(), live.buffers(), strict=True):
        averaged.copy_(current)
