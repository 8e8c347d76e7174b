# SPDX-License-Identifier: MIT
"""The path-length step, and the running means of path lengths and of w, however the batch is cut into parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import LossConfig, TrainConfig
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.generator import Generator
from training.loss import ProjectedGANLoss
from training.presets import quickstart
from training.train_step import StepContext, discriminator_step, path_length_step

NUM_CLASSES, BATCH_SIZE, Z_DIM = 3, 16, 4
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def tiny_config(tiny_generator_config, tiny_discriminator_config) -> MakeConfig:
    """tiny_config(c_dim, microbatch_size, **terms): 16x16 images; no augmentation, no blur."""

    def make(c_dim: int = NUM_CLASSES, microbatch_size: int = BATCH_SIZE, **terms: float) -> TrainConfig:
        return replace(
            quickstart(),
            generator=tiny_generator_config(c_dim, num_fp16_res=0),
            discriminator=tiny_discriminator_config(c_dim, augment_policy=""),
            loss_terms=LossConfig(blur_fade_kimg=0, pl_weight=2.0, **terms),
            batch_size=BATCH_SIZE,
            microbatch_size=microbatch_size,
        )

    return make


class Run:
    """A generator, the same for the same number of classes, that makes path-length steps."""

    def __init__(self, config: TrainConfig, lr: float = 0.0) -> None:
        torch.manual_seed(1)
        self.G = Generator(config.generator)
        self.optimizer = torch.optim.Adam(self.G.parameters(), lr=lr, betas=(0.0, 0.99))
        self.stats = StatsCollector()
        self.context = StepContext(config, ProjectedGANLoss(config), self.stats)

    def step(self, batch: Batch, mean: float = 0.0) -> torch.Tensor:
        return path_length_step(self.G, self.optimizer, batch, torch.tensor(mean), self.context)


def make_batch(seed: int = 0, size: int = BATCH_SIZE, c_dim: int = NUM_CLASSES) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (size,), generator=rng) if c_dim else None
    images = torch.randn(size, 3, 16, 16, generator=rng).clamp(-1, 1)
    z = torch.randn(size, Z_DIM, generator=rng)
    return Batch(images, labels, z, labels, Draws(seed, np.arange(size)))


@pytest.mark.parametrize("c_dim", [0, NUM_CLASSES])
def test_path_length_step(c_dim, tiny_config):
    run, sizes = Run(tiny_config(c_dim, microbatch_size=8), lr=0.0025), []
    before = {name: value.clone() for name, value in run.G.state_dict().items()}
    run.G.synthesis.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    mean = run.step(make_batch(c_dim=c_dim))
    assert sizes == [4] * 4  # half of the batch (pl_batch_shrink is 2) in halves, measured and then trained
    assert mean.shape == () and mean > 0 and not mean.requires_grad
    moved = {name for name, value in run.G.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"mapping", "synthesis"}
    assert not moved & {name for name, _ in run.G.named_buffers()}
    result = run.stats.flush()
    assert result["Loss/pl_penalty"]["num"] == 8 and result["Loss/G/reg"]["mean"] > 0
    assert result["Loss/G/reg"]["mean"] == pytest.approx(2 * result["Loss/pl_penalty"]["mean"], rel=1e-5)


def test_one_pass_suffices_when_the_batch_is_not_cut(tiny_config):
    run, sizes = Run(tiny_config()), []
    run.G.synthesis.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    run.step(make_batch())
    assert sizes == [8]


def test_path_length_of_a_single_latent(tiny_config):
    assert Run(tiny_config()).step(make_batch(size=1)) > 0


def test_path_lengths_become_equal(tiny_config):
    """The penalty does what it is for: its value falls."""
    run, mean, penalties = Run(tiny_config(pl_decay=0.2), lr=0.0025), 0.0, []
    for i in range(40):
        mean = run.step(make_batch(i), mean).item()
        penalties.append(run.stats.flush()["Loss/pl_penalty"]["mean"])
    assert sum(penalties[-5:]) < 0.3 * sum(penalties[:5])


def test_neither_gradient_nor_mean_nor_report_depends_on_the_microbatch(tiny_config):
    """Of 8 latents in parts of 8, 4, 3 + 3 + 2, 2 and 1; the mean is far off, so that its gradient counts."""
    runs = [Run(tiny_config(microbatch_size=size, pl_decay=0.4)) for size in (16, 8, 6, 4, 1)]
    means = [run.step(make_batch(), 0.2).item() for run in runs]
    assert means == pytest.approx([means[0]] * 5, rel=1e-5) and abs(means[0] - 0.2) > 1e-3
    reports = [run.stats.flush()["Loss/pl_penalty"] for run in runs]
    assert all(report["num"] == 8 for report in reports)
    assert [r["mean"] for r in reports] == pytest.approx([reports[0]["mean"]] * 5, rel=1e-4)
    num_compared = 0
    for run in runs[1:]:
        for a, b in zip(run.G.parameters(), runs[0].G.parameters(), strict=True):
            if b.grad is not None and b.grad.abs().max() > 1e-7:
                assert (a.grad - b.grad).abs().max() <= 1e-3 * b.grad.abs().max()
                num_compared += 1
    assert num_compared > 40


def test_the_mean_follows_images_rather_than_steps(tiny_config):
    """A batch of 256 moves it as often as four of 64; a smaller one moves it once."""
    means = {}
    for batch_size in (16, 64, 256):
        config = replace(tiny_config(), batch_size=batch_size)
        means[batch_size] = Run(config).step(make_batch()).item()
    assert means[16] == means[64]
    assert means[256] == pytest.approx(means[64] / 0.01 * (1 - 0.99**4), rel=1e-5)


def test_a_path_length_that_is_not_finite_leaves_the_mean(tiny_config, capsys):
    run, batch = Run(tiny_config()), make_batch()
    mean = run.step(replace(batch, z=torch.full_like(batch.z, float("nan"))), 0.25)
    assert mean.item() == 0.25
    assert capsys.readouterr().out.startswith("Warning: ")


@pytest.mark.parametrize("c_dim", [0, NUM_CLASSES])
@pytest.mark.parametrize("batch_size", [16, 256])
def test_the_mean_of_w_does_not_depend_on_the_microbatch(c_dim, batch_size, tiny_config):
    """It is that of the official rule for one pass, a move per sample of a class or one for the batch, and without

    classes moves once for every 64 images of the step.
    """
    batch = make_batch(c_dim=c_dim)
    averages = {}
    for microbatch_size in (16, 4):
        config = replace(tiny_config(c_dim, microbatch_size), batch_size=batch_size)
        run = Run(config)
        D = ProjectedDiscriminator(config.discriminator, "san", pretrained=False).eval()
        optimizer = torch.optim.SGD(D.trainable_parameters(), lr=0.0)
        discriminator_step(run.G, D, optimizer, batch, run.context)
        averages[microbatch_size] = run.G.mapping.w_avg.clone()
    torch.testing.assert_close(averages[4], averages[16])
    with torch.no_grad():
        official = Run(tiny_config(c_dim)).G.mapping
        for _ in range(batch_size // 64 if batch_size > 64 and not c_dim else 1):
            official(batch.z, batch.fake_labels, update_emas=True)
    torch.testing.assert_close(averages[16], official.w_avg)
    assert averages[16].abs().max() > 0
