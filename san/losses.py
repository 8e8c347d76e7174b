# SPDX-License-Identifier: MIT
"""Adversarial losses on SANLogits, as pure functions that reduce by the mean over all elements.

A SAN discriminator minimises its GAN's loss on `fun` plus a direction term on `dir`, with weight 1: the mean
of R(dir) over fakes minus the mean over reals (SAN, arXiv:2301.12811). R is the objective's potential, which
rises with the logits; for hinge and Wasserstein it is the identity. The generator's loss is the GAN's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from san.logits import SANLogits
from san.objectives import OBJECTIVES, Objective, PairedObjective, bind_potential, direction_weights

AnyObjective = Objective | PairedObjective


def gan_real_loss(objective: Objective, logits: SANLogits) -> Tensor:
    """Discriminator's loss on real samples without the direction term: mean over all elements, a scalar.

    Reads `fun` only. For plain heads: the directions of a SAN head get no gradient from it.
    """
    _require_unpaired(objective)
    return objective.real(_read(logits, "fun")).mean()


def gan_fake_loss(objective: Objective, logits: SANLogits) -> Tensor:
    """Discriminator's loss on generated samples without the direction term: as `gan_real_loss`."""
    _require_unpaired(objective)
    return objective.fake(_read(logits, "fun")).mean()


def san_real_loss(objective: Objective, logits: SANLogits, normalize_weights: bool = False) -> Tensor:
    """SAN discriminator's loss on real samples: the GAN's loss on `fun`, minus R(`dir`). Mean, a scalar.

    Real and fake terms are separate functions, so that each can have its own backward pass: gradients add up.

    The gradient of R weights every sample's features by r_J(f). `normalize_weights` divides these weights by
    their mean over the call's logits, on the real and on the fake side, so that they form probability measures.
    Off by default: the plain weights are the gradient of one objective E[R(f)], do not depend on how a batch is
    cut, fade out where the generator's own gradient does, and are those of BigVSAN (arXiv:2309.02836). For
    hinge and Wasserstein, r_J = 1 and the two are the same.

    Raises ValueError for an objective without a SAN form (least_squares), TypeError for a paired one.
    """
    gan_loss = gan_real_loss(objective, logits)
    return gan_loss - _mean_potential(objective, logits, None, normalize_weights)


def san_fake_loss(objective: Objective, logits: SANLogits, normalize_weights: bool = False) -> Tensor:
    """SAN discriminator's loss on generated samples: GAN's loss on `fun`, plus R(`dir`). Mean, a scalar.

    Arguments and errors: as `san_real_loss`.
    """
    gan_loss = gan_fake_loss(objective, logits)
    return gan_loss + _mean_potential(objective, logits, None, normalize_weights)


def gan_discriminator_loss(objective: AnyObjective, real: SANLogits, fake: SANLogits) -> Tensor:
    """Discriminator's whole loss without the direction term, of any objective. Reads `fun` only. Scalar.

    A paired objective compares sample i of real with sample i of fake, and wants logits of one shape (ValueError).
    """
    if isinstance(objective, PairedObjective):
        return objective.discriminator(*_read_pair(real, fake)).mean()
    return gan_real_loss(objective, real) + gan_fake_loss(objective, fake)


def san_discriminator_loss(
    objective: AnyObjective, real: SANLogits, fake: SANLogits, normalize_weights: bool = False
) -> Tensor:
    """SAN discriminator's whole loss, of any objective: GAN's loss on `fun` plus the direction term. Scalar.

    Arguments and errors: as `san_real_loss` and `gan_discriminator_loss`.

    >>> zero = SANLogits.plain(torch.zeros(8, 1))
    >>> san_discriminator_loss(OBJECTIVES["hinge"], real=zero, fake=zero).item()
    2.0
    """
    gan_loss = gan_discriminator_loss(objective, real, fake)
    reals = _read(real, "fun").detach() if isinstance(objective, PairedObjective) else None
    real_term = _mean_potential(objective, real, reals, normalize_weights)
    fake_term = _mean_potential(objective, fake, reals, normalize_weights)
    return gan_loss + fake_term - real_term


def generator_loss(objective: AnyObjective, fake: SANLogits, real: SANLogits | None = None) -> Tensor:
    """Generator's loss on the logits of its samples: reads `fun` only, in GAN and SAN. Mean, a scalar.

    real: logits of real samples, for a paired objective, which needs them (ValueError); others ignore them.
    """
    if not isinstance(objective, PairedObjective):
        return objective.generator(_read(fake, "fun")).mean()
    if real is None:
        raise ValueError(
            "a paired objective compares fakes with reals: generator_loss(objective, fake, real)"
        )
    return objective.generator(*_read_pair(real, fake)).mean()


def hinge_discriminator_loss(real: SANLogits, fake: SANLogits) -> Tensor:
    """SAN with the hinge objective: relu(1 - fun) and relu(1 + fun), plus the direction term. Scalar.

    >>> zero = SANLogits.plain(torch.zeros(8, 1))
    >>> hinge_discriminator_loss(real=zero, fake=zero).item()
    2.0
    """
    return san_discriminator_loss(OBJECTIVES["hinge"], real, fake)


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
    return san_discriminator_loss(OBJECTIVES["wasserstein"], real, fake)


def wasserstein_generator_loss(fake: SANLogits) -> Tensor:
    """Minus the mean of `fun`. Scalar."""
    return generator_loss(OBJECTIVES["wasserstein"], fake)


def _mean_potential(
    objective: AnyObjective, logits: SANLogits, reals: Tensor | None, normalize_weights: bool
) -> Tensor:
    """Mean of R(dir); or, with the same gradient up to one factor per call, of dir with weights of mean 1."""
    directional = _read(logits, "dir")
    if not normalize_weights:
        return bind_potential(objective, reals)(directional).mean()
    weights = direction_weights(objective, directional, reals)
    mean = weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)  # all weights can underflow to 0
    return (weights / mean * directional).mean()


def _read(logits: SANLogits, view: str) -> Tensor:
    """One view, fp16 and bf16 raised to float32 so that the mean over many logits is exact enough."""
    if not isinstance(logits, SANLogits):
        raise TypeError(
            f"the loss got a {type(logits).__name__}, but needs SANLogits: end the discriminator in a san "
            "layer, or wrap a plain head's logits with SANLogits.plain(tensor)"
        )
    tensor = getattr(logits, view)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _read_pair(real: SANLogits, fake: SANLogits) -> tuple[Tensor, Tensor]:
    pair = _read(real, "fun"), _read(fake, "fun")
    if pair[0].shape != pair[1].shape or pair[0].ndim == 0:
        raise ValueError(
            f"a paired objective compares sample by sample: real logits {tuple(real.shape)} and fake logits "
            f"{tuple(fake.shape)} must have the same shape, with the batch on the first axis"
        )
    return pair


def _require_unpaired(objective: AnyObjective) -> None:
    if isinstance(objective, PairedObjective):
        raise TypeError(
            "a paired objective has no separate real and fake losses: use gan_discriminator_loss or "
            "san_discriminator_loss(objective, real, fake)"
        )
