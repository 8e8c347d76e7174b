# SPDX-License-Identifier: MIT
"""Slicing Adversarial Networks (SAN, arXiv:2301.12811) for the discriminator of any GAN, on torch alone.

`sanify(D)` replaces the last layers by SAN layers without changing what D computes; the losses below train
them; `keep_normalized(optimizer, D)` keeps their directions on the unit sphere.
"""

from san.convert import ReplacedLayer, SanifyReport, sanify
from san.layers import (
    SANConv1d,
    SANConv2d,
    SANEmbedding,
    SANLinear,
    keep_normalized,
    normalize_directions_,
)
from san.logits import SANLogits
from san.losses import (
    gan_discriminator_loss,
    gan_fake_loss,
    gan_real_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    san_discriminator_loss,
    san_fake_loss,
    san_real_loss,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
)
from san.objectives import OBJECTIVES, PAIRED_OBJECTIVES, Objective, PairedObjective, direction_weights
from san.projection import project
from san.twins import SanifyError, convert_layer

__all__ = [
    "OBJECTIVES",
    "PAIRED_OBJECTIVES",
    "Objective",
    "PairedObjective",
    "ReplacedLayer",
    "SANConv1d",
    "SANConv2d",
    "SANEmbedding",
    "SANLinear",
    "SANLogits",
    "SanifyError",
    "SanifyReport",
    "convert_layer",
    "direction_weights",
    "gan_discriminator_loss",
    "gan_fake_loss",
    "gan_real_loss",
    "generator_loss",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "keep_normalized",
    "normalize_directions_",
    "project",
    "san_discriminator_loss",
    "san_fake_loss",
    "san_real_loss",
    "sanify",
    "wasserstein_discriminator_loss",
    "wasserstein_generator_loss",
]
