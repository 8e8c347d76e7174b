# SPDX-License-Identifier: MIT
"""From images to scalars: blur, augmentation, discriminator, adversarial objective, guidance, path length.

`ProjectedGANLoss` is StyleGAN-XL's; plain GAN and SAN objectives go through it and differ in one dictionary entry.
That of the small networks is in `dcgan_loss.py`. All terms are means over samples, so their ratio is that of any
micro-batch (docs/fidelity.md#loss-scale).
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import san
from san.diagnostics import Recording, Side
from torch_utils.pretrained import create_pretrained
from torch_utils.recompute import recompute
from torch_utils.stats import StatsCollector
from training.augment import DiffAugment, blur, blur_sigma, parse_policy
from training.batch import Batch
from training.config import ConfigError, TrainConfig
from training.direction_log import DirectionLog
from training.draws import Draws

PAPER_MICROBATCH_SIZE = 8  # published runs sum the adversarial loss over 8 images but average the guidance


class AdversarialLoss(ABC):
    """What the training steps ask of a loss. Images: (N, 3, H, W) in [-1, 1]; cur_nimg: real images seen."""

    # Who measures SAN's conditions on the passes of D's own steps, if anybody.
    directions: DirectionLog | None = None

    def listen(self, side: Side) -> AbstractContextManager[Recording | None]:
        """Around such a pass."""
        return contextlib.nullcontext() if self.directions is None else self.directions.record(side)

    @abstractmethod
    def generator_loss(
        self, D: nn.Module, fake_images: Tensor, batch: Batch, cur_nimg: int, stats: StatsCollector
    ) -> Tensor:
        """Loss of G on the images it made of `batch`. Scalar."""

    @abstractmethod
    def discriminator_losses(
        self, D: nn.Module, fake_images: Tensor, batch: Batch, cur_nimg: int, stats: StatsCollector
    ) -> Iterator[Tensor]:
        """Parts of D's loss, scalars; each has its backward pass before the next is computed."""

    def finish_step_(self, D: nn.Module, stats: StatsCollector) -> None:  # noqa: B027 - most have nothing to do
        """What follows D's optimizer step."""


class ProjectedGANLoss(AdversarialLoss):
    """Losses of G and D for one micro-batch. Holds configuration only; the networks are passed in."""

    def __init__(self, config: TrainConfig, guidance: GuidanceClassifier | None = None) -> None:
        if config.objective not in san.OBJECTIVES:
            raise ConfigError(f"objective {config.objective!r} is not one of {', '.join(san.OBJECTIVES)}")
        self.terms = config.loss_terms
        self.objective = san.OBJECTIVES[config.objective]
        if config.loss == "san" and self.objective.potential is None:
            raise ConfigError(
                f"objective {config.objective!r} has no SAN form, as its generator loss is not monotone; "
                "use soft_least_squares, or --loss gan"
            )
        self.real_term, self.fake_term = san.gan_real_loss, san.gan_fake_loss
        if config.loss == "san":
            weights = {"normalize_weights": config.normalizes_san_weights}
            self.real_term = functools.partial(san.san_real_loss, **weights)
            self.fake_term = functools.partial(san.san_fake_loss, **weights)
        self.guidance, self.recomputes = guidance, config.checkpoint_activations
        self.policy = parse_policy(config.discriminator.augment_policy)

    def run_discriminator(
        self, D: nn.Module, images: Tensor, labels: Tensor | None, cur_nimg: int, draws: Draws
    ) -> dict[str, san.SANLogits]:
        """Logits per backbone, (N, K) each, of images blurred as far as training at `cur_nimg` images asks.

        draws: for the augmentation of this pass; passes of one step have different scopes.
        """
        sigma = blur_sigma(cur_nimg, self.terms.blur_init_sigma_px, self.terms.blur_fade_kimg)
        return D(blur(images, sigma), labels, DiffAugment(self.policy, draws) if self.policy else None)

    def generator_loss(
        self, D: nn.Module, fake_images: Tensor, batch: Batch, cur_nimg: int, stats: StatsCollector
    ) -> Tensor:
        """Adversarial loss of G summed over backbones, plus classifier guidance. Scalar."""
        labels = batch.fake_labels
        logits = self.run_discriminator(D, fake_images, labels, cur_nimg, batch.draws.within("fake"))
        loss = sum(san.generator_loss(self.objective, backbone) for backbone in logits.values())
        report_logits(stats, "fake", logits)
        if self.guidance is not None:
            classes = recompute(self.guidance, fake_images) if self.recomputes else self.guidance(fake_images)
            guidance_loss = F.cross_entropy(classes, labels)
            loss = loss + self.terms.cls_weight / PAPER_MICROBATCH_SIZE * guidance_loss
            stats.report("Loss/G/guidance_loss", guidance_loss)
        stats.report("Loss/G/loss", loss)
        return loss

    def discriminator_losses(
        self, D: nn.Module, fake_images: Tensor, batch: Batch, cur_nimg: int, stats: StatsCollector
    ) -> Iterator[Tensor]:
        """Generated and real images apart: heads normalise by batches, and must not see both as one."""
        yield self.fake_loss(D, fake_images, batch, cur_nimg, stats)
        yield self.real_loss(D, batch, cur_nimg, stats)

    def fake_loss(
        self, D: nn.Module, fake_images: Tensor, batch: Batch, cur_nimg: int, stats: StatsCollector
    ) -> Tensor:
        """Discriminator loss of images generated for `batch`, summed over backbones. Scalar."""
        draws = batch.draws.within("fake")
        with self.listen("fake"):
            logits = self.run_discriminator(D, fake_images, batch.fake_labels, cur_nimg, draws)
        report_logits(stats, "fake", logits)
        return sum(self.fake_term(self.objective, backbone) for backbone in logits.values())

    def real_loss(self, D: nn.Module, batch: Batch, cur_nimg: int, stats: StatsCollector) -> Tensor:
        """Discriminator loss of the real images, summed over backbones. Scalar."""
        draws = batch.draws.within("real")
        with self.listen("real"):
            logits = self.run_discriminator(D, batch.images, batch.labels, cur_nimg, draws)
        report_logits(stats, "real", logits)
        return sum(self.real_term(self.objective, backbone) for backbone in logits.values())


