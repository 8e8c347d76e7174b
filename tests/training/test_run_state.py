# SPDX-License-Identifier: MIT
"""A run that goes on from its state equals the run that never stopped, bit for bit; and what does not fit is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torch_utils.ema import update_ema_
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import TrainConfig
from training.dcgan_config import AutoencoderConfig
from training.dcgan_loss import make_dcgan_loss
from training.direction_log import make_direction_log
from training.discriminator.kinds import new_discriminator
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.kinds import new_generator
from training.loss import ProjectedGANLoss
from training.presets import dcgan, quickstart
from training.run_state import RunParts, TrainState, capture, describe_data, restore_, stored_config
from training.state_file import StateFileError, load_state, write_state
from training.train_step import StepContext, discriminator_step, generator_step, path_length_step
from training.training_loop import make_optimizer

BATCH_SIZE, NUM_CLASSES = 8, 3
PATH = Path("checkpoints/state-000000016.pt")


def dcgan_config(objective: str, loss: str = "san", c_dim: int = 0) -> TrainConfig:
    config = dcgan(objective)
    generator = replace(config.generator, img_resolution=8, channel_base=8, z_dim=16, c_dim=c_dim)
    discriminator = replace(config.discriminator, img_resolution=8)
    if not isinstance(discriminator, AutoencoderConfig):
        bases = tuple(base // 8 for base in discriminator.channel_bases)
        discriminator = replace(discriminator, channel_bases=bases, c_dim=c_dim)
    sizes = {"batch_size": BATCH_SIZE, "microbatch_size": BATCH_SIZE // 2, "san_diagnostics_interval": 3}
    return replace(config, loss=loss, generator=generator, discriminator=discriminator, **sizes)


@pytest.fixture
def make_config(tiny_generator_config, tiny_discriminator_config) -> Callable[[str], TrainConfig]:
    """make_config(name) -> the configuration of a tiny run."""

    def make(name: str) -> TrainConfig:
        if not name.startswith("xl"):
            objective, _, loss = name.partition("/")
            return dcgan_config(objective, loss or "san", c_dim=0 if objective in ("infogan", "began") else 3)
        config = quickstart()
        return replace(
            config,
            loss=name.partition("/")[2],
            generator=tiny_generator_config(NUM_CLASSES, num_fp16_res=0),
            discriminator=tiny_discriminator_config(NUM_CLASSES, max_head_channels=16, class_dim=8),
            loss_terms=replace(config.loss_terms, pl_weight=2.0),
            batch_size=BATCH_SIZE,
            microbatch_size=BATCH_SIZE // 2,
            san_diagnostics_interval=3,
        )

    return make


class Run:
    """A tiny run whose batches are a function of the images seen."""

    def __init__(self, config: TrainConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self.config = config
        if config.is_dcgan:
            self.D, loss = new_discriminator(config.discriminator, config.loss), make_dcgan_loss(config)
        else:
            self.D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
            loss = ProjectedGANLoss(config)
            rng = torch.Generator().manual_seed(
                0
            )  # pretrained weights: the same in every run, and not in its state
            for buffer in self.D.feature_networks.buffers():
                buffer.copy_(torch.rand(buffer.shape, generator=rng) * 0.1 - 0.05)
        self.G = new_generator(config.generator)
        self.D.set_trainable_(False)
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        self.G_optimizer = make_optimizer(self.G.parameters(), config.generator_optimizer)
        self.D_optimizer = make_optimizer(self.D.trainable_parameters(), config.discriminator_optimizer)
        self.stats, self.clock = StatsCollector(), TrainState()
        self.context = StepContext(config, loss, self.stats)
        loss.directions = make_direction_log(config, self.D)
        others = {"clock": self.clock, "stats": self.stats}
        if loss.directions is not None:
            others["directions"] = loss.directions
        self.parts = RunParts(
            config,
            describe_data("abc", 10),
            self.G,
            self.D,
            self.G_ema,
            self.G_optimizer,
            self.D_optimizer,
            others,
        )

    def draw(self) -> Batch:
        start = self.clock.cur_nimg
        torch.manual_seed(start)
        labels = torch.arange(BATCH_SIZE) % NUM_CLASSES if self.config.generator.c_dim else None
        images = torch.randn(BATCH_SIZE, 3, *[self.config.generator.img_resolution] * 2).clamp(-1, 1)
        draws = Draws(0, np.arange(start, start + BATCH_SIZE))
        return Batch(images, labels, torch.randn(BATCH_SIZE, self.G.z_dim), labels, draws)

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.context.cur_nimg = self.clock.cur_nimg
            generator_step(self.G, self.D, self.G_optimizer, self.draw(), self.context)
            if self.config.loss_terms.pl_weight:
                step = (self.G, self.G_optimizer, self.draw(), self.clock.pl_mean, self.context)
                self.clock.pl_mean = path_length_step(*step)
            discriminator_step(self.G, self.D, self.D_optimizer, self.draw(), self.context)
            update_ema_(self.G_ema, self.G, 0.9)
            self.clock.cur_nimg += BATCH_SIZE
            self.clock.cur_iteration += 1

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a run has, buffers that are never saved included."""
        found = {}
        for name, module in (("G", self.G), ("D", self.D), ("G_ema", self.G_ema)):
            found |= {f"{name}.{key}": value for key, value in named_tensors(module).items()}
        for name, optimizer in (("G", self.G_optimizer), ("D", self.D_optimizer)):
            for index, moments in optimizer.state_dict()["state"].items():
                found |= {f"{name} optimizer.{index}.{key}": value for key, value in moments.items()}
        return found | {"pl_mean": self.clock.pl_mean}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


