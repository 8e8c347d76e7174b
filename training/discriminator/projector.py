# SPDX-License-Identifier: MIT
"""Random projection of feature maps: cross-channel and cross-scale mixing (Projected GANs, arXiv:2111.01007).

The projection spreads the discriminator's attention over all features. It is drawn once, never trained, and
part of the saved discriminator: heads are worthless with another one.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Projector(nn.Module):
    """CCM and CSM, frozen: list of (N, C_k, H_k, W_k) -> list of (N, out_channels[k], 2 H_k, 2 W_k), finest
    first.

    Each level's map must have twice the side of the next coarser one.

    * CCM: 1x1 convolution of level k to `projected_channels` * 2^k channels.
    * CSM: from the coarsest level on, add the coarser result, then a 1x1 convolution and 2x bilinear
    upsampling.
    """

    def __init__(self, in_channels: tuple[int, ...], projected_channels: int) -> None:
        """in_channels: C_k of the feature maps, finest first; the number of levels is its length."""
        super().__init__()
        widths = [projected_channels * 2**level for level in range(len(in_channels))]
        self.out_channels = tuple(widths[max(level - 1, 0)] for level in range(len(widths)))
        self.ccm = nn.ModuleList(nn.Conv2d(c, width, 1) for c, width in zip(in_channels, widths, strict=True))
        self.csm = nn.ModuleList(
            nn.Conv2d(width, out, 1) for width, out in zip(widths, self.out_channels, strict=True)
        )
        self.requires_grad_(False)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        mixed = self.mix_channels(features)
        projected: list[Tensor] = []
        for x, convolution in zip(reversed(mixed), reversed(self.csm), strict=True):
            if projected:
                x = x + projected[-1]
            # The paper upsamples first. The two commute, because a pixel's weights sum to one; this order
            # costs a quarter of the convolution and half of the upsampling.
            projected.append(
                F.interpolate(convolution(x), scale_factor=2, mode="bilinear", align_corners=True)
            )
        return projected[::-1]

    def mix_channels(self, features: list[Tensor]) -> list[Tensor]:
        """CCM alone: list of (N, projected_channels * 2^k, H_k, W_k)."""
        return [convolution(x) for convolution, x in zip(self.ccm, features, strict=True)]
