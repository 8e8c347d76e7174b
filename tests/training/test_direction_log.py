# SPDX-License-Identifier: MIT
"""SAN's conditions in the log: when they are measured, that training does not feel it, and for which runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import ConfigError, TrainConfig, from_json, to_json
from training.dcgan_config import AutoencoderConfig
from training.dcgan_loss import make_dcgan_loss
from training.direction_log import make_direction_log
from training.discriminator.kinds import new_discriminator
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.kinds import new_generator
from training.loss import ProjectedGANLoss
from training.presets import RECIPES, dcgan, quickstart
from training.train_step import StepContext, discriminator_step
from training.training_loop import make_optimizer

BATCH_SIZE, NUM_CLASSES = 8, 3
SAN_FORMS = [name for name in RECIPES if name not in ("began", "least_squares")]


def tiny_config(objective: str, loss: str = "san", interval: int = 1, c_dim: int = 0) -> TrainConfig:
    config = dcgan(objective)
    generator = replace(config.generator, img_resolution=8, channel_base=8, z_dim=16, c_dim=c_dim)
    discriminator = replace(config.discriminator, img_resolution=8)
    if not isinstance(discriminator, AutoencoderConfig):
        bases = tuple(base // 8 for base in discriminator.channel_bases)
        discriminator = replace(discriminator, channel_bases=bases, c_dim=c_dim)
    return replace(
        config,
        loss=loss,
        generator=generator,
        discriminator=discriminator,
        batch_size=BATCH_SIZE,
        microbatch_size=BATCH_SIZE // 2,
        san_diagnostics_interval=interval,
    )


def train(config: TrainConfig, num_steps: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Statistics of each of D's steps, and D's tensors after the last."""
    torch.manual_seed(0)
    G, D = new_generator(config.generator), new_discriminator(config.discriminator, config.loss)
    D.set_trainable_(False)
    context = StepContext(config, make_dcgan_loss(config), StatsCollector())
    context.loss.directions = make_direction_log(config, D)
    optimizer = make_optimizer(D.trainable_parameters(), config.discriminator_optimizer)
    stats = []
    for _ in range(num_steps):
        labels = torch.arange(BATCH_SIZE) % NUM_CLASSES if config.generator.c_dim else None
        images = torch.randn(BATCH_SIZE, 3, 8, 8).clamp(-1, 1)
        draws = Draws(0, BATCH_SIZE * len(stats) + np.arange(BATCH_SIZE))
        batch = Batch(images, labels, torch.randn(BATCH_SIZE, config.generator.z_dim), labels, draws)
        discriminator_step(G, D, optimizer, batch, context)
        stats.append(context.stats.flush())
    return stats, D.state_dict()


@pytest.mark.parametrize("c_dim", [0, NUM_CLASSES])
@pytest.mark.parametrize("objective", SAN_FORMS)
def test_every_objective_is_measured(objective: str, c_dim: int) -> None:
    (stats,), _ = train(tiny_config(objective, c_dim=c_dim), 1)
    assert stats["SAN/cosine"]["num"] == 1
    assert -1 <= stats["SAN/cosine"]["mean"] <= 1
    assert stats["SAN/cosine/critics.critic0.last"]["num"] == 1
    assert 0 <= stats["SAN/in_order"]["mean"] <= 1 + 1e-6
    assert stats["SAN/drift_deg"]["mean"] > 0
    assert stats["SAN/collision"]["mean"] > 0


def test_every_head_of_a_projected_discriminator(tiny_generator_config, tiny_discriminator_config) -> None:
    """Two class-conditional levels; real and generated images in micro-batches, with augmentation."""
    config = replace(
        quickstart(),
        generator=tiny_generator_config(NUM_CLASSES, num_fp16_res=0),
        discriminator=tiny_discriminator_config(NUM_CLASSES, max_head_channels=16, class_dim=8),
        batch_size=BATCH_SIZE,
        microbatch_size=BATCH_SIZE // 2,
    )
    G = new_generator(config.generator)
    D = ProjectedDiscriminator(config.discriminator, "san", pretrained=False)
    context = StepContext(config, ProjectedGANLoss(config), StatsCollector())
    context.loss.directions = make_direction_log(config, D)
    labels = torch.arange(BATCH_SIZE) % NUM_CLASSES
    images = torch.randn(BATCH_SIZE, 3, 16, 16).clamp(-1, 1)
    batch = Batch(images, labels, torch.randn(BATCH_SIZE, G.z_dim), labels, Draws(0, np.arange(BATCH_SIZE)))
    optimizer = make_optimizer(D.trainable_parameters(), config.discriminator_optimizer)
    discriminator_step(G, D, optimizer, batch, context)
    stats = context.stats.flush()
    heads = [name for name in stats if name.startswith("SAN/cosine/heads.")]
    assert len(heads) == len(list(D.heads["tf_efficientnet_lite0"]))
    for measure in ("cosine", "agreement", "separability_gap", "collision", "drift_deg"):
        assert stats[f"SAN/{measure}"]["num"] == 1
    assert 0 < stats["SAN/drift_deg"]["mean"] < 45


def test_every_so_many_steps() -> None:
    stats, _ = train(tiny_config("hinge", interval=3), 7)
    assert ["SAN/cosine" in s for s in stats] == [True, False, False, True, False, False, True]


def test_training_does_not_feel_it() -> None:
    for objective in ("nonsaturating", "relativistic", "wgan_gp"):
        (_, measured), (_, plain) = (train(tiny_config(objective, interval=i), 3) for i in (1, 0))
        assert all(torch.equal(value, plain[name]) for name, value in measured.items())


@pytest.mark.parametrize(("loss", "interval"), [("gan", 1), ("san", 0)])
def test_plain_heads_and_an_interval_of_zero_have_no_log(loss: str, interval: int) -> None:
    (stats,), _ = train(tiny_config("hinge", loss, interval), 1)
    assert not [name for name in stats if name.startswith("SAN/")]


def test_classes_that_do_not_meet_leave_no_number_but_reserve_the_name() -> None:
    config = tiny_config("hinge", c_dim=NUM_CLASSES)
    D = new_discriminator(config.discriminator, "san")
    log, stats = make_direction_log(config, D), StatsCollector()
    for side, label in (("real", 0), ("fake", 1)):
        with log.record(side):
            D(torch.randn(4, 3, 8, 8), torch.full((4,), label))
    log.finish_step(stats)
    assert list(stats._moments) == [f"SAN/{name}" for name in log.diagnostics.names]
    assert stats.flush() == {}


def test_the_interval_is_checked_and_stored() -> None:
    config = tiny_config("hinge", interval=5)
    assert from_json(TrainConfig, to_json(config)).san_diagnostics_interval == 5
    with pytest.raises(ConfigError, match="san_diagnostics_interval=-1"):
        replace(config, san_diagnostics_interval=-1).validate()
