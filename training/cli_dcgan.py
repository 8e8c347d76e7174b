# SPDX-License-Identifier: MIT
"""The flags of `--cfg dcgan` and `--objective`: which objectives fit which networks, which flags have no effect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from training.config import ConfigError, TrainConfig
from training.dataset import ImageDataset
from training.dcgan_config import AutoencoderConfig
from training.generator.dcgan import check_sizes
from training.presets.dcgan import RECIPES

STYLEGAN_OBJECTIVES = (
    "hinge",
    "wasserstein",
    "saturating",
    "nonsaturating",
    "soft_least_squares",
    "least_squares",
)
OBJECTIVE_NAMES = (*RECIPES, "wasserstein")
OTHER_NAMES = {  # what else people call them
    "minimax": "saturating",
    "dcgan": "nonsaturating",
    "lsgan": "least_squares",
    "curriculum_wgan_gp": "curriculum",
    "r3gan": "relativistic",
}
NOT_PROJECTED = {  # why an objective does not go with StyleGAN-XL's discriminator
    "wgan": "the features of its discriminator are pretrained and cannot be clipped; wasserstein is its loss alone",
    "wgan_gp": "it is trained without gradient penalties; wasserstein is its loss alone",
    "curriculum": "it has no critics of growing strength",
    "dragan": "it is trained without gradient penalties; nonsaturating is its loss alone",
    "infogan": "its discriminator has no Q head, and its generator no codes",
    "began": "its discriminator is no autoencoder",
    "relativistic": "its discriminator judges real and generated images in separate passes",
}
NO_SAN_FORM = {
    "least_squares": "its generator loss turns round at the target; soft_least_squares has one",
    "began": "its discriminator is an autoencoder, without a last linear layer that could have a direction",
}
STYLEGAN_FLAGS = {  # flag -> what --cfg dcgan lacks for it
    "resume": "fine-tuning",
    "map_depth": "a mapping network",
    "syn_layers": "StyleGAN3's layers",
    "fp32": "half precision",
    "precision": "half precision",
    "feature_precision": "pretrained features",
    "backbones": "pretrained features",
    "official_bn": "pretrained features",
    "embedding": "class embeddings",
    "cls_weight": "classifier guidance",
    "freezed": "fine-tuning",
    "superres": "super-resolution stages",
}
DASHED_FLAGS = ("map_depth", "official_bn", "feature_precision")  # StyleGAN-XL spells others with underscores


def parse_objective(_context: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """The name of an objective, also in another spelling such as WGAN-GP or minimax; an absent flag stays None."""
    if value is None:
        return None
    name = value.lower().replace("-", "_")
    name = OTHER_NAMES.get(name, name)
    if name not in OBJECTIVE_NAMES:
        raise click.BadParameter(f"{value!r} is not one of {', '.join(OBJECTIVE_NAMES)}")
    return name


def check_objective_flags(flags: dict[str, Any]) -> None:
    """Raise ConfigError for an objective that does not fit the networks, and for flags without effect on them."""
    name = flags["objective"]
    if flags["cfg"] != "dcgan":
        if name is not None and name not in STYLEGAN_OBJECTIVES:
            raise ConfigError(
                f"--objective {name} does not go with StyleGAN-XL's networks: {NOT_PROJECTED[name]}; use --cfg dcgan"
            )
        return
    if name == "wasserstein":
        raise ConfigError(
            "--objective wasserstein leaves a discriminator that is trained from scratch unbounded; use wgan or wgan_gp"
        )
    if name == "began" and flags["cond"]:
        raise ConfigError(
            "--cond 1: BEGAN's discriminator does not see classes; use --cond 0, or leave it out"
        )
    for flag, what in STYLEGAN_FLAGS.items():
        if flags[flag] not in (None, False):
            shown = flag.replace("_", "-") if flag in DASHED_FLAGS else flag
            raise ConfigError(f"--{shown} has no effect: --cfg dcgan has no {what}; leave it out")


def adapt_dcgan(config: TrainConfig, dataset: ImageDataset, flags: dict[str, Any]) -> TrainConfig:
    """Networks and optimizers as the data and the flags say."""
    generator, discriminator = config.generator, config.discriminator
    base, channel_max = flags["cbase"] or generator.channel_base, flags["cmax"] or generator.channel_max
    sizes = {"img_resolution": dataset.resolution, "channel_max": channel_max}
    if isinstance(discriminator, AutoencoderConfig):
        discriminator = replace(discriminator, channel_base=base, **sizes)
    else:
        bases = tuple(max(width * base // generator.channel_base, 1) for width in discriminator.channel_bases)
        discriminator = replace(discriminator, c_dim=dataset.c_dim, channel_bases=bases, **sizes)
    config = replace(
        config,
        generator=replace(generator, c_dim=dataset.c_dim, channel_base=base, **sizes),
        discriminator=discriminator,
        generator_optimizer=replace(
            config.generator_optimizer, lr=flags["glr"] or config.generator_optimizer.lr
        ),
        discriminator_optimizer=replace(
            config.discriminator_optimizer, lr=flags["dlr"] or config.discriminator_optimizer.lr
        ),
    )
    if flags["blur_kimg"] is not None:
        config = replace(config, loss_terms=replace(config.loss_terms, blur_fade_kimg=flags["blur_kimg"]))
    if flags["kimg"] is not None:  # the curriculum takes its share of the run, however long
        share = config.critic.curriculum_kimg / config.total_kimg
        config = replace(config, critic=replace(config.critic, curriculum_kimg=share * flags["kimg"]))
    check_sizes(config.generator)
    return config


def check_san_form(config: TrainConfig) -> None:
    """Raise ConfigError if the objective has no SAN form and the run asks for it."""
    if config.loss == "san" and config.objective in NO_SAN_FORM:
        raise ConfigError(
            f"--objective {config.objective} has no SAN form: {NO_SAN_FORM[config.objective]}; use --loss gan"
        )