CASES = [
    *("xl/san", "xl/gan"),
    *("nonsaturating", "nonsaturating/gan", "wgan", "wgan_gp", "curriculum", "relativistic"),
    *("infogan", "began/gan"),
]


@pytest.mark.parametrize("name", CASES)
def test_going_on_equals_never_stopping(make_config, tmp_path: Path, name: str) -> None:
    config = make_config(name)
    straight, first, second = Run(config, 0), Run(config, 0), Run(config, seed=5)
    straight.train(5)
    first.train(2)
    write_state(tmp_path / PATH.name, capture(first.parts))
    assert restore_(second.parts, load_state(tmp_path / PATH.name), PATH) == []
    assert_equal(second.tensors(), first.tensors())
    second.train(3)
    assert_equal(second.tensors(), straight.tensors())
    assert second.stats.flush() == straight.stats.flush()
    assert second.clock.cur_iteration == 5 and second.clock.cur_nimg == 5 * BATCH_SIZE


@pytest.mark.parametrize("name", CASES)
def test_everything_that_moves_is_in_the_state(make_config, name: str) -> None:
    run = Run(make_config(name), 0)
    networks = {"G": run.G, "D": run.D, "G_ema": run.G_ema}
    before = {name: {k: v.clone() for k, v in named_tensors(m).items()} for name, m in networks.items()}
    run.train(2)
    saved = capture(run.parts)["networks"]
    for network, module in networks.items():
        moved = [k for k, v in named_tensors(module).items() if not torch.equal(v, before[network][k])]
        assert moved and set(moved) <= saved[network].keys()


def test_moments_lie_in_memory_as_their_parameters_do(make_config, tmp_path: Path) -> None:
    """A fused step goes through both in the order of memory, so anything else would mix up the weights."""
    first, second = (Run(make_config("xl/san"), seed) for seed in (0, 1))
    first.train(1)
    parameters = second.D_optimizer.param_groups[0]["params"]
    assert any(not p.is_contiguous() for p in parameters)  # channels_last
    write_state(tmp_path / PATH.name, capture(first.parts))
    state = load_state(tmp_path / PATH.name)
    for moments in state["optimizers"]["D"].values():
        moments["exp_avg"] = moments["exp_avg"].contiguous()
    restore_(second.parts, state, PATH)
    for parameter, moments in second.D_optimizer.state.items():
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == parameter.stride()


def test_hyperparameters_are_those_of_the_configuration(make_config) -> None:
    config = make_config("nonsaturating")
    first = Run(config, 0)
    first.train(1)
    changed = replace(config, generator_optimizer=replace(config.generator_optimizer, lr=0.5))
    second = Run(changed, 0)
    restore_(second.parts, capture(first.parts), PATH)
    assert second.G_optimizer.param_groups[0]["lr"] == 0.5
    assert stored_config(capture(first.parts), PATH)["generator_optimizer"]["lr"] != 0.5


# What does not fit.


def state_of(run: Run) -> dict[str, Any]:
    """A state that shares nothing with its run."""
    run.train(1)
    return copy.deepcopy(capture(run.parts))


def drop(table: dict, name: str) -> None:
    del table[name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: drop(s["networks"]["G"], "layers.0.weight"), "G of .*lacks tensor 'layers.0.weight'"),
        (lambda s: s["networks"]["D"].update(x=torch.ones(1)), "D of .*has unknown tensor 'x'"),
        (
            lambda s: s["networks"]["G_ema"].update({"layers.0.weight": torch.ones(2)}),
            r"G_ema of .*tensor 'layers.0.weight' has shape \(2,\)",
        ),
        (
            lambda s: s["optimizers"]["G"][0].update(exp_avg=torch.ones(2)),
            r"exp_avg of G's 'layers.0.weight' has shape \(2,\), expected",
        ),
        (lambda s: s["optimizers"]["D"].update({99: {}}), "the optimizer of D trained parameter 99"),
        (lambda s: s["data"].update(content_hash="xyz"), r"other content \(xyz, now abc\)"),
        (lambda s: s["data"].update(num_images=11), r"another number of images \(11, now 10\)"),
        (lambda s: drop(s, "optimizers"), "lacks a part of its state"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changed(make_config, damage, message: str) -> None:
    config = make_config("nonsaturating")
    state, run = state_of(Run(config, 0)), Run(config, 1)
    run.train(1)
    before = {name: value.clone() for name, value in run.tensors().items()}
    damage(state)
    with pytest.raises(StateFileError, match=message) as caught:
        restore_(run.parts, state, PATH)
    assert str(PATH) in str(caught.value) and "\n" not in str(caught.value)
    assert_equal(run.tensors(), before)


def test_other_networks_are_refused(make_config) -> None:
    state = state_of(Run(make_config("nonsaturating"), 0))
    with pytest.raises(StateFileError, match=r"D of .*tensor"):
        restore_(Run(make_config("nonsaturating/gan"), 0).parts, state, PATH)


def test_notes_about_other_processes_and_unknown_parts(make_config) -> None:
    state = state_of(Run(make_config("nonsaturating"), 0))
    run = Run(make_config("nonsaturating"), 1)
    state["world_size"] = 4
    drop(state["others"], "directions")
    notes = restore_(run.parts, state, PATH)
    assert len(notes) == 2 and "'directions', which starts anew" in notes[0] and "had 4 processes" in notes[1]
    assert run.context.loss.directions.num_steps == 0


def test_an_unknown_hash_is_not_compared(make_config) -> None:
    state = state_of(Run(make_config("nonsaturating"), 0))
    state["data"]["content_hash"] = None
    assert restore_(Run(make_config("nonsaturating"), 1).parts, state, PATH) == []


def test_a_state_without_a_configuration(make_config) -> None:
    with pytest.raises(StateFileError, match="no configuration that can be read"):
        stored_config({"config": "{"}, PATH)
