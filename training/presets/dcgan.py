# SPDX-License-Identifier: MIT
"""The objectives that people know GANs by, on small networks: what `--cfg dcgan --objective NAME` starts from.

python train.py --cfg dcgan --objective NAME --data digits [--cond 1] [--loss gan]
Each function below is one NAME, with its paper's numbers where the paper gives them. On digits one CPU core takes a few
minutes for recognisable ones; tests/benchmarks/san_evidence.py measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from training.config import CriticConfig, DataConfig, LossConfig, OptimizerConfig, TrainConfig
from training.dcgan_config import AutoencoderConfig, DCGANDiscriminatorConfig, DCGANGeneratorConfig
from training.presets.base import EMA_KIMG_PER_BATCH

BATCH_SIZE = 128
NOMINAL_RESOLUTION = 16  # until the data are known
DCGAN_ADAM = OptimizerConfig(lr=0.0002, betas=(0.5, 0.999))


def dcgan(objective: str = "nonsaturating", data: str = "") -> TrainConfig:
    """Networks, optimizers and terms of an objective in RECIPES; DCGAN's own are those of "nonsaturating"."""
    base = TrainConfig(
        objective=objective,
        normalizes_san_weights=True,  # measured: docs/evidence.md
        data=DataConfig(path=data),
        generator=DCGANGeneratorConfig(img_resolution=NOMINAL_RESOLUTION),
        discriminator=DCGANDiscriminatorConfig(img_resolution=NOMINAL_RESOLUTION),
        loss_terms=LossConfig(blur_fade_kimg=0.0, pl_weight=0.0),
        generator_optimizer=DCGAN_ADAM,
        discriminator_optimizer=DCGAN_ADAM,
        batch_size=BATCH_SIZE,
        microbatch_size=BATCH_SIZE,
        total_kimg=1000,
        tick_kimg=10,
        snapshot_ticks=20,
        metrics=("fd_lite0",),
        ema_halflife_kimg=BATCH_SIZE * EMA_KIMG_PER_BATCH,
    )
    return RECIPES[objective](base)


def elementwise(base: TrainConfig) -> TrainConfig:
    """saturating (minimax, arXiv:1406.2661), nonsaturating (DCGAN, arXiv:1511.06434), hinge, soft_least_squares.

    They differ in the loss alone, and so compare on equal terms. With --cond 1: conditional GAN (arXiv:1411.1784).
    """
    return base


def least_squares(base: TrainConfig) -> TrainConfig:
    """LSGAN (arXiv:1611.04076), targets 0 and 1. Its generator loss turns round at the target: no SAN form."""
    return replace(base, loss="gan")


def wgan(base: TrainConfig) -> TrainConfig:
    """Wasserstein GAN (arXiv:1701.07875): weights clipped to 0.01, RMSProp, five steps of D per step of G."""
    rmsprop = OptimizerConfig(kind="rmsprop", lr=0.00005)
    return replace(
        _with_batch_size(base, 64),
        objective="wasserstein",
        critic=CriticConfig(num_steps=5, weight_clip=0.01),
        generator_optimizer=rmsprop,
        discriminator_optimizer=rmsprop,
    )


def wgan_gp(base: TrainConfig) -> TrainConfig:
    """WGAN with gradient penalty (arXiv:1704.00028): lambda 10, five steps of D per step of G, no BatchNorm in D."""
    adam = OptimizerConfig(lr=0.0001, betas=(0.5, 0.9))
    return replace(
        _with_batch_size(base, 64),
        objective="wasserstein",
        discriminator=replace(base.discriminator, has_batchnorm=False),
        critic=CriticConfig(num_steps=5, penalty="wgan_gp", penalty_weight=10.0),
        generator_optimizer=adam,
        discriminator_optimizer=adam,
    )


def curriculum(base: TrainConfig) -> TrainConfig:
    """WGAN-GP with a curriculum of three critics of growing strength (arXiv:1807.09295).

    G listens to a convex combination of them, whose weight moves to the strongest in the first half of the run.
    """
    config = wgan_gp(base)
    return replace(
        config,
        discriminator=replace(config.discriminator, channel_bases=(16, 32, 64)),
        critic=replace(config.critic, curriculum_kimg=base.total_kimg / 2),
    )


def dragan(base: TrainConfig) -> TrainConfig:
    """DRAGAN (arXiv:1705.07215): non-saturating, gradients of norm 1 around the data, lambda 10; no BatchNorm in D."""
    adam = OptimizerConfig(lr=0.0001, betas=(0.5, 0.9))
    return replace(
        base,
        objective="nonsaturating",
        discriminator=replace(base.discriminator, has_batchnorm=False),
        critic=CriticConfig(penalty="dragan", penalty_weight=10.0),
        generator_optimizer=adam,
        discriminator_optimizer=adam,
    )


def infogan(base: TrainConfig) -> TrainConfig:
    """InfoGAN (arXiv:1606.03657): 62 noise variables, a ten-way code and two U(-1, 1) codes, which a Q head reads."""
    codes = {"num_categories": 10, "num_continuous": 2}
    return replace(
        base,
        objective="nonsaturating",
        generator=replace(base.generator, z_dim=74, latent="uniform", **codes),
        discriminator=replace(base.discriminator, **codes),
        critic=CriticConfig(categorical_weight=1.0, continuous_weight=0.1),
        generator_optimizer=OptimizerConfig(lr=0.001, betas=(0.5, 0.999)),
    )


def began(base: TrainConfig) -> TrainConfig:
    """BEGAN (arXiv:1703.10717): D is an autoencoder, in an equilibrium with gamma 0.5. No SAN form; unconditional."""
    adam = OptimizerConfig(lr=0.0001, betas=(0.5, 0.999))
    return replace(
        _with_batch_size(base, 16),
        loss="gan",
        objective="began",
        generator=replace(base.generator, z_dim=64, latent="uniform", has_batchnorm=False),
        discriminator=AutoencoderConfig(img_resolution=NOMINAL_RESOLUTION),
        critic=CriticConfig(began_gamma=0.5, began_k_lr=0.001),
        generator_optimizer=adam,
        discriminator_optimizer=adam,
    )


def relativistic(base: TrainConfig) -> TrainConfig:
    """Relativistic pairing (arXiv:1807.00734) with R1 and R2, as R3GAN (arXiv:2501.05441); no BatchNorm in D."""
    adam = OptimizerConfig(lr=0.0002, betas=(0.0, 0.99))
    return replace(
        base,
        objective="relativistic",
        discriminator=replace(base.discriminator, has_batchnorm=False),
        critic=CriticConfig(penalty="r1_r2", penalty_weight=0.5),
        generator_optimizer=adam,
        discriminator_optimizer=adam,
    )


RECIPES: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "saturating": elementwise,
    "nonsaturating": elementwise,
    "hinge": elementwise,
    "soft_least_squares": elementwise,
    "least_squares": least_squares,
    "wgan": wgan,
    "wgan_gp": wgan_gp,
    "curriculum": curriculum,
    "dragan": dragan,
    "infogan": infogan,
    "began": began,
    "relativistic": relativistic,
}


def _with_batch_size(config: TrainConfig, batch_size: int) -> TrainConfig:
    return replace(
        config,
        batch_size=batch_size,
        microbatch_size=batch_size,
        ema_halflife_kimg=batch_size * EMA_KIMG_PER_BATCH,
    )
