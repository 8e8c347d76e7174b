# SPDX-License-Identifier: MIT
"""A small convolutional generator after DCGAN (arXiv:1511.06434), with the methods of StyleGAN's.

It has no styles: `mapping` joins latent, codes and class to one vector, which stands in for ws, so that training and
sampling treat both generators alike. Latents are drawn from N(0, 1) everywhere; `latent_inputs` turns them into the
noise and the codes that a paper asks for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.conv_stacks import init_weights_, up_stack
from torch_utils.errors import UserError
from training.config import ConfigError
from training.dcgan_config import (
    MAX_RESOLUTION,
    MIN_RESOLUTION,
    DCGANGeneratorConfig,
    plan_channels,
)
from training.generator.mapping import labels_to_ids


class DCGANGenerator(nn.Module):
    """Latents and classes to images: `images = G(z, c)`, float32 (N, img_channels, H, W) in [-1, 1].

    The class enters as a one-hot vector beside the latent (conditional GAN, arXiv:1411.1784). Raises ConfigError for
    a configuration that gives no network.
    """

    def __init__(self, cfg: DCGANGeneratorConfig) -> None:
        super().__init__()
        check_sizes(cfg)
        self.cfg = cfg
        self.z_dim, self.c_dim = cfg.z_dim, cfg.c_dim
        self.img_resolution, self.img_channels = cfg.img_resolution, cfg.img_channels
        self.num_ws, self.w_dim = 1, cfg.z_dim + cfg.c_dim
        widths = plan_channels(cfg.img_resolution, cfg.channel_base, cfg.channel_max)
        self.layers = up_stack(self.w_dim, widths, cfg.img_channels, cfg.has_batchnorm)
        init_weights_(self.layers, cfg.has_batchnorm)

    def mapping(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Tensor:
        """Latent inputs and one-hot class in one row, (N, 1, z_dim + c_dim): what stands in for style vectors.

        z: (N, z_dim), standard normal; c: one-hot (N, c_dim), class ids (N,) or None. There is no mean to move or to
        truncate to: UserError for a `truncation_psi` other than 1, and for classes that do not fit.
        """
        if truncation_psi != 1:
            raise UserError(
                f"truncation psi {truncation_psi:g} pulls style vectors to their mean, and a DCGAN has none; use 1"
            )
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z of shape {tuple(z.shape)} is not (N, {self.z_dim})")
        return self.styles_of(z, labels_to_ids(c, self.c_dim, len(z)))

    def styles_of(self, z: Tensor, ids: Tensor | None) -> Tensor:
        """As `mapping`, for training: ids, int64 (N,), are known to be classes, and a GPU is not waited for."""
        w = latent_inputs(z.float(), self.cfg)
        if ids is not None:
            w = torch.cat([w, F.one_hot(ids, self.c_dim).to(w)], dim=1)
        return w.unsqueeze(1)

    def synthesis(self, ws: Tensor) -> Tensor:
        """Images of what `mapping` returns. In training mode BatchNorm sees, and averages, the batch."""
        return self.layers(ws.squeeze(1))

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Tensor:
        """Images of latents (N, z_dim) and classes; arguments and errors as those of `mapping`."""
        return self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff))

    def update_w_avg_(self, w: Tensor, ids: Tensor | None, num_moves: float) -> None:
        """Nothing: there are no styles to average."""


def latent_inputs(z: Tensor, cfg: DCGANGeneratorConfig) -> Tensor:
    """What the first layer gets for standard normal z: noise, categorical code, continuous codes. (N, z_dim).

    The last entries of z are the codes. The largest of `num_categories` normal numbers names the category, one-hot and
    with equal chances; the normal distribution's CDF makes `num_continuous` numbers U(-1, 1), and with
    `latent="uniform"` the noise too.
    """
    num_noise = cfg.z_dim - cfg.num_categories - cfg.num_continuous
    noise, categorical, continuous = z.split([num_noise, cfg.num_categories, cfg.num_continuous], dim=1)
    parts = [to_uniform(noise) if cfg.latent == "uniform" else noise]
    if cfg.num_categories:
        parts.append(F.one_hot(categorical.argmax(dim=1), cfg.num_categories).to(z))
    return torch.cat([*parts, to_uniform(continuous)], dim=1)


def to_uniform(z: Tensor) -> Tensor:
    """U(-1, 1) numbers of standard normal ones, in the same order: 2 Phi(z) - 1."""
    return torch.erf(z / math.sqrt(2))


def check_sizes(cfg: DCGANGeneratorConfig) -> None:
    """Raise ConfigError for sizes that give no network."""
    resolution = cfg.img_resolution
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION or resolution & (resolution - 1):
        raise ConfigError(
            f"images of {resolution}x{resolution} pixels do not fit --cfg dcgan, which takes sides of 8, 16, 32, 64 "
            "and 128; resize them with dataset_tool.py --resolution"
        )
    if cfg.num_categories + cfg.num_continuous > cfg.z_dim or cfg.z_dim < 1:
        raise ConfigError(
            f"z_dim={cfg.z_dim} is too small for {cfg.num_categories} categories and {cfg.num_continuous} continuous "
            "codes; set it to at least their sum"
        )
