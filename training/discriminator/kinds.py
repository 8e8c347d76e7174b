# SPDX-License-Identifier: MIT
"""The kinds of discriminators, and the one that a configuration asks for."""

from __future__ import annotations

from training.config import AnyDiscriminatorConfig
from training.dcgan_config import AutoencoderConfig, DCGANDiscriminatorConfig
from training.discriminator.autoencoder import AutoencoderDiscriminator
from training.discriminator.dcgan import DCGANDiscriminator
from training.discriminator.heads import HeadKind
from training.discriminator.projected import ProjectedDiscriminator

AnyDiscriminator = ProjectedDiscriminator | DCGANDiscriminator | AutoencoderDiscriminator


def new_discriminator(cfg: AnyDiscriminatorConfig, head_kind: HeadKind) -> AnyDiscriminator:
    """A discriminator whose trained parts have random weights. Raises UserError when it cannot be had."""
    if isinstance(cfg, AutoencoderConfig):
        return AutoencoderDiscriminator(cfg)
    if isinstance(cfg, DCGANDiscriminatorConfig):
        return DCGANDiscriminator(cfg, head_kind)
    return ProjectedDiscriminator(cfg, head_kind)
