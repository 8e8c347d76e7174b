# SPDX-License-Identifier: MIT
"""GAN objectives as elementwise functions of logits, each with the potential that trains a SAN's direction.

The generator minimises J = E[-R(f)]. Its potential R is non-decreasing, and its slope r_J = R' says how much
the generator cares about a sample: a SAN trains the direction on features that are weighted by r_J(f)
(SAN, arXiv:2301.12811). Losses are minimised and keep the shape of the logits; sigma is the sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective that treats every logit by itself: real and fake samples may have their own backward pass."""

    real: Callable[[Tensor], Tensor]  # discriminator's loss on the logits of real samples
    fake: Callable[[Tensor], Tensor]  # discriminator's loss on the logits of generated samples
    generator: Callable[[Tensor], Tensor]  # generator's loss on the logits of generated samples
    potential: Callable[[Tensor], Tensor] | None  # R, minus `generator` up to a constant; None: no SAN form

    @property
    def is_paired(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class PairedObjective:
    """A relativistic objective: losses compare real with fake logits, so both must come in one call.

    `discriminator` and `generator` take (real, fake), of one shape. `potential` takes (logits, real): R at each
    of the logits (N, ...), given the reals' logits (M, ...) of the batch.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]  # loss of each pair
    generator: Callable[[Tensor, Tensor], Tensor]  # loss of each pair
    potential: Callable[[Tensor, Tensor], Tensor] | None  # R, non-decreasing in its first argument

    @property
    def is_paired(self) -> bool:
        return True


OBJECTIVES: dict[str, Objective] = {
    "hinge": Objective(
        real=lambda logits: F.relu(1 - logits),
        fake=lambda logits: F.relu(1 + logits),
        generator=lambda logits: -logits,
        potential=lambda logits: logits,  # r_J = 1
    ),
    "wasserstein": Objective(  # the Lipschitz constraint (clipping, gradient penalty) is the caller's
        real=lambda logits: -logits,
        fake=lambda logits: logits,
        generator=lambda logits: -logits,
        potential=lambda logits: logits,  # r_J = 1
    ),
    "saturating": Objective(  # minimax, arXiv:1406.2661: G minimises log(1 - sigma(f))
        real=lambda logits: F.softplus(-logits),
        fake=F.softplus,
        generator=lambda logits: -F.softplus(logits),
        potential=F.softplus,  # r_J = sigma(f)
    ),
    "nonsaturating": Objective(  # the same D; G minimises -log sigma(f)
        real=lambda logits: F.softplus(-logits),
        fake=F.softplus,
        generator=lambda logits: F.softplus(-logits),
        potential=F.logsigmoid,  # r_J = 1 - sigma(f)
    ),
    "least_squares": Objective(  # LSGAN, arXiv:1611.04076, targets 0 and 1, without its factors 1/2
        real=lambda logits: (1 - logits).square(),
        fake=torch.square,
        generator=lambda logits: (1 - logits).square(),
        potential=None,  # r_J = 2 (1 - f) is negative above the target: not monotone
    ),
    "soft_least_squares": Objective(  # monotone by softplus: BigVSAN, arXiv:2309.02836
        real=lambda logits: F.softplus(1 - logits).square(),
        fake=lambda logits: F.softplus(logits).square(),
        generator=lambda logits: F.softplus(1 - logits).square(),
        potential=lambda logits: -F.softplus(1 - logits).square(),  # r_J = 2 softplus(1 - f) sigma(1 - f)
    ),
}


def relativistic_potential(logits: Tensor, real: Tensor) -> Tensor:
    """R of the relativistic generator loss: the mean over j of -softplus(real_j - logits). Shape of logits.

    logits: (N, ...); real: (M, ...), whose M logits stand for the data. The trailing axes, e.g. patches, pair up.

    Derivation. J = E_x E_z[softplus(f(x) - f(G(z)))]. With f and the data fixed this is E_z[-R(f(G(z)))] with
    R(t) = E_x[-softplus(f(x) - t)], which rises with t: SAN's general form, with a potential that depends on the
    data. So r_J(t) = R'(t) = E_x[sigma(f(x) - t)] weights reals and fakes by one function of their logit, and the
    direction term vanishes when both distributions are equal. Weighting pairs instead, by sigma(f(x) - f(G(z))),
    would not: it keeps pushing along the present direction.
    """
    return -F.softplus(real.unsqueeze(0) - logits.unsqueeze(1)).mean(1)


PAIRED_OBJECTIVES: dict[str, PairedObjective] = {
    "relativistic": PairedObjective(  # RpGAN, arXiv:1807.00734, as in R3GAN, arXiv:2501.05441 (with R1 and R2)
        discriminator=lambda real, fake: F.softplus(fake - real),
        generator=lambda real, fake: F.softplus(real - fake),
        potential=relativistic_potential,
    ),
}


def direction_weights(
    objective: Objective | PairedObjective, logits: Tensor, real: Tensor | None = None
) -> Tensor:
    """r_J at each of the logits: the slope of the potential, which weights features in the direction's optimum.

    logits: floating point, any shape; real: the reals' logits, for a paired objective only. Shape and dtype of
    logits, without a graph.

    Raises ValueError when the objective has no SAN form.

    >>> direction_weights(OBJECTIVES["saturating"], torch.tensor([-4.0, 0.0, 4.0]))
    tensor([0.0180, 0.5000, 0.9820])
    """
    potential = bind_potential(objective, real)
    return torch.func.grad(lambda x: potential(x).sum())(logits.detach()).detach()


def bind_potential(objective: Objective | PairedObjective, real: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The potential as a function of logits alone."""
    if objective.potential is None:
        raise ValueError(
            "this objective has no SAN form, because its generator loss is not monotone in the logits: use its "
            "GAN losses, or OBJECTIVES['soft_least_squares'] in the place of 'least_squares'"
        )
    if isinstance(objective, Objective):
        return objective.potential
    if real is None:
        raise ValueError("a paired objective weights by the reals' logits: pass them as real")
    real = real.detach()
    return lambda logits: objective.potential(logits, real)
