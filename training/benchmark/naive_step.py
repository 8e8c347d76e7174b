# SPDX-License-Identifier: MIT
"""A training iteration in the official order and manner: the naive twin of `training/train_step.py`.

Every pass computes its features anew, gradients are joined into one vector and cut up again, optimizers and the moving
average go parameter by parameter. Losses are scaled as ours are, so that gradients can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import san
from training.augment import blur_sigma, parse_policy
from training.batch import Batch
from training.benchmark import naive_ops
from training.benchmark.naive_networks import NaiveAugment, NaiveDiscriminator, NaiveGenerator
from training.config import OptimizerConfig, TrainConfig
from training.draws import Draws
from training.generator.generator import Generator
from training.loss import PAPER_MICROBATCH_SIZE, GuidanceClassifier


class NaiveTrainer:
    """Networks and optimizers, and the phases of an iteration, each for a batch in one pass."""

    def __init__(
        self,
        config: TrainConfig,
        G: Generator,
        D: NaiveDiscriminator,
        guidance: GuidanceClassifier | None,
        cur_nimg: int,
    ) -> None:
        self.config, self.G, self.D, self.guidance, self.cur_nimg = config, G, D, guidance, cur_nimg
        self.naive_G = NaiveGenerator(G)
        self.G_ema = copy.deepcopy(G).eval().requires_grad_(False)
        self.G_trained = [p for p in G.parameters() if p.requires_grad]
        self.D_trained = list(D.heads.parameters())
        self.G_optimizer = make_adam(self.G_trained, config.generator_optimizer)
        self.D_optimizer = make_adam(self.D_trained, config.discriminator_optimizer)
        self.policy = parse_policy(config.discriminator.augment_policy)
        self.objective = san.OBJECTIVES[config.objective]
        is_san = config.loss == "san"
        self.real_term, self.fake_term = (
            (san.san_real_loss, san.san_fake_loss) if is_san else (san.gan_real_loss, san.gan_fake_loss)
        )
        if guidance is not None:
            guidance.model.requires_grad_(True)  # the official classifier gathers gradients that nobody uses
        set_trainable_(self.G_trained, False)
        set_trainable_(self.D_trained, False)

    def logits(self, images: Tensor, labels: Tensor | None, draws: Draws) -> Iterable[san.SANLogits]:
        """D's opinion of images, one result per backbone."""
        terms = self.config.loss_terms
        sigma = blur_sigma(self.cur_nimg, terms.blur_init_sigma_px, terms.blur_fade_kimg)
        augment = NaiveAugment(self.policy, draws) if self.policy else None
        return self.D(naive_ops.blur(images, sigma), labels, augment).values()

    def generator_phase(self, batch: Batch) -> None:
        """Update G."""
        self.G_optimizer.zero_grad(set_to_none=True)
        set_trainable_(self.G_trained, True)
        images = self.naive_G(batch.z, batch.fake_labels)
        logits = self.logits(images, batch.fake_labels, batch.draws.within("fake"))
        loss = sum(san.generator_loss(self.objective, backbone) for backbone in logits)
        if self.guidance is not None:
            weight = self.config.loss_terms.cls_weight / PAPER_MICROBATCH_SIZE
            loss = loss + weight * F.cross_entropy(self.guidance(images), batch.fake_labels)
        loss.backward()
        set_trainable_(self.G_trained, False)
        apply_gradients(self.G_trained, self.G_optimizer)

    def path_length_phase(self, batch: Batch, pl_mean: Tensor) -> Tensor:
        """Update G towards equal path lengths on a part of the batch; returns the new mean length."""
        terms = self.config.loss_terms
        batch = batch[: max(len(batch) // terms.pl_batch_shrink, 1)]
        self.G_optimizer.zero_grad(set_to_none=True)
        set_trainable_(self.G_trained, True)
        ws = self.naive_G.mapping(batch.z, batch.fake_labels)
        images = self.naive_G.synthesis(ws)
        noise = batch.draws.normal("noise", *images.shape[1:]) / (images.shape[2] * images.shape[3]) ** 0.5
        (gradients,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
        lengths = gradients.square().sum(dim=2).mean(dim=1).sqrt()
        pl_mean = pl_mean.lerp(lengths.mean(), terms.pl_decay)
        penalty = (lengths - pl_mean).square()
        (terms.pl_weight * penalty.mean() / PAPER_MICROBATCH_SIZE).backward()
        set_trainable_(self.G_trained, False)
        apply_gradients(self.G_trained, self.G_optimizer)
        return pl_mean.detach()

    def discriminator_phase(self, batch: Batch) -> None:
        """Update D on generated and on real images, and G's running mean of w."""
        self.D_optimizer.zero_grad(set_to_none=True)
        set_trainable_(self.D_trained, True)
        ws = self.naive_G.mapping(batch.z, batch.fake_labels, update_emas=True)
        images = self.naive_G.synthesis(ws)  # with a graph, but for G's parameters
        logits = self.logits(images, batch.fake_labels, batch.draws.within("fake"))
        sum(self.fake_term(self.objective, backbone) for backbone in logits).backward()
        logits = self.logits(batch.images, batch.labels, batch.draws.within("real"))
        sum(self.real_term(self.objective, backbone) for backbone in logits).backward()
        set_trainable_(self.D_trained, False)
        apply_gradients(self.D_trained, self.D_optimizer)
        san.normalize_directions_(self.D)

    @torch.no_grad()
    def update_average(self, beta: float) -> None:
        """Move G_ema, of which `beta` stays."""
        for averaged, current in zip(self.G_ema.parameters(), self.G.parameters(), strict=True):
            averaged.copy_(current.lerp(averaged, beta))
        for averaged, current in zip(self.G_ema.buffers(), self.G.buffers(), strict=True):
            averaged.copy_(current)


def make_adam(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Adam:
    """Adam as torch has it by default, with the correction for lazy regularisation."""
    lr, betas = config.adjusted()
    return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=config.eps)


def set_trainable_(parameters: Sequence[nn.Parameter], mode: bool) -> None:
    """Let gradients reach parameters, or not."""
    for parameter in parameters:
        parameter.requires_grad_(mode)


def apply_gradients(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """One vector of all gradients, without what is not finite, and a step."""
    trained = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in trained])
    flat = torch.nan_to_num(flat, nan=0, posinf=1e5, neginf=-1e5)
    for parameter, gradient in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = gradient.reshape(parameter.shape)
    optimizer.step()