def report_logits(stats: StatsCollector, kind: str, logits: dict[str, san.SANLogits]) -> None:
    """Log values and signs of all logits, under StyleGAN's names."""
    for backbone in logits.values():
        stats.report(f"Loss/scores/{kind}", backbone.fun)
        stats.report(f"Loss/signs/{kind}", backbone.fun.detach().sign())


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor, keeps_graph: bool) -> Tensor:
    """How far images move when styles do (StyleGAN2, arXiv:1912.04958, Eq. 4): a length per image, (N,).

    images: (N, C, H, W) made from ws (N, num_ws, w_dim), both in one graph; noise: images' shape, N(0, 1) / sqrt(H W).
    keeps_graph: whether the lengths will be differentiated.
    """
    (gradients,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=keeps_graph)
    return gradients.square().sum(dim=2).mean(dim=1).sqrt()


def path_length_penalty(lengths: Tensor, batch_mean: Tensor, pl_mean: Tensor, decay: float) -> Tensor:
    """Squared deviation of path lengths (N,) from their running mean, moved a step (N,).

    batch_mean: mean length of the whole batch, of which these lengths are a part, without a graph; pl_mean: the
    running mean before the step. The penalty compares with the mean *after* it, through which it also sends
    gradients: docs/fidelity.md#path-length. These are written down, since not all lengths are in this graph.
    """
    mean = pl_mean.lerp(batch_mean, decay)
    zeros = lengths - lengths.detach()  # that have a gradient
    return (lengths - mean).square() - 2 * decay * (batch_mean - mean) * zeros


class GuidanceClassifier(nn.Module):
    """Frozen ImageNet classifier of StyleGAN-XL's guidance term: images (N, 3, H, W) in [-1, 1] to (N, 1000) logits.

    Only meaningful when the training labels are the 1,000 ImageNet classes in the order of their wnids.
    """

    NAME = "deit_small_distilled_patch16_224"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    @classmethod
    def pretrained(cls) -> GuidanceClassifier:
        """The paper's classifier with its ImageNet weights. Raises UserError when they cannot be had."""
        import timm

        return cls(create_pretrained(cls.NAME, timm.create_model))

    @classmethod
    def random(cls) -> GuidanceClassifier:
        """The same network without its weights: to count what it needs."""
        import timm

        return cls(timm.create_model(cls.NAME, pretrained=False))

    def forward(self, images: Tensor) -> Tensor:
        normalized = ((images + 1) / 2 - self.mean) / self.std
        return self.model(F.interpolate(normalized, size=224, mode="bilinear", align_corners=False))
