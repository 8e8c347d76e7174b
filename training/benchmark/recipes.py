# SPDX-License-Identifier: MIT
"""Which networks are measured: the presets' own, at their full width, narrower, or tiny."""

from __future__ import annotations

from dataclasses import replace

from training.config import TrainConfig
from training.generator.network_plan import plan_network
from training.presets import PRESETS

DEFAULT_RECIPES = ("cifar10-16", "imagenet-256")  # a stem and a super-resolution stage that were published
HOST_BATCHES = {"imagenet-256": 2}  # of it the naive form keeps 5 GiB per image
HOST_BATCH, GPU_BATCH, QUICK_BATCH = 4, 8, 4  # images in one pass where nothing else is said
HOST_WIDTHS = {"imagenet-256": 0.125}  # on CPUs; what is not here is measured at full width
STEADY_NIMG = 2_000_000  # the stretch of a run that is measured: no blur any more, path length has begun


def default_batch(name: str, device_type: str, is_tiny: bool) -> int:
    """Images in one pass of the preset `name`."""
    if is_tiny:
        return QUICK_BATCH
    return HOST_BATCHES.get(name, HOST_BATCH) if device_type == "cpu" else GPU_BATCH


def benchmark_config(name: str, batch_size: int, width: float = 1.0, is_tiny: bool = False) -> TrainConfig:
    """The preset `name` for batches of `batch_size` in one pass. width: factor on G's channels.

    is_tiny: networks that take milliseconds, with every kind of layer of the recipe. Raises ConfigError for a width
    that leaves a layer without channels.
    """
    config = shrink(PRESETS[name]()) if is_tiny else PRESETS[name]()
    synthesis = config.generator.synthesis
    narrow = replace(
        synthesis,
        channel_base=max(round(synthesis.channel_base * width), 1),
        channel_max=max(round(synthesis.channel_max * width), 1),
    )
    generator = replace(config.generator, synthesis=narrow)
    plan_network(generator)  # refuses what gives no network
    return replace(
        config,
        generator=generator,
        batch_size=batch_size,
        microbatch_size=batch_size,
    )


def shrink(config: TrainConfig) -> TrainConfig:
    """A recipe's tiny likeness: 16x16 images, 32x32 with a stage on top; Lite0 with two heads; ten classes at most."""
    generator, discriminator = config.generator, config.discriminator
    c_dim = min(generator.c_dim, 10)
    stages = tuple(replace(stage, head_layers=3) for stage in generator.superres[-1:])
    generator = replace(
        generator,
        mapping=replace(generator.mapping, w_dim=32, c_dim=c_dim, num_embeddings=10, embedding_dim=16),
        synthesis=replace(
            generator.synthesis,
            img_resolution=16,
            num_layers=4,
            channel_base=256,
            channel_max=16,
            margin_size=4,
        ),
        superres=stages,
    )
    discriminator = replace(
        discriminator,
        img_resolution=generator.img_resolution,
        c_dim=c_dim,
        backbones=("tf_efficientnet_lite0",),
        feature_resolution=32,
        nominal_resolution=32,
        projected_channels=8,
        num_levels=2,
        head_resolution=4,
        max_head_channels=16,
        num_class_embeddings=10,
    )
    terms = replace(config.loss_terms, cls_weight=0.0)
    return replace(config, generator=generator, discriminator=discriminator, loss_terms=terms)
