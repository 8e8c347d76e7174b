# SPDX-License-Identifier: MIT
"""What share of a training step does the log of SAN's conditions cost, at the interval that runs use?

    python tests/benchmarks/san_diagnostics.py --threads 1

Steps with and without the log alternate in one process, and processor time counts, so that whatever else the machine
does meets both. The cost is the median difference of neighbours; steps of G and D on random images, feature networks
with random weights. Exit code 1 when a share is above the limit.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import click
import numpy as np
import torch
from tqdm import tqdm

from torch_utils import cpu
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import TrainConfig
from training.direction_log import DirectionLog, make_direction_log
from training.discriminator.kinds import AnyDiscriminator, new_discriminator
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.kinds import AnyGenerator, new_generator
from training.initialization import build_loss
from training.optimizers import make_optimizer
from training.presets import dcgan, quickstart, stylegan_xl
from training.train_step import StepContext, discriminator_step, generator_step

LIMIT = 0.02  # share of a step


def with_classes(config: TrainConfig, c_dim: int) -> TrainConfig:
    """The configuration for so many classes; 0 = none."""
    generator, discriminator = config.generator, config.discriminator
    if config.is_dcgan:
        generator = replace(generator, c_dim=c_dim)
    else:
        mapping = replace(generator.mapping, c_dim=c_dim, num_embeddings=max(c_dim, 1))
        generator = replace(generator, mapping=mapping)
        discriminator = replace(discriminator, num_class_embeddings=max(c_dim, 1))
    return replace(config, generator=generator, discriminator=replace(discriminator, c_dim=c_dim))


def paper_like(c_dim: int) -> TrainConfig:
    """StyleGAN-XL's discriminator of four levels, at reduced size: EfficientNet-Lite0 at 64 pixels, narrow G, batch 8.

    DeiT, the paper's other backbone, would make the step several times longer, and the log twice.
    """
    config = stylegan_xl(img_resolution=16, batch_size=8, microbatch_size=4)
    generator = config.generator
    return with_classes(
        replace(
            config,
            generator=replace(
                generator,
                mapping=replace(generator.mapping, w_dim=128),
                synthesis=replace(generator.synthesis, channel_base=1024, channel_max=32, num_layers=5),
            ),
            discriminator=replace(
                config.discriminator,
                backbones=("tf_efficientnet_lite0",),
                feature_resolution=64,
                nominal_resolution=64,
                head_resolution=4,
            ),
        ),
        c_dim,
    )


CASES: dict[str, Callable[[], TrainConfig]] = {
    "quickstart": quickstart,
    "quickstart, no classes": lambda: with_classes(quickstart(), 0),
    "paper-like": lambda: paper_like(0),
    "paper-like, 10 classes": lambda: paper_like(10),
    "paper-like, 1000 classes": lambda: paper_like(1000),
    "dcgan": lambda: dcgan("hinge"),
    "dcgan, 10 classes": lambda: with_classes(dcgan("hinge"), 10),
    "dcgan relativistic": lambda: dcgan("relativistic"),
}


class Stepper:
    """Networks of a configuration that take steps on random images, with the log or without."""

    def __init__(self, config: TrainConfig) -> None:
        torch.manual_seed(0)
        self.config, self.num_steps = config, 0
        self.G: AnyGenerator = new_generator(config.generator)
        self.D: AnyDiscriminator = (
            new_discriminator(config.discriminator, "san")
            if config.is_dcgan
            else ProjectedDiscriminator(config.discriminator, "san", pretrained=False)
        )
        self.D.set_trainable_(False)
        self.context = StepContext(config, build_loss(config, torch.device("cpu")), StatsCollector())
        every_step = make_direction_log(replace(config, san_diagnostics_interval=1), self.D)
        self.logs: dict[bool, DirectionLog | None] = {True: every_step, False: None}
        self.G_optimizer = make_optimizer(self.G.parameters(), config.generator_optimizer)
        self.D_optimizer = make_optimizer(self.D.trainable_parameters(), config.discriminator_optimizer)

    def step(self, is_logged: bool) -> float:
        """One step of G and one of D; seconds of the processor, all threads together."""
        generator_batch, discriminator_batch = self.draw_batch(), self.draw_batch()
        self.context.loss.directions = self.logs[is_logged]
        start = time.process_time()
        generator_step(self.G, self.D, self.G_optimizer, generator_batch, self.context)
        discriminator_step(self.G, self.D, self.D_optimizer, discriminator_batch, self.context)
        return time.process_time() - start

    def draw_batch(self) -> Batch:
        """Noise for images; fakes have their labels, so that all classes meet."""
        num, cfg = self.config.batch_size, self.config.generator
        self.num_steps += 1
        c_dim = cfg.c_dim if self.config.is_dcgan else cfg.mapping.c_dim
        labels = torch.randint(c_dim, (num,)) if c_dim else None
        images = torch.randn(num, 3, cfg.img_resolution, cfg.img_resolution).clamp(-1, 1)
        draws = Draws(0, num * self.num_steps + np.arange(num))
        return Batch(images, labels, torch.randn(num, self.G.z_dim), labels, draws)


@dataclass(frozen=True)
class Cost:
    """What was measured of one configuration."""

    step_s: float  # median of a step without the log
    extra_s: float  # median difference of neighbouring steps with and without
    quartiles_s: tuple[float, float]  # of these differences
    interval: int  # the log is written every so many steps

    @property
    def share(self) -> float:
        """Part of the training time that the log takes."""
        return self.extra_s / (self.interval * self.step_s)


def measure(config: TrainConfig, num_pairs: int, name: str) -> Cost:
    """Time pairs of steps, whose order alternates."""
    stepper = Stepper(config)
    for is_logged in (False, True):  # warm-up
        stepper.step(is_logged)
    pairs = []
    for i in tqdm(range(num_pairs), desc=name, leave=False):
        order = (False, True) if i % 2 else (True, False)
        seconds = {is_logged: stepper.step(is_logged) for is_logged in order}
        pairs.append((seconds[False], seconds[True]))
    differences = [logged - plain for plain, logged in pairs]
    low, extra, high = statistics.quantiles(differences, n=4)
    return Cost(statistics.median(p for p, _ in pairs), extra, (low, high), config.san_diagnostics_interval)


@click.command(context_settings={"show_default": True})
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch")
@click.option("--pairs", "num_pairs", type=click.IntRange(min=4), default=20, help="Pairs of steps per case")
@click.option("--only", metavar="TEXT", default="", help="Cases whose name contains this")
def main(threads: int | None, num_pairs: int, only: str) -> None:
    """Print a table, and PASS or FAIL for each case."""
    if threads:
        torch.set_num_threads(threads)
    cpu.tune_for_training()
    click.echo(f"{'case':26s}{'step/ms':>9s}{'log/ms':>9s}{'quartiles/ms':>17s}{'interval':>9s}{'share':>9s}")
    passed = True
    for name, make_config in CASES.items():
        if only not in name:
            continue
        cost = measure(make_config(), num_pairs, name)
        quartiles = " ... ".join(f"{1000 * seconds:.1f}" for seconds in cost.quartiles_s)
        verdict = "PASS" if cost.share < LIMIT else "FAIL"
        passed &= cost.share < LIMIT
        click.echo(
            f"{name:26s}{1000 * cost.step_s:9.1f}{1000 * cost.extra_s:9.1f}{quartiles:>17s}"
            f"{cost.interval:9d}{cost.share:9.2%}  {verdict}"
        )
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
