# SPDX-License-Identifier: MIT
"""From images to scalars for `--cfg dcgan`: objective, gradient penalty, curriculum, InfoGAN's codes, BEGAN.

Same interface as `ProjectedGANLoss`. All terms are means over samples. Which of them a run has is in its configuration;
`presets/dcgan.py` fills it in per objective.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import san
from san.diagnostics import Recording
from san.layers import SANLayer
from torch_utils.distributed import mean_over_processes
from torch_utils.stats import StatsCollector
from training.augment import DiffAugment, blur, blur_sigma, parse_policy
from training.batch import Batch
from training.began import convergence_measure, next_k
from training.config import ConfigError, TrainConfig
from training.curriculum import curriculum_weights
from training.dcgan_config import AutoencoderConfig
from training.discriminator.dcgan import CodeLogits
from training.draws import Draws
from training.generator.dcgan import latent_inputs
from training.infogan import categorical_information, continuous_information
from training.loss import AdversarialLoss, report_logits
from training.penalties import (
    image_gradients,
    interpolate,
    perturb,
    unit_norm_penalty,
    zero_norm_penalty,
)

OBJECTIVES = {**san.OBJECTIVES, **san.PAIRED_OBJECTIVES}


def make_dcgan_loss(config: TrainConfig) -> AdversarialLoss:
    """The loss of a run with the small networks. Raises ConfigError for an objective that does not fit them."""
    is_autoencoder = isinstance(config.discriminator, AutoencoderConfig)
    return BEGANLoss(config) if is_autoencoder else DCGANLoss(config)


class DCGANLoss(AdversarialLoss):
    """Losses of G and D for one micro-batch. Holds configuration only; the networks are passed in."""

    def __init__(self, config: TrainConfig) -> None:
        if config.objective not in OBJECTIVES:
            raise ConfigError(f"objective {config.objective!r} is not one of {', '.join(OBJECTIVES)}")
        self.objective = OBJECTIVES[config.objective]
        if config.loss == "san" and self.objective.potential is None:
            raise ConfigError(
                f"objective {config.objective!r} has no SAN form, as its generator loss is not monotone; "
                "use soft_least_squares, or --loss gan"
            )
        self.config, self.terms, self.critic = config, config.loss_terms, config.critic
        self.discriminator_term = san.gan_discriminator_loss
        if config.loss == "san":
            self.discriminator_term = functools.partial(
                san.san_discriminator_loss, normalize_weights=config.normalizes_san_weights
            )
        self.has_codes = config.generator.num_categories + config.generator.num_continuous > 0
        self.policy = parse_policy(config.discriminator.augment_policy)

    def generator_loss(
        self, D: nn.Module, fake_images: Tensor, batch: Batch, cur_nimg: int, stats: StatsCollector
    ) -> Tensor:
        """Loss of G: by the curriculum's weights over critics, minus InfoGAN's information. Scalar."""
        fake, codes = self.judge(D, fake_images, batch.fake_labels, cur_nimg, batch.draws.within("fake"))
        real: dict[str, san.SANLogits] = {}
        if self.objective.is_paired:
            with torch.no_grad():
                real, _ = self.judge(D, batch.images, batch.labels, cur_nimg, batch.draws.within("real"))
        weights = curriculum_weights(cur_nimg, self.critic.curriculum_kimg, len(fake))
        loss = sum(
            weight * san.generator_loss(self.objective, logits, real.get(name))
            for weight, (name, logits) in zip(weights, fake.items(), strict=True)
            if weight > 0
        )
        report_logits(stats, "fake", fake)
        if len(weights) > 1:
            for name, weight in zip(fake, weights, strict=True):
                stats.report(f"Curriculum/{name}", weight)
        if codes is not None:
            loss = loss - self.information(codes, batch.z, stats)
        stats.report("Loss/G/loss", loss)
        return loss

    def discriminator_losses(
        self, D: nn.Module, fake_images: Tensor, batch: Batch, cur_nimg: int, stats: StatsCollector
    ) -> Iterator[Tensor]:
        """One loss, summed over critics: each has its own optimum, whatever G's weight on it. Scalar."""
        draws = batch.draws
        with self.listen("fake") as recording:
            fake, codes = self.judge(
                D, fake_images, batch.fake_labels, cur_nimg, draws.within("fake"), recording
            )
        with self.listen("real") as recording:
            real, _ = self.judge(D, batch.images, batch.labels, cur_nimg, draws.within("real"), recording)
        report_logits(stats, "fake", fake)
        report_logits(stats, "real", real)
        loss = sum(self.discriminator_term(self.objective, real[name], fake[name]) for name in real)
        if codes is not None:
            loss = loss - self.information(codes, batch.z, stats)
        if self.critic.penalty != "none":
            penalty = self.penalty(D, fake_images, batch, cur_nimg)
            stats.report("Loss/D/penalty", penalty)
            loss = loss + self.critic.penalty_weight * penalty.mean()
        yield loss

    def finish_step_(self, D: nn.Module, stats: StatsCollector) -> None:
        """WGAN's weight clipping."""
        if self.critic.weight_clip > 0:
            clip_weights_(D, self.critic.weight_clip)

    def judge(
        self,
        D: nn.Module,
        images: Tensor,
        labels: Tensor | None,
        cur_nimg: int,
        draws: Draws,
        recording: Recording | None = None,
    ) -> tuple[dict[str, san.SANLogits], CodeLogits | None]:
        """Logits per critic, (N, 1) each, and what the Q head says, if there is one.

        draws: for the augmentation of this pass; passes of one step have different scopes.
        """
        sigma = blur_sigma(cur_nimg, self.terms.blur_init_sigma_px, self.terms.blur_fade_kimg)
        images = blur(images, sigma)
        augment = DiffAugment(self.policy, draws) if self.policy else None
        if not self.has_codes:
            return D(images, labels, augment), None
        logits, codes = D.forward_with_codes(images, labels, augment)
        if recording is not None:
            recording.note_run(images, logits)  # a recording hears D's forward only
        return logits, codes

    def penalty(self, D: nn.Module, fake_images: Tensor, batch: Batch, cur_nimg: int) -> Tensor:
        """Gradient penalty of each sample, (N,), summed over critics. Sample i of both kinds has the same class."""
        real_images, labels, draws = batch.images, batch.labels, batch.draws.within("penalty")
        u = draws.uniform("place")
        if self.critic.penalty == "wgan_gp":
            places = [(interpolate(real_images, fake_images, u), labels)]
        elif self.critic.penalty == "dragan":
            noise = draws.uniform("noise", *real_images.shape[1:])
            places = [(perturb(real_images, noise, u), labels)]
        else:
            places = [(real_images, labels), (fake_images, batch.fake_labels)]
        measure = zero_norm_penalty if self.critic.penalty == "r1_r2" else unit_norm_penalty
        total = torch.zeros_like(u)
        for i, (images, classes) in enumerate(places):
            points = images.detach().clone().requires_grad_(True)
            logits, _ = self.judge(D, points, classes, cur_nimg, draws.within(str(i)))
            for view in logits.values():
                total = total + measure(image_gradients(view.fun, points))
        return total

    def information(self, codes: CodeLogits, z: Tensor, stats: StatsCollector) -> Tensor:
        """InfoGAN's weighted bound on the mutual information, mean over samples, in nats. Scalar."""
        cfg = self.config.generator
        sizes = [cfg.num_categories, cfg.num_continuous]
        categorical, continuous = latent_inputs(z, cfg)[:, cfg.z_dim - sum(sizes) :].split(sizes, dim=1)
        total = z.new_zeros(())
        if cfg.num_categories:
            information = categorical_information(categorical, codes.categorical)
            stats.report("InfoGAN/categorical", information)
            total = total + self.critic.categorical_weight * information.mean()
        if cfg.num_continuous:
            information = continuous_information(continuous, codes.mean, codes.log_std)
            stats.report("InfoGAN/continuous", information)
            total = total + self.critic.continuous_weight * information.mean()
        return total


