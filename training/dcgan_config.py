# SPDX-License-Identifier: MIT
"""Configurations of the small convolutional networks after DCGAN (arXiv:1511.06434), for `--cfg dcgan`.

Their field `kind` tells them from StyleGAN-XL's in files, which have none. All sizes come from three numbers: the
resolution, and the least and the largest number of channels, which double with every halving of the side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIN_RESOLUTION, MAX_RESOLUTION = 8, 128  # sides of images, powers of two
COARSEST = 4  # side of the coarsest feature maps


@dataclass(frozen=True, kw_only=True)
class DCGANGeneratorConfig:
    """Everything needed to build a DCGAN generator; stored in its network file."""

    kind: Literal["dcgan"] = "dcgan"  # tells this configuration from others in a file
    img_resolution: int  # side of the square output, pixels: 8, 16, 32, 64 or 128
    img_channels: int = 3  # channels of the output
    c_dim: int = 0  # number of classes; 0 = unconditional
    z_dim: int = 100  # entries of the latent z, those of the codes included
    latent: Literal["normal", "uniform"] = "normal"  # noise enters as N(0, 1), or mapped to U(-1, 1)
    num_categories: int = 0  # values of InfoGAN's categorical code; 0 = no such code
    num_continuous: int = 0  # InfoGAN's continuous codes, each U(-1, 1)
    channel_base: int = 64  # channels of the finest feature maps
    channel_max: int = 512  # bound on the channels of coarser ones
    has_batchnorm: bool = True  # BatchNorm after every layer but the last


@dataclass(frozen=True, kw_only=True)
class DCGANDiscriminatorConfig:
    """A convolutional critic after DCGAN, or several of growing size."""

    kind: Literal["dcgan"] = "dcgan"  # tells this configuration from others in a file
    img_resolution: int  # side of the images it sees, pixels: 8, 16, 32, 64 or 128
    img_channels: int = 3  # channels of the images
    c_dim: int = 0  # number of classes; 0 = unconditional
    num_categories: int = 0  # outputs of InfoGAN's Q head for the categorical code
    num_continuous: int = 0  # outputs of InfoGAN's Q head for the continuous codes
    channel_bases: tuple[int, ...] = (64,)  # channels of each critic's finest maps; several = a curriculum
    channel_max: int = 512  # bound on the channels of coarser ones
    has_batchnorm: bool = True  # BatchNorm after every layer but the first and the last
    augment_policy: str = ""  # DiffAugment operations; empty = none


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """BEGAN's discriminator (arXiv:1703.10717): an autoencoder, whose logits are reconstruction errors."""

    kind: Literal["autoencoder"] = "autoencoder"  # tells this configuration from others in a file
    img_resolution: int  # side of the images it sees, pixels: 8, 16, 32, 64 or 128
    img_channels: int = 3  # channels of the images
    hidden_dim: int = 64  # entries of the code between encoder and decoder
    channel_base: int = 64  # channels of the finest feature maps
    channel_max: int = 512  # bound on the channels of coarser ones
    augment_policy: str = ""  # DiffAugment operations; empty = none


def plan_channels(img_resolution: int, channel_base: int, channel_max: int) -> list[int]:
    """Channels of the feature maps, finest (half the image's side) first, down to those of side 4.

    >>> plan_channels(64, channel_base=64, channel_max=512)
    [64, 128, 256, 512]
    """
    num_halvings = (img_resolution // COARSEST).bit_length() - 1
    return [min(channel_base * 2**i, channel_max) for i in range(num_halvings)]
