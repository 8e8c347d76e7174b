# SPDX-License-Identifier: MIT
"""Slicing Adversarial Networks (SAN, arXiv:2301.12811) for the discriminator of any GAN, on torch alone.

Replace the last layer by a SAN layer, use the losses below, and call `normalize_directions_` after every
optimizer step of the discriminator.
"""

from san.layers import SANConv1d, SANConv2d, SANEmbedding, SANLinear, normalize_directions_, project
from san.logits import SANLogits
from san.losses import (
    OBJECTIVES,
    Objective,
    gan_fake_loss,
    gan_real_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    san_fake_loss,
    san_real_loss,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
)

__all__ = [
    "OBJECTIVES",
    "Objective",
    "SANConv1d",
    "SANConv2d",
    "SANEmbedding",
    "SANLinear",
    "SANLogits",
    "gan_fake_loss",
    "gan_real_loss",
    "generator_loss",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "normalize_directions_",
    "project",
    "san_fake_loss",
    "san_real_loss",
    "wasserstein_discriminator_loss",
    "wasserstein_generator_loss",
]
