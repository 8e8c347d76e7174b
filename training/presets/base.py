# SPDX-License-Identifier: MIT
"""What recipes are made of: StyleGAN-XL's defaults for a stem, the authors' own settings, and stages on top.

A preset is a complete TrainConfig for a nominal data set; `cli.py` replaces what the flags and the actual data say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from training.config import (
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    MappingConfig,
    OptimizerConfig,
    SuperresConfig,
    SynthesisConfig,
    TrainConfig,
)

Kind = Literal["stylegan3-t", "stylegan3-r"]

GENERATOR_LR, DISCRIMINATOR_LR = 0.0025, 0.002  # before the correction for lazy regularisation
EMA_KIMG_PER_BATCH = 10 / 32  # half-life of G_ema, thousands of images per image of the batch


def stylegan3_generator(kind: Kind, img_resolution: int, c_dim: int, batch_size: int) -> GeneratorConfig:
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
    kind: Kind = "stylegan3-t",
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
        ema_halflife_kimg=batch_size * EMA_KIMG_PER_BATCH,
        metrics=("fid50k_full",),
    )


def paper_stem(
    kind: Kind, c_dim: int, num_layers: int, batch_size: int, total_kimg: float = 25000
) -> TrainConfig:
    """A 16x16 stem as the papers' authors train it: mirrored data, snapshots, official quirks included.

    total_kimg: 25,000 is what their command line takes where none is given.
    """
    base = stylegan_xl(kind, c_dim=c_dim, batch_size=batch_size)
    return replace(
        base,
        data=replace(base.data, mirror=True),
        generator=replace(base.generator, synthesis=replace(base.generator.synthesis, num_layers=num_layers)),
        discriminator=replace(base.discriminator, official_batchnorm_statistics=True),
        total_kimg=total_kimg,
        snapshot_ticks=10,
    )


def paper_stage(
    below: TrainConfig,
    kind: Kind,
    head_layers: int,
    batch_size: int,
    total_kimg: float = 25000,
    cls_weight: float = 0.0,
) -> TrainConfig:
    """A stage that doubles the resolution of `below`, as the papers' authors train it.

    Without path length; the stem's Fourier features train along, which the official code leaves on.
    """
    is_r = kind == "stylegan3-r"
    head = SuperresConfig(
        up_factor=2, head_layers=head_layers, conv_kernel=1 if is_r else 3, use_radial_filters=is_r
    )
    config = add_stage(below, head)
    return replace(
        config,
        loss_terms=replace(config.loss_terms, pl_weight=0.0, cls_weight=cls_weight),
        batch_size=batch_size,
        ema_halflife_kimg=batch_size * EMA_KIMG_PER_BATCH,
        total_kimg=total_kimg,
        trains_stem_input=True,
        embedding_source="stem",
    )


def add_stage(below: TrainConfig, head: SuperresConfig) -> TrainConfig:
    """`below` with another super-resolution stage on its generator, and a discriminator for the larger images."""
    generator = replace(below.generator, superres=(*below.generator.superres, head))
    resolution, features = generator.img_resolution, below.discriminator.feature_resolution
    if features is not None and resolution >= features:
        features = None  # the paper resizes only what is smaller
    discriminator = replace(below.discriminator, img_resolution=resolution, feature_resolution=features)
    return replace(below, generator=generator, discriminator=discriminator)
