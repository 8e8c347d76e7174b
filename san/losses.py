# SPDX-License-Identifier: MIT
"""Adversarial objectives on SANLogits, as pure functions that reduce by the mean over all elements.

A SAN discriminator minimises its GAN's loss on `fun` plus a direction term on `dir`, with weight 1: the mean
of R(dir) over fakes minus the mean over reals (SAN, arXiv:2301.12811). R is the objective's potential, which
rises with the logits; for hinge and Wasserstein it is the identity. The generator's loss is the GAN's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from san.logits import SANLogits


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One GAN objective as four elementwise functions of logits. Losses are minimised; shapes are kept."""

    real: Callable[[Tensor], Tensor]  # discriminator's loss on the logits of real samples
    fake: Callable[[Tensor], Tensor]  # discriminator's loss on the logits of generated samples
    generator: Callable[[Tensor], Tensor]  # generator's loss on the logits of generated samples
    potential: Callable[[Tensor], Tensor]  # R, non-decreasing; minus the generator's loss, up to a constant


OBJECTIVES: dict[str, Objective] = {
    "hinge": Objective(
        real=lambda logits: F.relu(1 - logits),
        fake=lambda logits: F.relu(1 + logits),
        generator=lambda logits: -logits,
        potential=lambda logits: logits,
    ),
    "wasserstein": Objective(
        real=lambda logits: -logits,
        fake=lambda logits: logits,
        generator=lambda logits: -logits,
        potential=lambda logits: logits,
    ),
}


def gan_real_loss(objective: Objective, logits: SANLogits) -> Tensor:
    """Discriminator's loss on real samples without the direction term: mean over all elements, a scalar.

    Reads `fun` only. For plain heads: the directions of a SAN head get no gradient from it.
    """
    return objective.real(_read(logits, "fun")).mean()


def gan_fake_loss(objective: Objective, logits: SANLogits) -> Tensor:
    """Discriminator's loss on generated samples without the direction term: as `gan_real_loss`."""
    return objective.fake(_read(logits, "fun")).mean()


def san_real_loss(objective: Objective, logits: SANLogits) -> Tensor:
    """SAN discriminator's loss on real samples: the GAN's loss on `fun`, minus R(`dir`). Mean, a scalar.

    Real and fake terms are separate functions, so that each can have its own backward pass: gradients add up.
    """
    return gan_real_loss(objective, logits) - objective.potential(_read(logits, "dir")).mean()


def san_fake_loss(objective: Objective, logits: SANLogits) -> Tensor:
    """SAN discriminator's loss on generated samples: GAN's loss on `fun`, plus R(`dir`). Mean, a scalar."""
    return gan_fake_loss(objective, logits) + objective.potential(_read(logits, "dir")).mean()


def generator_loss(objective: Objective, logits: SANLogits) -> Tensor:
    """Generator's loss on the logits of its samples: reads `fun` only, in GAN and SAN. Mean, a scalar."""
    return objective.generator(_read(logits, "fun")).mean()


def hinge_discriminator_loss(real: SANLogits, fake: SANLogits) -> Tensor:
    """SAN with the hinge objective: relu(1 - fun) and relu(1 + fun), plus the direction term. Scalar.

    >>> zero = SANLogits.plain(torch.zeros(8, 1))
    >>> hinge_discriminator_loss(real=zero, fake=zero).item()
    2.0
    """
    return san_real_loss(OBJECTIVES["hinge"], real) + san_fake_loss(OBJECTIVES["hinge"], fake)


def hinge_generator_loss(fake: SANLogits) -> Tensor:
    """Minus the mean of `fun`. Scalar."""
    return generator_loss(OBJECTIVES["hinge"], fake)


def wasserstein_discriminator_loss(real: SANLogits, fake: SANLogits) -> Tensor:
    """SAN with the Wasserstein objective: mean fake minus mean real, on `fun` and on `dir`. Scalar.

    The Lipschitz constraint is the caller's: a gradient penalty goes through `fun`.

    >>> real, fake = (SANLogits.plain(torch.full((8, 1), v)) for v in (2.0, 0.5))
    >>> wasserstein_discriminator_loss(real, fake).item()  # -1.5 for each view
    -3.0
    """
    return san_real_loss(OBJECTIVES["wasserstein"], real) + san_fake_loss(OBJECTIVES["wasserstein"], fake)


def wasserstein_generator_loss(fake: SANLogits) -> Tensor:
    """Minus the mean of `fun`. Scalar."""
    return generator_loss(OBJECTIVES["wasserstein"], fake)


def _read(logits: SANLogits, view: str) -> Tensor:
    """One view, fp16 and bf16 raised to float32 so that the mean over many logits is exact enough."""
    if not isinstance(logits, SANLogits):
        raise TypeError(
            f"the loss got a {type(logits).__name__}, but needs SANLogits: end the discriminator in a san "
            "layer, or wrap a plain head's logits with SANLogits.plain(tensor)"
        )
    tensor = getattr(logits, view)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
