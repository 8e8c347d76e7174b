# SPDX-License-Identifier: MIT
"""Training of the paper's synthetic experiment, all runs of one objective at once (SAN, arXiv:2301.12811).

The GANs and SANs of all seeds are stacked along the first axis of each tensor and trained side by side. A seed's
GAN and SAN start from the same weights and see the same data and latents.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import san
from san.conditions import compare_slices, direction_cosine, mean_difference
from san.losses import AnyObjective
from san.objectives import direction_weights
from san.toy_ring import Ring, count_modes, sliced_wasserstein

# Reals that stand for the data in the measured r_J of a paired objective, which meets them all.
MAX_PAIRED = 256
ALL_OBJECTIVES = {**san.OBJECTIVES, **san.PAIRED_OBJECTIVES}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but objective and seeds; the same for GAN and SAN."""

    ring: Ring = field(default_factory=Ring)  # the data
    z_dim: int = 10  # width of the latent, N(0, 1)
    width: int = 64  # units of each hidden layer, and features that the direction meets
    batch_size: int = 128  # real and generated samples per step, each
    lr: float = 1e-3  # Adam's learning rate, of G and of D
    betas: tuple[float, float] = (0.0, 0.9)  # Adam's decays
    num_d_steps: int = 1  # steps of D per step of G
    iterations: int = 4000  # steps of G
    record_iterations: int = 100  # measure every so many iterations
    num_samples: int = 2048  # real and generated samples per measurement
    num_final_samples: int = 10_000  # of the last one
    normalize_weights: bool = True  # r_J has mean 1 over real and over fake samples
    penalty_weight: float = 0.1  # of the objectives that need a gradient penalty


@dataclass(frozen=True)
class Record:
    """Measures of all runs of one kind and objective at one time. Tensors (seeds,) and samples (seeds, n, 2)."""

    iteration: int
    modes: Tensor  # modes covered
    quality: Tensor  # fraction of samples near a mode
    wasserstein: Tensor  # sliced Wasserstein-1 distance to fresh data
    cosine: Tensor  # between the direction and the optimal one
    mean_difference: Tensor  # length of the r_J-weighted difference of feature means
    in_order: Tensor  # fraction of quantiles in order along the direction
    gap: Tensor  # separability gap
    samples: Tensor  # generated, on the CPU


