# SPDX-License-Identifier: MIT
"""Named recipes. Each docstring: the command, the hardware and time it needs, and what to expect.

A preset is a complete TrainConfig for a nominal data set; `cli.py` replaces what the flags and the actual data say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from training.config import (
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    MappingConfig,
    OptimizerConfig,
    SynthesisConfig,
    TrainConfig,
)

GENERATOR_LR, DISCRIMINATOR_LR = 0.0025, 0.002  # before the correction for lazy regularisation


def stylegan3_generator(
    kind: Literal["stylegan3-t", "stylegan3-r"], img_resolution: int, c_dim: int, batch_size: int
) -> GeneratorConfig:
    """StyleGAN-XL's generator: `-t` has 3x3 kernels, `-r` 1x1 kernels, radial filters and twice the channels."""
    is_r = kind == "stylegan3-r"
    return GeneratorConfig(
        mapping=MappingConfig(c_dim=c_dim),
        synthesis=SynthesisConfig(
            img_resolution=img_resolution,
            channel_base=131072 if is_r else 65536,
            channel_max=2048 if is_r else 1024,
            conv_kernel=1 if is_r else 3,
            use_radial_filters=is_r,
            magnitude_ema_beta=0.5 ** (batch_size / 20000),
        ),
    )


def stylegan_xl(
    kind: Literal["stylegan3-t", "stylegan3-r"] = "stylegan3-t",
    data: str = "",
    img_resolution: int = 16,
    c_dim: int = 0,
    batch_size: int = 256,
    microbatch_size: int = 8,
) -> TrainConfig:
    """StyleGAN-XL's defaults for one stem; what `--cfg` starts from.

    python train.py --loss san --cfg stylegan3-t --data my.zip --batch 256 --batch-gpu 8
    """
    return TrainConfig(
        data=DataConfig(path=data, use_labels=c_dim > 0),
        generator=stylegan3_generator(kind, img_resolution, c_dim, batch_size),
        discriminator=DiscriminatorConfig(
            img_resolution=img_resolution,
            c_dim=c_dim,
            feature_resolution=224 if img_resolution < 224 else None,
        ),
        generator_optimizer=OptimizerConfig(lr=GENERATOR_LR, reg_interval=4),
        discriminator_optimizer=OptimizerConfig(lr=DISCRIMINATOR_LR, reg_interval=16),
        embedding_source="data",
        batch_size=batch_size,
        microbatch_size=microbatch_size,
        ema_halflife_kimg=batch_size * 10 / 32,
        metrics=("fd_lite0",),
    )


def _paper_stem(kind: Literal["stylegan3-t", "stylegan3-r"], c_dim: int) -> TrainConfig:
    """A 16x16 stem as StyleSAN-XL's authors train it, quirks included."""
    base = stylegan_xl(kind, c_dim=c_dim, batch_size=2048)
    return replace(
        base,
        data=replace(base.data, mirror=True),
        generator=replace(base.generator, synthesis=replace(base.generator.synthesis, num_layers=6)),
        discriminator=replace(base.discriminator, official_batchnorm_statistics=True),
        total_kimg=300000,
        snapshot_ticks=10,
    )


def cifar10_16() -> TrainConfig:
    """CIFAR10 stem at 16x16, the first stage of StyleSAN-XL's CIFAR10 model.

    python train.py --loss san --preset cifar10-16 --data cifar10_16.zip
    Published on 8 GPUs with 300,000 kimg (hardware and hours not reported). We have not run it to the end.
    """
    return _paper_stem("stylegan3-r", c_dim=10)


def ffhq_16() -> TrainConfig:
    """FFHQ stem at 16x16, the first stage of StyleSAN-XL's FFHQ models.

    python train.py --loss san --preset ffhq-16 --data ffhq_16.zip
    Published on 8 GPUs with 300,000 kimg (hardware and hours not reported). We have not run it to the end.
    """
    return _paper_stem("stylegan3-r", c_dim=0)


def quickstart() -> TrainConfig:
    """Class-conditional SAN on scikit-learn's digits, sized for two CPU cores and ten minutes.

    python train.py --loss san --preset quickstart
    Two CPU cores, some six minutes; one core, eight. What it reaches, and how that was measured: README.md.

    What makes it learn so fast, and varied images. Every network works at a small size: features of 32x32 images,
    layers that start at one cycle per image. G's learning rate is 4 times D's, because its normalised weights of
    size 1 move relatively slower. Heads sit on the two finest feature levels only, but are nonlinear: linear ones match
    class means. Augmentation leaves out translation: it hides from D where strokes are, and G then makes
    each class nearly one image. The blur lasts half of the run.
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
        generator_optimizer=OptimizerConfig(lr=0.004),
        discriminator_optimizer=OptimizerConfig(lr=0.001),
        embedding_source="data",
        batch_size=32,
        microbatch_size=32,
        total_kimg=40,
        tick_kimg=2,
        snapshot_ticks=10,
        metrics=("fd_lite0",),
        evaluate_at_start=True,
        ema_halflife_kimg=1.0,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "quickstart": quickstart,
    "cifar10-16": cifar10_16,
    "ffhq-16": ffhq_16,
}
