# SPDX-License-Identifier: MIT
"""Recipes for the built-in digits, sized for two CPU cores: everything comes with the installed packages."""

from __future__ import annotations

from dataclasses import replace

from training.config import (
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    MappingConfig,
    OptimizerConfig,
    SuperresConfig,
    SynthesisConfig,
    TrainConfig,
)
from training.presets.base import add_stage


def quickstart() -> TrainConfig:
    """Class-conditional SAN on scikit-learn's digits, sized for two CPU cores and ten minutes.

    python train.py --loss san --preset quickstart
    Two CPU cores, three minutes. What it reaches, and how that was measured: README.md.

    What makes it learn so fast, and varied images. Every network works at a small size: features of 32x32 images,
    layers that start at one cycle per image. Heads sit on the two finest feature levels only, but are nonlinear: linear
    ones match class means. Augmentation leaves out translation: it hides from D where strokes are, and G then makes
    each class nearly one image. G's learning rate is 4 times D's: the right class comes sooner. Images of a class grow
    alike with time, so the run ends early. For a longer run take batches of 32 and 0.002 for both: slower, and more
    varied. An image costs a quarter less in batches of 64 than of 32; the rates are 0.004 and 0.001 times sqrt(2).
    """
    return TrainConfig(
        data=DataConfig(path="digits", use_labels=True, num_workers=0),
        generator=GeneratorConfig(
            mapping=MappingConfig(z_dim=16, w_dim=128, c_dim=10, num_embeddings=10),
            synthesis=SynthesisConfig(
                img_resolution=16,
                channel_base=1024,
                channel_max=32,
                num_layers=5,
                first_cutoff=1.0,
                first_stopband=1.9,
                margin_size=2,
                conv_clamp=None,
                num_fp16_res=0,
            ),
        ),
        discriminator=DiscriminatorConfig(
            img_resolution=16,
            c_dim=10,
            backbones=("tf_efficientnet_lite0",),
            feature_resolution=32,
            nominal_resolution=32,
            projected_channels=32,
            num_levels=2,
            head_resolution=4,
            max_head_channels=128,
            num_class_embeddings=10,
            augment_policy="color,cutout",
        ),
        loss_terms=LossConfig(blur_init_sigma_px=2.0, blur_fade_kimg=20.0, pl_weight=0.0),
        generator_optimizer=OptimizerConfig(lr=0.0056),
        discriminator_optimizer=OptimizerConfig(lr=0.0014),
        embedding_source="data",
        batch_size=64,
        microbatch_size=64,
        total_kimg=40,
        tick_kimg=2,
        snapshot_ticks=10,
        metrics=("fd_lite0",),
        evaluate_at_start=True,
        ema_halflife_kimg=1.0,
    )


def digits_8() -> TrainConfig:
    """Digits at 8x8, as they were scanned: the stem of a two-stage ladder that anybody can walk.

    python train.py --loss san --preset digits-8
    Some five minutes on one CPU core: recognisable digits of the class asked for. `--ladder digits` trains both stages.
    """
    base = quickstart()
    synthesis = replace(base.generator.synthesis, img_resolution=8)
    return replace(
        base,
        data=replace(base.data, path="digits8"),
        generator=replace(base.generator, synthesis=synthesis),
        discriminator=replace(base.discriminator, img_resolution=8),
        loss_terms=replace(base.loss_terms, blur_init_sigma_px=1.0, blur_fade_kimg=12.0),
        generator_optimizer=OptimizerConfig(lr=0.004),
        discriminator_optimizer=OptimizerConfig(lr=0.001),
        batch_size=32,
        microbatch_size=32,
        total_kimg=24,
        snapshot_ticks=3,
    )


def digits_16() -> TrainConfig:
    """Digits at 16x16: a super-resolution stage on `digits-8`.

    python train.py --loss san --preset digits-16 --path_stem runs/digits/digits-8/best_model.safetensors
    Some five minutes on one CPU core: the digits of `digits-8`, sharper. Its stem, Fourier features included, stays.
    """
    below = digits_8()
    head = SuperresConfig(up_factor=2, head_layers=4, conv_kernel=3, conv_clamp=None)
    config = add_stage(below, head)
    return replace(
        config,
        data=replace(below.data, path="digits"),
        loss_terms=replace(below.loss_terms, blur_fade_kimg=8.0),
        embedding_source="stem",
    )