class BEGANLoss(AdversarialLoss):
    """BEGAN: D is an autoencoder, its logits are errors, and their balance k is in D's buffer."""

    def __init__(self, config: TrainConfig) -> None:
        if config.loss == "san":
            raise ConfigError(
                "objective 'began' has no SAN form: its discriminator is an autoencoder, without a last linear layer "
                "that could have a direction; use --loss gan"
            )
        self.terms, self.critic = config.loss_terms, config.critic
        self.policy = parse_policy(config.discriminator.augment_policy)
        self.step_errors: list[tuple[Tensor, Tensor]] = []  # mean errors of the step's micro-batches so far

    def generator_loss(
        self, D: nn.Module, fake_images: Tensor, batch: Batch, cur_nimg: int, stats: StatsCollector
    ) -> Tensor:
        """Mean reconstruction error of generated images. Scalar."""
        loss = self.errors(D, fake_images, cur_nimg, "fake", batch.draws, stats)
        stats.report("Loss/G/loss", loss)
        return loss

    def discriminator_losses(
        self, D: nn.Module, fake_images: Tensor, batch: Batch, cur_nimg: int, stats: StatsCollector
    ) -> Iterator[Tensor]:
        """L(x) - k L(G(z)). Scalar."""
        fake = self.errors(D, fake_images, cur_nimg, "fake", batch.draws, stats)
        real = self.errors(D, batch.images, cur_nimg, "real", batch.draws, stats)
        self.step_errors.append((real.detach(), fake.detach()))
        yield real - D.k * fake

    def finish_step_(self, D: nn.Module, stats: StatsCollector) -> None:
        """Move k by the errors of the whole step, all processes together."""
        errors = torch.stack([torch.stack(pair) for pair in self.step_errors])  # (micro-batches, 2)
        real, fake = mean_over_processes(errors.mean(dim=0)).unbind()
        self.step_errors.clear()
        k = next_k(D.k, real, fake, self.critic.began_gamma, self.critic.began_k_lr)
        D.k.copy_(torch.where(k.isfinite(), k, D.k))  # as a step whose gradients are not finite is skipped
        stats.report("BEGAN/k", D.k)
        stats.report("BEGAN/measure", convergence_measure(real, fake, self.critic.began_gamma))

    def errors(
        self, D: nn.Module, images: Tensor, cur_nimg: int, kind: str, draws: Draws, stats: StatsCollector
    ) -> Tensor:
        """Mean reconstruction error, in units of the images' [-1, 1]. Scalar."""
        sigma = blur_sigma(cur_nimg, self.terms.blur_init_sigma_px, self.terms.blur_fade_kimg)
        augment = DiffAugment(self.policy, draws.within(kind)) if self.policy else None
        logits = D(blur(images, sigma), None, augment)
        report_logits(stats, kind, logits)
        return logits["autoencoder"].fun.mean()


@torch.no_grad()
def clip_weights_(D: nn.Module, bound: float) -> None:
    """WGAN's constraint (arXiv:1701.07875): every parameter of D into [-bound, bound], in place.

    SAN directions stay on the unit sphere. Their scale is bounded instead, by the length that n clipped entries can
    have at most: bound * sqrt(n).
    """
    san_layers = [m for m in D.modules() if isinstance(m, SANLayer)]
    for layer in san_layers:
        longest = bound * layer.weight[0].numel() ** 0.5
        layer.scale.clamp_(-longest, longest)
    own = {id(p) for layer in san_layers for p in (layer.weight, layer.scale)}
    for parameter in D.parameters():
        if id(parameter) not in own:
            parameter.clamp_(-bound, bound)
