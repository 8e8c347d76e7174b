# SPDX-License-Identifier: MIT
"""The training steps with the small networks: each moves its own network, and no micro-batch changes a gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import OptimizerConfig, TrainConfig
from training.dcgan_config import AutoencoderConfig
from training.dcgan_loss import make_dcgan_loss
from training.discriminator.kinds import new_discriminator
from training.draws import Draws
from training.generator.kinds import new_generator
from training.presets import RECIPES, dcgan
from training.train_step import StepContext, discriminator_step, generator_step
from training.training_loop import make_optimizer

NUM_CLASSES, BATCH_SIZE = 3, 8
SAN_FORMS = [name for name in RECIPES if name not in ("began", "least_squares")]
CASES = [(name, "san") for name in SAN_FORMS] + [(name, "gan") for name in RECIPES]


def tiny_config(objective: str, loss: str, microbatch_size: int = BATCH_SIZE) -> TrainConfig:
    config = dcgan(objective)
    c_dim = 0 if objective == "began" else NUM_CLASSES
    generator = replace(config.generator, img_resolution=8, channel_base=8, z_dim=16, c_dim=c_dim)
    discriminator = replace(config.discriminator, img_resolution=8)
    if isinstance(discriminator, AutoencoderConfig):
        discriminator = replace(discriminator, channel_base=8, hidden_dim=8)
    else:
        bases = tuple(base // 8 for base in discriminator.channel_bases)
        discriminator = replace(discriminator, channel_bases=bases, c_dim=c_dim)
    return replace(
        config,
        loss=loss,
        generator=generator,
        discriminator=discriminator,
        batch_size=BATCH_SIZE,
        microbatch_size=microbatch_size,
    )


class Run:
    """Networks of a tiny run with optimizers, the same for the same configuration."""

    def __init__(self, config: TrainConfig) -> None:
        torch.manual_seed(0)
        self.G = new_generator(config.generator)
        self.D = new_discriminator(config.discriminator, config.loss)
        self.D.set_trainable_(False)
        self.G_optimizer = make_optimizer(self.G.parameters(), config.generator_optimizer)
        self.D_optimizer = make_optimizer(self.D.trainable_parameters(), config.discriminator_optimizer)
        self.context = StepContext(config, make_dcgan_loss(config), StatsCollector(), cur_nimg=300_000)

    def generator_step(self, batch: Batch) -> None:
        generator_step(self.G, self.D, self.G_optimizer, batch, self.context)

    def discriminator_step(self, batch: Batch) -> None:
        discriminator_step(self.G, self.D, self.D_optimizer, batch, self.context)


def make_batch(config: TrainConfig) -> Batch:
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=rng) if config.generator.c_dim else None
    images = torch.randn(BATCH_SIZE, 3, 8, 8, generator=rng).clamp(-1, 1)
    z = torch.randn(BATCH_SIZE, config.generator.z_dim, generator=rng)
    return Batch(images, labels, z, labels, Draws(0, np.arange(BATCH_SIZE)))


@pytest.mark.parametrize(("objective", "loss"), CASES)
def test_each_step_moves_its_own_network(objective, loss):
    config = tiny_config(objective, loss)
    run, batch = Run(config), make_batch(config)
    D_before = {name: p.clone() for name, p in run.D.named_parameters()}
    G_before = {name: p.clone() for name, p in run.G.named_parameters()}
    run.generator_step(batch)
    assert all(torch.equal(p, D_before[name]) and p.grad is None for name, p in run.D.named_parameters())
    assert all(not torch.equal(p, G_before[name]) for name, p in run.G.named_parameters())
    G_before = {name: p.clone() for name, p in run.G.named_parameters()}
    run.discriminator_step(batch)
    assert all(torch.equal(p, G_before[name]) for name, p in run.G.named_parameters())
    assert not [name for name, p in run.D.named_parameters() if torch.equal(p, D_before[name])]
    assert not any(p.requires_grad for p in run.D.parameters())


@pytest.mark.parametrize(("objective", "loss"), CASES)
def test_gradients_do_not_depend_on_the_microbatch(objective, loss):
    """But for what looks at the micro-batch: BatchNorm, DRAGAN's noise, relativistic SAN, weights of mean 1."""
    if (objective, loss) == ("relativistic", "san"):
        pytest.skip("its potential averages over the reals of the micro-batch: see docs/fidelity.md")
    gradients = []
    for microbatch_size in (2, BATCH_SIZE):
        config = replace(tiny_config(objective, loss, microbatch_size), normalizes_san_weights=False)
        config = replace(config, generator=replace(config.generator, has_batchnorm=False))
        if objective != "began":
            config = replace(config, discriminator=replace(config.discriminator, has_batchnorm=False))
        if config.critic.penalty == "dragan":  # its noise is as large as the micro-batch's standard deviation
            config = replace(config, critic=replace(config.critic, penalty="none"))
        run, batch = Run(config), make_batch(config)
        if config.generator.num_categories:
            run.D.code_head.eval()
        run.generator_step(batch)
        G_gradients = {f"G.{name}": p.grad.clone() for name, p in run.G.named_parameters()}
        run = Run(config)
        if config.generator.num_categories:
            run.D.code_head.eval()
        run.discriminator_step(batch)
        gradients.append(G_gradients | {f"D.{name}": p.grad for name, p in run.D.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=2e-3, atol=1e-6, msg=name)


def test_the_check_of_the_microbatch_can_fail():
    """With BatchNorm the same comparison finds a difference."""
    runs = []
    for microbatch_size in (2, BATCH_SIZE):
        config = tiny_config("hinge", "san", microbatch_size)
        runs.append(Run(config))
        runs[-1].discriminator_step(make_batch(config))
    first, second = (run.D.critics["critic0"].trunk[0].weight.grad for run in runs)
    assert (first - second).abs().max() > 0.01 * second.abs().max()


def test_optimizers_are_the_configured_ones():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    adam = make_optimizer(parameters, OptimizerConfig(lr=0.1, betas=(0.5, 0.9)))
    assert type(adam) is torch.optim.Adam and adam.defaults["betas"] == (0.5, 0.9)
    rmsprop = make_optimizer(parameters, dcgan("wgan").discriminator_optimizer)
    assert type(rmsprop) is torch.optim.RMSprop
    assert (rmsprop.defaults["lr"], rmsprop.defaults["alpha"]) == (0.00005, 0.99)
