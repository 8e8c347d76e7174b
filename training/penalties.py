# SPDX-License-Identifier: MIT
"""Gradient penalties on a critic, as pure functions of tensors: WGAN-GP, DRAGAN, R1 and R2.

Each penalty looks at the gradient of logits with respect to the images they judge. Of a SAN critic it takes the `fun`
view: the gradient with respect to an image is that of the plain layer, and the direction stays out of the penalty.
"""

from __future__ import annotations

import torch
from torch import Tensor

DRAGAN_RADIUS = 0.5  # of the noise, in standard deviations of the batch


def image_gradients(logits: Tensor, images: Tensor) -> Tensor:
    """Gradient of the sum of each image's logits, shape of images, in the graph: it can be differentiated again.

    logits: (N, K), computed from images (N, C, H, W) that require grad. BatchNorm in between mixes the images.
    """
    (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradients


def unit_norm_penalty(gradients: Tensor) -> Tensor:
    """(|gradient| - 1)^2 of each image, (N,): WGAN-GP (arXiv:1704.00028, Eq. 3) and DRAGAN with k = 1."""
    # The norm has no gradient at 0, where a critic that is constant around an image would give NaN.
    norms = gradients.flatten(1).square().sum(1).clamp_min(torch.finfo(gradients.dtype).tiny).sqrt()
    return (norms - 1).square()


def zero_norm_penalty(gradients: Tensor) -> Tensor:
    """|gradient|^2 of each image, (N,): R1 at real and R2 at generated images (arXiv:1801.04406)."""
    return gradients.flatten(1).square().sum(1)


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """real + alpha (fake - real), WGAN-GP's points: images (N, C, H, W); alpha (N,) in [0, 1)."""
    return real + alpha.view(-1, 1, 1, 1) * (fake - real)


def perturb(real: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """real + alpha * 0.5 std * noise, DRAGAN's points as its code has them (arXiv:1705.07215).

    real, noise: (N, C, H, W), noise uniform in [0, 1); alpha: (N,) in [0, 1); std: over the whole batch.
    """
    return real + alpha.view(-1, 1, 1, 1) * (DRAGAN_RADIUS * real.std() * noise)
