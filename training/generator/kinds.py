# SPDX-License-Identifier: MIT
"""The kinds of generators, and the one that a configuration asks for."""

from __future__ import annotations

from training.config import AnyGeneratorConfig
from training.dcgan_config import DCGANGeneratorConfig
from training.generator.dcgan import DCGANGenerator
from training.generator.generator import Generator

AnyGenerator = Generator | DCGANGenerator


def new_generator(cfg: AnyGeneratorConfig) -> AnyGenerator:
    """A generator with random weights. Raises ConfigError for a configuration that gives no network."""
    return DCGANGenerator(cfg) if isinstance(cfg, DCGANGeneratorConfig) else Generator(cfg)
