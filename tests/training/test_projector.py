# SPDX-License-Identifier: MIT
"""The random projection against a naive reading of the paper: mix channels, add, upsample, then convolve."""

import pytest
import torch
from torch.nn import functional as F

from training.discriminator.projector import Projector

CHANNELS = (3, 5, 7, 6)


def naive(projector: Projector, features: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs, coarser = [], None
    for level in reversed(range(len(features))):
        x = projector.ccm[level](features[level])
        if coarser is not None:
            x = x + coarser
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        coarser = projector.csm[level](x)
        outputs.insert(0, coarser)
    return outputs


def make_features(num_levels: int) -> list[torch.Tensor]:
    sides = [8 * 2 ** (num_levels - 1 - level) for level in range(num_levels)]
    return [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in zip(CHANNELS, sides, strict=False)]


@pytest.mark.parametrize("num_levels", [1, 3, 4])
def test_matches_naive_forward_and_gradient(num_levels):
    projector = Projector(CHANNELS[:num_levels], 4).double()
    features = [f.requires_grad_() for f in make_features(num_levels)]
    expected, actual = naive(projector, features), projector(features)
    weights = [torch.randn_like(e) for e in expected]
    gradients = [
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights, strict=True)), features)
        for out in (expected, actual)
    ]
    for e, a in zip([*expected, *gradients[0]], [*actual, *gradients[1]], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_channels_and_sizes_double():
    projector = Projector(CHANNELS, 64)
    assert projector.out_channels == (64, 64, 128, 256)
    assert [c.out_channels for c in projector.ccm] == [64, 128, 256, 512]
    outputs = projector([f.float() for f in make_features(4)])
    assert [o.shape[1:] for o in outputs] == [(64, 128, 128), (64, 64, 64), (128, 32, 32), (256, 16, 16)]


def test_is_frozen_and_saved():
    projector = Projector(CHANNELS, 4)
    assert not any(p.requires_grad for p in projector.parameters())
    assert len(projector.state_dict()) == 16


def test_wrong_number_of_levels_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        Projector(CHANNELS, 4)([f.float() for f in make_features(3)])
