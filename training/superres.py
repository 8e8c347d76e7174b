# SPDX-License-Identifier: MIT
"""Training of a super-resolution stage: a stem's weights go in and stay as they are, a head is trained on top.

Section 3.2 of StyleGAN-XL (arXiv:2202.00273). The mapping network and the stem's layers are frozen; its Fourier
features are frozen too unless `TrainConfig.trains_stem_input`, as the official code has it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from torch_utils.errors import UserError
from training.config import GeneratorConfig, TrainConfig
from training.generator.generator import Generator
from training.network_io import build_generator, read_network

if TYPE_CHECKING:
    from training.discriminator.projected import ProjectedDiscriminator


def start_from_stem_(
    G: Generator, G_ema: Generator, D: ProjectedDiscriminator, stem: Generator, config: TrainConfig
) -> str:
    """Copy the stem into G, where it is frozen already, and G_ema; returns a sentence that says what is trained.

    Where config.embedding_source is "stem", a plain class-conditional D starts from the stem's class embeddings.
    """
    for network in (G, G_ema):
        copy_stem_(network, stem)
    if config.embedding_source == "stem":
        D.set_class_embeddings_(stem.mapping.embed.weight.detach())
    num_trained = sum(p.numel() for p in G.parameters() if p.requires_grad)
    num_frozen = sum(p.numel() for p in G.parameters() if not p.requires_grad)
    plan = G.synthesis.plan
    return (
        f"Stem {config.path_stem}: {len(plan.kept)} layers kept ({num_frozen:,} frozen parameters), "
        f"{len(plan.head)} layers in the head ({num_trained:,} trained parameters)."
    )


def reload_stem_(G: Generator, G_ema: Generator, stem: Generator, config: TrainConfig) -> str:
    """Put a stem under a stage that has been trained already, and return a sentence that says so.

    Fourier features that the stage trains are its own by now, and stay.
    """
    for network in (G, G_ema):
        copy_stem_(network, stem, copies_input=not config.trains_stem_input)
    return f"The layers below its head were taken from {config.path_stem}."


def load_stem(config: TrainConfig) -> Generator:
    """G_ema of `config.path_stem`, on the CPU. UserError when it is not what config.generator is built on."""
    stored = read_network(config.path_stem)
    below = replace(config.generator, superres=config.generator.superres[:-1])
    if _without_precision(stored.generator_config) != _without_precision(below):
        raise UserError(
            f"--path_stem {config.path_stem} is not the network that this stage was set up for; start train.py again "
            "with --superres and this file"
        )
    return build_generator(stored.generator_config, stored.G_ema, stored.path)


@torch.no_grad()
def copy_stem_(G: Generator, stem: Generator, copies_input: bool = True) -> None:
    """Copy parameters and buffers of the mapping network, the kept layers and, if asked, the input into G."""
    target = G.state_dict()
    prefixes = [f"synthesis.{layer.name}." for layer in G.synthesis.plan.kept] + ["mapping."]
    if copies_input:
        prefixes.append("synthesis.input.")
    for name, value in stem.state_dict().items():
        if name.startswith(tuple(prefixes)):
            target[name].copy_(value)


def freeze_stem_(G: Generator, trains_stem_input: bool) -> None:
    """Leave gradients on in the layers of the last stage only, and in the Fourier features if asked."""
    G.requires_grad_(False)
    for layer in G.synthesis.plan.head:
        G.synthesis.get_submodule(layer.name).requires_grad_(True)
    G.synthesis.input.requires_grad_(trains_stem_input)


def _without_precision(cfg: GeneratorConfig) -> GeneratorConfig:
    """Half precision is a way to run the layers, not a part of what they compute."""
    return replace(cfg, synthesis=replace(cfg.synthesis, num_fp16_res=0))