class StackedLinear(nn.Module):
    """`nn.Linear` of every run: (runs, N, in_features) -> (runs, N, out_features)."""

    def __init__(self, in_features: int, out_features: int, draws: Draws) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)  # as torch initialises its linear layers
        self.weight = nn.Parameter(draws.uniform(in_features, out_features, bound=bound))
        self.bias = nn.Parameter(draws.uniform(1, out_features, bound=bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Draws:
    """Random numbers with one generator per seed, the same for a seed's GAN and SAN: tensors (runs, ...)."""

    def __init__(self, seeds: Sequence[int], num_kinds: int, device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.num_kinds, self.device = num_kinds, device

    def stack(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        per_seed = torch.stack([draw(generator) for generator in self.generators])
        return torch.cat([per_seed] * self.num_kinds).to(self.device)

    def uniform(self, *shape: int, bound: float) -> Tensor:
        return self.stack(lambda generator: (2 * torch.rand(shape, generator=generator) - 1) * bound)

    def normal(self, *shape: int) -> Tensor:
        return self.stack(lambda generator: torch.randn(shape, generator=generator))

    def data(self, ring: Ring, num: int) -> Tensor:
        modes = self.stack(lambda generator: torch.randint(ring.num_modes, (num,), generator=generator))
        return ring.place(modes, self.normal(num, 2))


class Discriminator(nn.Module):
    """h and the directions of all runs: points (runs, N, 2) -> logits (runs, N), those of the GANs first.

    A SAN's direction and scale are a row of a `SANEmbedding`, with runs in the place of classes.
    """

    def __init__(self, width: int, num_seeds: int, num_kinds: int, draws: Draws) -> None:
        super().__init__()
        self.features = make_mlp([2, width, width, width], nn.LeakyReLU(0.1), draws).append(nn.LeakyReLU(0.1))
        weight = draws.uniform(width, bound=1 / math.sqrt(width))
        self.weight = nn.Parameter(weight[:num_seeds].clone())  # of the GANs: (seeds, width)
        self.embed = san.SANEmbedding(num_seeds, width, device=weight.device) if num_kinds > 1 else None
        if self.embed is not None:
            with torch.no_grad():
                norms = weight[num_seeds:].norm(dim=1, keepdim=True)
                self.embed.weight.copy_(weight[num_seeds:] / norms)
                self.embed.scale.copy_(norms)

    def classify(self, h: Tensor) -> san.SANLogits:
        """Logits of features (runs, N, width)."""
        num_seeds = len(self.weight)
        logits = san.SANLogits.plain((h[:num_seeds] * self.weight.unsqueeze(1)).sum(2))
        if self.embed is None:
            return logits
        class_vectors = self.embed(torch.arange(num_seeds, device=h.device))
        return torch.cat([logits, san.project(h[num_seeds:].transpose(1, 2), class_vectors)])

    def forward(self, x: Tensor) -> san.SANLogits:
        return self.classify(self.features(x))

    def directions(self) -> Tensor:
        """(runs, width), unit vectors for the SANs."""
        parts = [self.weight] if self.embed is None else [self.weight, self.embed.weight]
        return torch.cat([part.detach() for part in parts])


def make_mlp(widths: Sequence[int], activation: nn.Module, draws: Draws) -> nn.Sequential:
    """Linear layers with the activation between them."""
    layers: list[nn.Module] = []
    for in_features, out_features in itertools.pairwise(widths):
        layers += [StackedLinear(in_features, out_features, draws), activation]
    return nn.Sequential(*layers[:-1])


def train(
    name: str, settings: Settings, seeds: Sequence[int], device: torch.device | str = "cpu"
) -> Iterator[dict[str, Record]]:
    """Train GANs and SANs with the objective `name` for all seeds; yields {kind: Record}, at first, between, at last.

    An objective without a SAN form has GANs only. A seed's run does not depend on the other seeds.

    >>> settings = Settings(width=8, batch_size=4, iterations=1, num_final_samples=100)
    >>> [(records["SAN"].iteration, len(records["SAN"].modes)) for records in train("hinge", settings, seeds=range(3))]
    [(0, 3), (1, 3)]
    """
    objective = ALL_OBJECTIVES[name]
    num_kinds = 1 if objective.potential is None else 2
    draws = Draws(seeds, num_kinds, torch.device(device))
    width = settings.width
    G = make_mlp([settings.z_dim, width, width, 2], nn.ReLU(), draws)
    D = Discriminator(width, len(seeds), num_kinds, draws)
    optimizers = [
        torch.optim.Adam(net.parameters(), settings.lr, settings.betas, fused=True) for net in (G, D)
    ]
    for iteration in range(settings.iterations + 1):
        is_last = iteration == settings.iterations
        if is_last or iteration % settings.record_iterations == 0:
            num_samples = settings.num_final_samples if is_last else settings.num_samples
            yield make_record(objective, settings, G, D, draws, iteration, num_samples)
        if not is_last:
            for _ in range(settings.num_d_steps):
                discriminator_step(name, settings, G, D, optimizers[1], draws)
            generator_step(objective, settings, G, D, optimizers[0], draws)


def discriminator_step(
    name: str,
    settings: Settings,
    G: nn.Module,
    D: Discriminator,
    optimizer: torch.optim.Optimizer,
    draws: Draws,
) -> None:
    """One update of every D. Losses are summed over runs, so that none feels the others."""
    objective, num, num_seeds = ALL_OBJECTIVES[name], settings.batch_size, len(D.weight)
    real = draws.data(settings.ring, num)
    with torch.no_grad():
        fake = G(draws.normal(num, settings.z_dim))
    logits = D(torch.cat([real, fake], dim=1))
    real_logits, fake_logits = logits[:, :num], logits[:, num:]
    loss = sum_over_runs(
        functools.partial(san.gan_discriminator_loss, objective),
        real_logits[:num_seeds],
        fake_logits[:num_seeds],
    )
    if D.embed is not None:
        san_loss = functools.partial(
            san.san_discriminator_loss, objective, normalize_weights=settings.normalize_weights
        )
        loss = loss + sum_over_runs(san_loss, real_logits[num_seeds:], fake_logits[num_seeds:])
    if name in PENALTIES:
        loss = loss + settings.penalty_weight * PENALTIES[name](D, real, fake, draws)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    san.normalize_directions_(D)


def generator_step(
    objective: AnyObjective,
    settings: Settings,
    G: nn.Module,
    D: Discriminator,
    optimizer: torch.optim.Optimizer,
    draws: Draws,
) -> None:
    """One update of every G."""
    D.requires_grad_(False)
    fake = D(G(draws.normal(settings.batch_size, settings.z_dim)))
    logits = [fake]
    if objective.is_paired:
        logits.append(D(draws.data(settings.ring, settings.batch_size)))
    optimizer.zero_grad()
    sum_over_runs(functools.partial(san.generator_loss, objective), *logits).backward()
    optimizer.step()
    D.requires_grad_(True)


def interpolation_penalty(D: Discriminator, real: Tensor, fake: Tensor, draws: Draws) -> Tensor:
    """WGAN-GP (arXiv:1704.00028): (|gradient of D| - 1)^2 between real and generated samples, summed over runs."""
    shares = draws.stack(lambda generator: torch.rand(real.shape[1], 1, generator=generator))
    return (_gradient_norms(D, fake.lerp(real, shares)) - 1).square().mean(1).sum()


def zero_penalty(D: Discriminator, real: Tensor, fake: Tensor, draws: Draws) -> Tensor:
    """R1 + R2, as R3GAN (arXiv:2501.05441): |gradient of D|^2 at real and at generated samples, summed over runs."""
    return sum(_gradient_norms(D, points).square().mean(1).sum() for points in (real, fake))


PENALTIES = {"wasserstein": interpolation_penalty, "relativistic": zero_penalty}  # the others need none here


def _gradient_norms(D: Discriminator, points: Tensor) -> Tensor:
    """(runs, N), differentiable; goes through `fun`, so that directions take no part."""
    points = points.detach().requires_grad_()
    (gradients,) = torch.autograd.grad(D(points).fun.sum(), points, create_graph=True)
    return gradients.square().sum(2).add(1e-12).sqrt()


@torch.no_grad()
def make_record(
    objective: AnyObjective,
    settings: Settings,
    G: nn.Module,
    D: Discriminator,
    draws: Draws,
    iteration: int,
    num_samples: int,
) -> dict[str, Record]:
    """Measures of the present networks on fresh samples, by kind."""
    real = draws.data(settings.ring, num_samples)
    fake = G(draws.normal(num_samples, settings.z_dim))
    real_h, fake_h = D.features(real), D.features(fake)
    real_weights, fake_weights = weigh(objective, settings, D.classify(real_h).fun, D.classify(fake_h).fun)
    directions = nn.functional.normalize(D.directions(), dim=1)
    difference = mean_difference(real_h, fake_h, real_weights, fake_weights)
    order = compare_slices(*(torch.bmm(h, directions.unsqueeze(2)).squeeze(2) for h in (real_h, fake_h)))
    modes, quality = count_modes(fake, settings.ring)
    measures = {
        "modes": modes.float(),
        "quality": quality,
        "wasserstein": sliced_wasserstein(real, fake),
        "cosine": direction_cosine(directions, difference),
        "mean_difference": difference.norm(dim=1),
        "in_order": order.in_order,
        "gap": order.gap,
        "samples": fake,
    }
    num_seeds = len(D.weight)
    kinds = {"GAN": slice(0, num_seeds), "SAN": slice(num_seeds, None)}
    if D.embed is None:
        del kinds["SAN"]
    return {
        kind: Record(iteration=iteration, **{key: value[rows].cpu() for key, value in measures.items()})
        for kind, rows in kinds.items()
    }


def weigh(
    objective: AnyObjective, settings: Settings, real_logits: Tensor, fake_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """r_J at logits (runs, N), of mean 1 in each run if so set; 1 for an objective without a SAN form."""
    if objective.potential is None:
        return torch.ones_like(real_logits), torch.ones_like(fake_logits)
    slope = torch.func.vmap(functools.partial(direction_weights, objective))
    sides = [slope(logits, real_logits[:, :MAX_PAIRED]) for logits in (real_logits, fake_logits)]
    if settings.normalize_weights:
        sides = [side / side.mean(1, keepdim=True).clamp_min(torch.finfo(side.dtype).tiny) for side in sides]
    return sides[0], sides[1]


def sum_over_runs(loss: Callable[..., Tensor], *logits: san.SANLogits) -> Tensor:
    """Sum of the losses of all runs, each computed from its own logits alone. logits: (runs, N)."""

    def of_one_run(*views: Tensor) -> Tensor:
        return loss(*(san.SANLogits(fun, dir_) for fun, dir_ in zip(views[::2], views[1::2], strict=True)))

    return torch.func.vmap(of_one_run)(*(view for both in logits for view in (both.fun, both.dir))).sum()
