# SPDX-License-Identifier: MIT
"""Named recipes. Each docstring: the command, the hardware and time it needs, and what to expect.

`base` and `dcgan` have the defaults of --cfg, `paper` and `imagenet` the published runs, `digits` what a laptop runs.
"""

from __future__ import annotations

from collections.abc import Callable

from training.config import TrainConfig
from training.presets import imagenet, paper
from training.presets.base import add_stage, stylegan3_generator, stylegan_xl
from training.presets.dcgan import RECIPES, dcgan
from training.presets.digits import digits_8, digits_16, quickstart

__all__ = ["PRESETS", "RECIPES", "add_stage", "dcgan", "quickstart", "stylegan3_generator", "stylegan_xl"]

PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "quickstart": quickstart,
    "digits-8": digits_8,
    "digits-16": digits_16,
    "cifar10-16": paper.cifar10_16,
    "cifar10-32": paper.cifar10_32,
    "ffhq-16": paper.ffhq_16,
    "ffhq-32": paper.ffhq_32,
    "ffhq-64": paper.ffhq_64,
    "ffhq-128": paper.ffhq_128,
    "ffhq-256": paper.ffhq_256,
    "ffhq-512": paper.ffhq_512,
    "ffhq-1024": paper.ffhq_1024,
    "imagenet-16": imagenet.imagenet_16,
    "imagenet-32": imagenet.imagenet_32,
    "imagenet-64": imagenet.imagenet_64,
    "imagenet-128": imagenet.imagenet_128,
    "imagenet-256": imagenet.imagenet_256,
    "imagenet-512": imagenet.imagenet_512,
    "imagenet-1024": imagenet.imagenet_1024,
}
