# SPDX-License-Identifier: MIT
"""The three updates on tiny networks: independent of the micro-batch, each touching its own network, none silent."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from san.layers import SANLayer
from torch_utils.stats import StatsCollector
from training.config import LossConfig, TrainConfig
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.generator import Generator
from training.loss import ProjectedGANLoss
from training.presets import quickstart
from training.train_step import (
    Batch,
    StepContext,
    apply_gradients,
    discriminator_step,
    generator_step,
    mix_styles,
)

NUM_CLASSES, BATCH_SIZE, Z_DIM = 3, 16, 4


@pytest.fixture(scope="module")
def tiny_config(tiny_generator_config, tiny_discriminator_config) -> Callable[..., TrainConfig]:
    """tiny_config(loss, c_dim, microbatch_size): 16x16 images, Lite0 with two heads; no augmentation, no blur."""

    def make(loss: str = "san", c_dim: int = NUM_CLASSES, microbatch_size: int = BATCH_SIZE) -> TrainConfig:
        discriminator = tiny_discriminator_config(
            c_dim, max_head_channels=16, class_dim=8, embedding_dim=6, augment_policy=""
        )
        return replace(
            quickstart(),
            loss=loss,
            generator=tiny_generator_config(c_dim, num_fp16_res=0),
            discriminator=discriminator,
            loss_terms=LossConfig(blur_fade_kimg=0, pl_weight=2.0),
            batch_size=BATCH_SIZE,
            microbatch_size=microbatch_size,
        )

    return make


@pytest.fixture(scope="module")
def prototypes(tiny_config) -> dict[str, tuple[TrainConfig, Generator, ProjectedDiscriminator]]:
    """Configuration, G and D for "san" and "gan", their heads' statistics settled; the tests work on copies."""
    made = {}
    for loss in ("san", "gan"):
        torch.manual_seed(1)
        config = tiny_config(loss)
        G = Generator(config.generator)
        D = ProjectedDiscriminator(config.discriminator, loss, pretrained=False)
        with torch.no_grad():
            for _ in range(30):
                D(torch.randn(8, 3, 16, 16), torch.randint(NUM_CLASSES, (8,)))
        made[loss] = (config, G, D)
    return made


class Run:
    """Copies of the networks with optimizers, and batches that depend on the iteration only."""

    def __init__(self, prototypes: dict, loss: str = "san", microbatch_size: int = BATCH_SIZE) -> None:
        config, *networks = prototypes[loss]
        self.config = replace(config, microbatch_size=microbatch_size)
        self.G, self.D = copy.deepcopy(networks)
        self.G_optimizer = torch.optim.Adam(self.G.parameters(), lr=0.0025, betas=(0.0, 0.99))
        self.D_optimizer = torch.optim.Adam(self.D.trainable_parameters(), lr=0.002, betas=(0.0, 0.99))
        self.stats = StatsCollector()
        self.context = StepContext(self.config, ProjectedGANLoss(self.config), self.stats)

    def generator_step(self, batch: Batch) -> None:
        self.D.set_trainable_(False)  # as `discriminator_step` leaves it
        generator_step(self.G, self.D, self.G_optimizer, batch, self.context)

    def discriminator_step(self, batch: Batch) -> None:
        discriminator_step(self.G, self.D, self.D_optimizer, batch, self.context)

    def trace(self, num_iterations: int) -> torch.Tensor:
        """Losses (num_iterations, 2) of G and D, iteration by iteration."""
        losses = []
        for i in range(num_iterations):
            self.generator_step(make_batch(2 * i))
            self.discriminator_step(make_batch(2 * i + 1))
            stats = self.stats.flush()
            losses.append([stats["Loss/G/loss"]["mean"], stats["Loss/D/loss"]["mean"]])
        return torch.tensor(losses)


def make_batch(seed: int, size: int = BATCH_SIZE) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    labels, fake_labels = (torch.randint(NUM_CLASSES, (size,), generator=rng) for _ in range(2))
    images = torch.randn(size, 3, 16, 16, generator=rng).clamp(-1, 1)
    z = torch.randn(size, Z_DIM, generator=rng)
    return Batch(images, labels, z, fake_labels, Draws(seed, np.arange(size)))


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


# The micro-batch changes memory and speed, nothing else.


class Rounded(nn.Module):
    """Stands in for ReLU6 and leaky ReLU, with a smooth corner."""

    def forward(self, x):
        return nn.functional.softplus(4 * x) / 4


