# SPDX-License-Identifier: MIT
"""The work that is measured, ours and naive: both have the same weights, inputs and random numbers, by the seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils.distributed import average_batch_statistics_
from torch_utils.ema import ema_beta, update_ema_
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.benchmark.naive_networks import NaiveDiscriminator, NaiveGenerator, seed_backbones_
from training.benchmark.naive_step import NaiveTrainer
from training.benchmark.recipes import STEADY_NIMG
from training.config import TrainConfig
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.generator import Generator
from training.initialization import Networks
from training.loss import GuidanceClassifier, ProjectedGANLoss
from training.optimizers import make_optimizer
from training.precision import apply_precision_
from training.sampling import seeded_sampler, to_uint8_metrics
from training.superres import freeze_stem_
from training.train_step import StepContext, discriminator_step, generator_step, path_length_step

Row = Literal["forward", "backward", "step", "sampling"]
Side = Literal["ours", "naive"]
SEED = 0
SAMPLE_SIZE = 4096  # numbers of every gradient that are compared


@dataclass
class Subject:
    """Something to time."""

    parts: Sequence[tuple[float, Callable[[], None]]]  # how often in one repetition, and what is run once
    num_images: int  # in one repetition
    results: dict[str, Tensor] = field(default_factory=dict)  # of the last run, to compare
    optimizers: Sequence[torch.optim.Optimizer] = ()  # those that a run steps


def make_subject(
    config: TrainConfig, row: Row, side: Side, device: torch.device, num_samples: int
) -> Subject:
    """Networks of `config` with random weights, and the work of a row of the table. num_samples: of "sampling"."""
    torch.manual_seed(SEED)
    if row == "step":
        return make_step(config, side, device)
    G = Generator(config.generator).to(device)
    if row == "sampling":
        return sampling_subject(G.eval().requires_grad_(False), side, device, num_samples)
    if config.generator.superres:
        freeze_stem_(G, config.trains_stem_input)
    if side == "ours":
        G.synthesis.set_precision_(config.precision)
    run_G = G if side == "ours" else NaiveGenerator(G)
    draws = make_draws(config, device)
    z, labels = draws.normal("z", G.z_dim), draw_labels(config, draws)
    subject = Subject([], config.batch_size)

    @torch.no_grad()
    def forward() -> None:
        subject.results["images"] = run_G(z, labels)

    noise = draws.normal("noise", 3, G.img_resolution, G.img_resolution)

    def backward() -> None:
        G.zero_grad(set_to_none=True)
        images = run_G(z, labels)
        (images * noise).sum().backward()
        subject.results = {"images": images.detach(), **sample_gradients("G", G)}

    subject.parts = [(1, forward if row == "forward" else backward)]
    return subject


def sampling_subject(G: Generator, side: Side, device: torch.device, num_samples: int) -> Subject:
    """uint8 images by number, as a metric asks for them."""
    subject = Subject([], num_samples)
    if side == "ours":
        sample = seeded_sampler(G, SEED, device)
    else:
        run_G, latents, classes = NaiveGenerator(G), np.random.RandomState(SEED), np.random.RandomState(SEED)
        z = torch.from_numpy(latents.randn(num_samples, G.z_dim)).float().to(device)
        labels = torch.from_numpy(classes.randint(0, G.c_dim, num_samples)).to(device) if G.c_dim else None

        def sample(items: Iterable[int]) -> Tensor:
            with torch.no_grad():
                return to_uint8_metrics(run_G(z, labels))

    def run() -> None:
        subject.results["pixels"] = sample(np.arange(num_samples))

    subject.parts = [(1, run)]
    return subject


def make_step(config: TrainConfig, side: Side, device: torch.device) -> Subject:
    """A training iteration; path length counts as often as it comes."""
    networks, guidance = build_networks(config, device), build_guidance(config, device)
    if side == "ours":
        return OurTrainer(config, networks, guidance, device).as_subject()
    D = NaiveDiscriminator(networks.D)
    trainer = NaiveTrainer(config, networks.G, D, guidance, STEADY_NIMG)
    beta = ema_beta(config.batch_size, STEADY_NIMG, config.ema_halflife_kimg, config.ema_rampup)
    images, G = draw_images(config, device), networks.G
    batches = {scope: draw_batch(config, images, device, scope) for scope in ("G", "D", "path_length")}
    subject = Subject([], config.batch_size, optimizers=(trainer.G_optimizer, trainer.D_optimizer))

    def iterate() -> None:
        trainer.generator_phase(batches["G"])
        subject.results |= sample_gradients("G through D", G)
        trainer.discriminator_phase(batches["D"])
        subject.results |= sample_gradients("D", D.heads)
        trainer.update_average(beta)

    def regularize() -> None:
        trainer.path_length_phase(batches["path_length"], torch.zeros((), device=device))
        subject.results |= sample_gradients("path length", G)

    subject.parts = [(1, iterate), *regularization(config, regularize)]
    return subject


class OurTrainer:
    """What `Trainer.iterate` does with a batch, without data, logs and files."""

    def __init__(
        self,
        config: TrainConfig,
        networks: Networks,
        guidance: GuidanceClassifier | None,
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        apply_precision_(networks.G, networks.D, config, device)
        self.G, self.D, self.G_ema = networks.G, networks.D, networks.G_ema
        trained = [p for p in self.G.parameters() if p.requires_grad]
        self.G_optimizer = make_optimizer(trained, config.generator_optimizer)
        self.D_optimizer = make_optimizer(self.D.trainable_parameters(), config.discriminator_optimizer)
        loss = ProjectedGANLoss(config, guidance)
        self.context = StepContext(config, loss, StatsCollector(), cur_nimg=STEADY_NIMG)
        self.results: dict[str, Tensor] = {}

    def iterate(self, images: Tensor) -> None:
        """G, D and the moving average, on real images (N, 3, H, W)."""
        config = self.config
        batch = draw_batch(config, images, self.device, "G")
        generator_step(self.G, self.D, self.G_optimizer, batch, self.context)
        self.results |= sample_gradients("G through D", self.G)
        batch = draw_batch(config, images, self.device, "D")
        discriminator_step(self.G, self.D, self.D_optimizer, batch, self.context)
        self.results |= sample_gradients("D", self.D.heads)
        average_batch_statistics_(self.G, self.D)
        beta = ema_beta(config.batch_size, STEADY_NIMG, config.ema_halflife_kimg, config.ema_rampup)
        update_ema_(self.G_ema, self.G, beta)

    def regularize(self, images: Tensor) -> None:
        """Path length."""
        batch = draw_batch(self.config, images, self.device, "path_length")
        pl_mean = torch.zeros((), device=self.device)
        path_length_step(self.G, self.G_optimizer, batch, pl_mean, self.context)
        self.results |= sample_gradients("path length", self.G)

    def as_subject(self) -> Subject:
        """Timed on noise for images."""
        images = draw_images(self.config, self.device)
        parts = [
            (1, lambda: self.iterate(images)),
            *regularization(self.config, lambda: self.regularize(images)),
        ]
        return Subject(parts, self.config.batch_size, self.results, (self.G_optimizer, self.D_optimizer))


def regularization(config: TrainConfig, run: Callable[[], None]) -> list[tuple[float, Callable[[], None]]]:
    """The part of an iteration that path length is, if it is any."""
    interval = config.generator_optimizer.reg_interval
    return [(1 / interval, run)] if config.loss_terms.pl_weight > 0 and interval > 0 else []


def build_networks(config: TrainConfig, device: torch.device) -> Networks:
    """As `training.initialization.new_networks`, but for feature networks with random weights: time does not depend
    on them.
    """
    G = Generator(config.generator).to(device)
    D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False).to(device)
    seed_backbones_(D)
    D.set_trainable_(False)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    if config.generator.superres:
        freeze_stem_(G, config.trains_stem_input)
    return Networks(G, D, G_ema)


def build_guidance(config: TrainConfig, device: torch.device) -> GuidanceClassifier | None:
    """The classifier with random weights, where the recipe has one."""
    return GuidanceClassifier.random().to(device) if config.loss_terms.cls_weight else None


def make_draws(config: TrainConfig, device: torch.device) -> Draws:
    """Random numbers of one batch."""
    return Draws(SEED, np.arange(config.batch_size), device)


def draw_labels(config: TrainConfig, draws: Draws) -> Tensor | None:
    """Class ids (N,)."""
    c_dim = config.generator.c_dim
    return draws.integers("label", 0, c_dim) if c_dim else None


def draw_images(config: TrainConfig, device: torch.device) -> Tensor:
    """Noise for real images, (N, 3, H, W) in [-1, 1)."""
    size = config.generator.img_resolution
    return make_draws(config, device).uniform("images", 3, size, size) * 2 - 1


def draw_batch(config: TrainConfig, images: Tensor, device: torch.device, scope: str) -> Batch:
    """Real images with what a step draws for them."""
    draws = make_draws(config, device).within(scope)
    labels, z = draw_labels(config, draws), draws.normal("z", config.generator.mapping.z_dim)
    return Batch(images, labels, z, labels, draws)


def sample_gradients(kind: str, network: nn.Module) -> dict[str, Tensor]:
    """Evenly spread numbers of every gradient, by the parameter's name."""
    found = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            flat = parameter.grad.detach().flatten()
            found[f"{kind}: {name}"] = flat[:: -(-len(flat) // SAMPLE_SIZE)].clone()
    return found
