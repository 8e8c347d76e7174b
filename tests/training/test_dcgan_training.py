# SPDX-License-Identifier: MIT
"""Every objective of `--cfg dcgan` trains, as GAN and as SAN: tiny networks learn where 8x8 blobs are, in seconds."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from san.layers import SANLayer
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import TrainConfig
from training.dcgan_config import AutoencoderConfig
from training.dcgan_loss import make_dcgan_loss
from training.discriminator.kinds import new_discriminator
from training.draws import Draws
from training.generator.kinds import new_generator
from training.presets import RECIPES, dcgan
from training.train_step import StepContext, discriminator_step, generator_step
from training.training_loop import make_optimizer

NUM_CLASSES, BATCH_SIZE = 3, 16
SAN_FORMS = [name for name in RECIPES if name not in ("began", "least_squares")]
CASES = [(name, "san" if name in SAN_FORMS else "gan") for name in RECIPES]
CASES += [pytest.param(name, "gan", marks=pytest.mark.slow) for name in SAN_FORMS]
NUM_STEPS = {
    "wgan": 30,
    "wgan_gp": 20,
    "curriculum": 20,
    "dragan": 120,
    "infogan": 80,
    "began": 200,
}  # others: 60
LEARNING_RATES = {"wgan": 0.001, "began": 0.01}  # others: 0.002


def tiny_config(objective: str, loss: str, microbatch_size: int = BATCH_SIZE, c_dim: int = 0) -> TrainConfig:
    """8x8 images, 8 channels, the objective's own terms, and a learning rate for a hundred steps."""
    config = dcgan(objective)
    codes = config.generator.num_categories
    generator = replace(
        config.generator, img_resolution=8, channel_base=16, z_dim=16 if codes else 8, c_dim=c_dim
    )
    discriminator = replace(config.discriminator, img_resolution=8)
    if isinstance(discriminator, AutoencoderConfig):
        discriminator = replace(discriminator, channel_base=16, hidden_dim=8)
    else:
        bases = tuple(base // 4 for base in discriminator.channel_bases)
        discriminator = replace(discriminator, channel_bases=bases, c_dim=c_dim)
    lr = LEARNING_RATES.get(objective, 0.002)
    return replace(
        config,
        loss=loss,
        generator=generator,
        discriminator=discriminator,
        generator_optimizer=replace(config.generator_optimizer, lr=lr / 2 if objective == "began" else lr),
        discriminator_optimizer=replace(config.discriminator_optimizer, lr=lr),
        critic=replace(config.critic, curriculum_kimg=config.critic.curriculum_kimg and 2.0),
        batch_size=BATCH_SIZE,
        microbatch_size=microbatch_size,
    )


class Run:
    """Networks of a tiny run with optimizers, from seeds alone."""

    def __init__(self, config: TrainConfig, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.config = config
        self.G = new_generator(config.generator)
        self.D = new_discriminator(config.discriminator, config.loss)
        self.D.set_trainable_(False)
        self.G_optimizer = make_optimizer(self.G.parameters(), config.generator_optimizer)
        self.D_optimizer = make_optimizer(self.D.trainable_parameters(), config.discriminator_optimizer)
        self.stats, self.num_drawn = StatsCollector(), 0
        self.context = StepContext(config, make_dcgan_loss(config), self.stats)

    def draw(self) -> Batch:
        images, labels = draw_blobs(BATCH_SIZE)
        labels = labels if self.config.generator.c_dim else None
        self.num_drawn += BATCH_SIZE
        draws = Draws(0, np.arange(self.num_drawn - BATCH_SIZE, self.num_drawn))
        return Batch(images, labels, torch.randn(BATCH_SIZE, self.G.z_dim), labels, draws)

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            generator_step(self.G, self.D, self.G_optimizer, self.draw(), self.context)
            for _ in range(self.config.critic.num_steps):
                discriminator_step(self.G, self.D, self.D_optimizer, self.draw(), self.context)
            self.context.cur_nimg += self.config.nimg_per_iteration

    @torch.no_grad()
    def distance(self) -> float:
        """Energy distance between images of G and blobs, in pixels."""
        G = copy.deepcopy(self.G).eval()
        labels = torch.arange(240) % NUM_CLASSES if self.config.generator.c_dim else None
        fake = G(torch.randn(240, G.z_dim), labels).flatten(1)
        real = draw_blobs(240)[0].flatten(1)
        between, within = torch.cdist(real, fake).mean(), torch.cdist(real, real).mean()
        return (2 * between - within - torch.cdist(fake, fake).mean()).item()


def draw_blobs(num: int) -> tuple[Tensor, Tensor]:
    """White blobs of sigma 1 pixel on black, at three places give or take 0.3 pixels, and the places."""
    labels = torch.randint(NUM_CLASSES, (num,))
    centres = torch.tensor([[2.0, 2.0], [2.0, 5.0], [5.0, 3.5]])[labels] + 0.3 * torch.randn(num, 2)
    axis = torch.arange(8.0)
    rows = torch.exp(-0.5 * (axis - centres[:, :1]).square())
    columns = torch.exp(-0.5 * (axis - centres[:, 1:]).square())
    images = 2 * rows.unsqueeze(2) * columns.unsqueeze(1) - 1
    return images.unsqueeze(1).expand(-1, 3, -1, -1).contiguous(), labels


@pytest.mark.parametrize(("objective", "loss"), CASES)
def test_training_lowers_the_distance_to_the_data(objective, loss):
    run = Run(tiny_config(objective, loss))
    before = run.distance()
    run.train(NUM_STEPS.get(objective, 60))
    assert run.distance() < (0.75 if objective == "began" else 0.5) * before
    for layer in (m for m in run.D.modules() if isinstance(m, SANLayer)):  # directions are back on the sphere
        norms = layer.weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("loss", ["san", "gan"])
def test_conditional_training_puts_the_blob_where_the_class_says(loss):
    run = Run(tiny_config("nonsaturating", loss, c_dim=NUM_CLASSES))
    run.train(100)
    labels = torch.arange(90) % NUM_CLASSES
    with torch.no_grad():
        images = run.G.eval()(torch.randn(90, run.G.z_dim), labels).mean(1)
    rows, columns = torch.tensor([2, 2, 5]), torch.tensor([2, 5, 3])
    assert (images[:, rows, columns].argmax(1) == labels).float().mean() > 0.9


def test_infogan_learns_to_read_its_codes():
    run = Run(tiny_config("infogan", "san"))
    run.train(10)
    before = run.stats.flush()
    run.train(60)
    after = run.stats.flush()
    for name in ("InfoGAN/categorical", "InfoGAN/continuous"):
        assert after[name]["mean"] > before[name]["mean"] + 0.1
    assert after["InfoGAN/categorical"]["mean"] > 0.5  # nats, of log 10 = 2.3 at most
