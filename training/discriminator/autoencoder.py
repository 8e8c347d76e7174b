# SPDX-License-Identifier: MIT
"""BEGAN's discriminator (arXiv:1703.10717): an autoencoder, which judges an image by how badly it reconstructs it.

After DCGAN like the other networks, without BatchNorm; the paper's own upsamples by nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import san
from torch_utils.conv_stacks import COARSEST, down_stack, init_weights_, up_stack
from training.dcgan_config import AutoencoderConfig, plan_channels
from training.discriminator.dcgan import TrainedDiscriminator


class AutoencoderDiscriminator(TrainedDiscriminator):
    """Images (N, C, H, W) in [-1, 1] -> {"autoencoder": SANLogits (N, 1)}, the L1 reconstruction error per image.

    It has no last linear layer, and so no direction. The buffer `k` is BEGAN's equilibrium, which the loss moves: it
    belongs to the state of D's training, and is saved with it.
    """

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        widths = plan_channels(cfg.img_resolution, cfg.channel_base, cfg.channel_max)
        self.encoder = down_stack(cfg.img_channels, widths, has_batchnorm=False)
        self.to_code = nn.Linear(widths[-1] * COARSEST**2, cfg.hidden_dim)
        self.decoder = up_stack(cfg.hidden_dim, widths, cfg.img_channels, has_batchnorm=False)
        init_weights_(self, has_batchnorm=False)
        self.register_buffer("k", torch.zeros(()))

    def reconstruct(self, images: Tensor) -> Tensor:
        """What the code keeps of images (N, C, H, W)."""
        return self.decoder(self.to_code(self.encoder(images).flatten(1)))

    def forward(
        self, images: Tensor, labels: Tensor | None = None, augment: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, san.SANLogits]:
        """Reconstruction errors L(v) = mean |v - AE(v)|; labels do not matter. augment: images -> images."""
        images = augment(images) if augment else images
        errors = (images - self.reconstruct(images)).abs().flatten(1).mean(1, keepdim=True)
        return {"autoencoder": san.SANLogits.plain(errors)}