def round_corners_(network: nn.Module) -> None:
    """Rounding differs with the micro-batch and carries a few of a million activations across a corner.

    There the gradient jumps, by a thousandth or so, and Adam makes of that another trajectory within five steps.
    Without corners ten steps agree to about 1e-5.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.LeakyReLU, nn.ReLU6)):
                setattr(module, name, Rounded())


@pytest.mark.parametrize("loss", ["san", "gan"])
def test_ten_steps_do_not_depend_on_the_microbatch(prototypes, loss):
    """With heads in evaluation mode: in training mode BatchNorm sees, and moves with, the micro-batch."""
    traces = {}
    for microbatch_size in (4, 8, 16):
        run = Run(prototypes, loss, microbatch_size)
        round_corners_(run.D.eval())
        traces[microbatch_size] = run.trace(10)
    assert traces[16].isfinite().all()
    assert (traces[16][0] - traces[16][-1]).abs().max() > 0.01  # it did train
    for microbatch_size in (4, 8):
        torch.testing.assert_close(traces[microbatch_size], traces[16], rtol=1e-4, atol=1e-5)


def test_batchnorm_in_training_mode_does_depend_on_the_microbatch(prototypes):
    """The check of the test above can fail."""
    first, second = (Run(prototypes, "san", size).trace(1) for size in (4, 16))
    assert (first - second).abs().max() > 1e-3 * second.abs().max()


def test_gradients_do_not_depend_on_the_microbatch(prototypes):
    runs = [Run(prototypes, "san", microbatch_size) for microbatch_size in (4, 16)]
    for run in runs:
        round_corners_(run.D.eval())
        for group in run.G_optimizer.param_groups:
            group["lr"] = 0.0
        run.generator_step(make_batch(0))
        run.discriminator_step(make_batch(1))
    assert_same_gradients(*runs)


# Each step touches its own network.


@pytest.mark.parametrize("loss", ["san", "gan"])
def test_generator_step_leaves_the_discriminator_alone(prototypes, loss):
    run = Run(prototypes, loss)
    G_before, D_before = snapshot(run.G), snapshot(run.D)
    run.generator_step(make_batch(0))
    moved = changed(run.G, G_before)
    weights = {name for name, _ in run.G.named_parameters()}
    assert moved == weights  # and no buffer: running means move in the discriminator's step only
    assert all(p.grad is None for p in run.D.parameters())
    # Parameters stay; BatchNorm and spectral norm follow every pass in training mode, as in the official code.
    assert not changed(run.D, D_before) & {name for name, _ in run.D.named_parameters()}
    run.D.eval()
    D_before = snapshot(run.D)
    run.generator_step(make_batch(1))
    assert not changed(run.D, D_before)


@pytest.mark.parametrize("loss", ["san", "gan"])
def test_discriminator_step_leaves_the_generator_alone(prototypes, loss):
    run = Run(prototypes, loss)
    G_before, D_before = snapshot(run.G), snapshot(run.D)
    run.discriminator_step(make_batch(0))
    assert changed(run.G, G_before) == {"mapping.w_avg"}
    assert all(p.grad is None for p in run.G.parameters())
    moved = changed(run.D, D_before)
    assert all(name.startswith("heads.") for name in moved)
    assert {name for name, _ in run.D.heads.named_parameters(prefix="heads")} <= moved
    assert not any(p.requires_grad for p in run.D.parameters())  # left so for the generator's step


def test_gradients_of_the_step_before_do_not_linger(prototypes):
    first, second = Run(prototypes), Run(prototypes)
    for run in (first, second):
        round_corners_(run.D.eval())
        for group in (*run.G_optimizer.param_groups, *run.D_optimizer.param_groups):
            group["lr"] = 0.0
    first.generator_step(make_batch(5))
    first.discriminator_step(make_batch(6))
    for run in (first, second):
        run.generator_step(make_batch(0))
        run.discriminator_step(make_batch(1))
    assert_same_gradients(first, second)


def assert_same_gradients(first: Run, second: Run) -> None:
    """Of G and D, each to 1e-4 of its largest entry."""
    pairs = [
        (a.grad, b.grad)
        for network in ("G", "D")
        for a, b in zip(
            getattr(first, network).parameters(), getattr(second, network).parameters(), strict=True
        )
        if b.grad is not None
    ]
    assert len(pairs) > 30
    assert all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in pairs)


def test_real_and_fake_pass_the_discriminator_apart(prototypes):
    run, sizes = Run(prototypes), []
    run.D.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    run.discriminator_step(make_batch(0))
    assert sizes == [BATCH_SIZE, BATCH_SIZE]


def test_directions_have_unit_norm_after_the_discriminators_step(prototypes):
    run = Run(prototypes, "san")
    layers = [m for m in run.D.modules() if isinstance(m, SANLayer)]
    assert len(layers) == 2
    for group in run.D_optimizer.param_groups:
        group["lr"] = 0.3  # without the projection the norms would be far from one
    before = [layer.weight.clone() for layer in layers]
    run.discriminator_step(make_batch(0))
    for layer, old in zip(layers, before, strict=True):
        assert not torch.equal(layer.weight, old)
        norms = layer.weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5, atol=0)


# Faults are reported.


def test_a_gradient_that_is_not_finite_skips_the_generators_step(prototypes, capsys):
    run = Run(prototypes)
    run.D.eval()
    before, batch = snapshot(run.G), make_batch(0)
    run.generator_step(replace(batch, z=batch.z.clone().fill_(float("nan"))))
    assert not changed(run.G, before)
    warning = capsys.readouterr().out
    assert warning.startswith("Warning: G got a gradient that is not finite at 0 kimg (iteration 0): in ")
    assert warning.count("\n") == 1 and warning.endswith("This step was skipped (1 in a row, 1 in all).\n")
    run.generator_step(batch)
    assert changed(run.G, before) and not capsys.readouterr().out
    stats = run.stats.flush()["Health/nonfinite_G"]
    assert stats["num"] == 2 and stats["mean"] == 0.5


def test_a_gradient_that_is_not_finite_skips_the_discriminators_step(prototypes, capsys):
    run = Run(prototypes)
    run.D.eval()
    before, batch = snapshot(run.D), make_batch(0)
    batch.images[3, 0, 0, 0] = float("inf")
    run.discriminator_step(batch)
    for name, value in run.D.state_dict().items():  # normalising unit vectors again may change their last bit
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)
    assert "Warning: D got a gradient" in capsys.readouterr().out
    assert run.stats.flush()["Health/nonfinite_D"]["mean"] == 1


@pytest.mark.parametrize("bad", [(float("nan"), 0.0), (float("inf"), 1.0), (float("inf"), float("-inf"))])
def test_the_first_bad_parameter_is_named(bad, capsys):
    network = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    network[2].bias.grad = None
    network[1].weight.grad = torch.tensor([bad])
    stats, before = StatsCollector(), snapshot(network)
    context = StepContext(config=None, loss=None, stats=stats)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    apply_gradients(network, optimizer, context, "G")
    assert "(first 1.weight)" in capsys.readouterr().out
    assert not changed(network, before)
    network[1].weight.grad.zero_()
    apply_gradients(network, optimizer, context, "G")
    assert changed(network, before) == {"0.weight", "0.bias", "2.weight"}
    assert stats.flush()["Health/nonfinite_G"]["mean"] == 0.5


# Style mixing, batches.


def test_styles_are_mixed_with_the_given_probability(prototypes):
    (_, G, _), batch = prototypes["san"], make_batch(0)
    ws = G.mapping(batch.z, batch.fake_labels)
    assert torch.equal(mix_styles(G, batch, 0.0), ws)
    crossovers = set()
    for seed in range(4):
        batch = replace(batch, draws=Draws(seed, np.arange(BATCH_SIZE)))
        for is_same in (mix_styles(G, batch, 1.0) == ws).all(dim=2).tolist():  # of each image
            crossover = is_same.index(False)
            assert is_same == [True] * crossover + [False] * (G.num_ws - crossover)
            crossovers.add(crossover)
    assert crossovers == set(range(1, G.num_ws))
    num_mixed = 0
    for seed in range(20):
        batch = replace(batch, draws=Draws(seed, np.arange(BATCH_SIZE)))
        num_mixed += int((mix_styles(G, batch, 0.3) != ws).flatten(1).any(dim=1).sum())
    assert 70 <= num_mixed <= 122  # 0.3 of 320 samples, give or take three standard deviations


def test_mixed_styles_belong_to_samples(prototypes):
    (_, G, _), batch = prototypes["san"], make_batch(0)
    whole, parts = mix_styles(G, batch, 0.5), [mix_styles(G, part, 0.5) for part in batch.split(4)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.equal(whole, mix_styles(G, batch, 0.0))


def test_generator_step_mixes_styles_when_asked(prototypes, monkeypatch):
    run, probabilities = Run(prototypes), []

    def spy(G, batch, probability):
        probabilities.append(probability)
        return mix_styles(G, batch, probability)

    monkeypatch.setattr("training.train_step.mix_styles", spy)
    run.context.config = replace(run.config, loss_terms=replace(run.config.loss_terms, style_mixing_prob=0.7))
    run.generator_step(make_batch(0))
    assert probabilities == [0.7]


@pytest.mark.parametrize(("size", "expected"), [(4, [4, 4, 4, 4]), (16, [16]), (6, [6, 6, 4]), (99, [16])])
def test_batch_is_split_in_order(size, expected):
    batch = make_batch(0)
    parts = batch.split(size)
    assert [len(part.z) for part in parts] == expected
    for name in ("images", "labels", "z", "fake_labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert np.concatenate([part.draws.samples for part in parts]).tolist() == list(range(BATCH_SIZE))


def test_batch_without_labels_is_split():
    parts = replace(make_batch(0), labels=None, fake_labels=None).split(8)
    assert len(parts) == 2 and all(p.labels is None and p.fake_labels is None for p in parts)
