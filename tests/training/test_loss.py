# SPDX-License-Identifier: MIT
"""What the loss class promises: means, sums over backbones, the direction term, blur, augmentation, guidance."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import san
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import ConfigError, TrainConfig
from training.draws import Draws
from training.loss import (
    PAPER_MICROBATCH_SIZE,
    GuidanceClassifier,
    ProjectedGANLoss,
    path_length_penalty,
    path_lengths,
)
from training.presets import stylegan_xl


def make_config(kind: str) -> TrainConfig:
    """No augmentation; blur as in StyleGAN-XL."""
    config = stylegan_xl()
    return replace(config, loss=kind, discriminator=replace(config.discriminator, augment_policy=""))


def test_path_length_of_a_linear_generator():
    """images = w M: the gradient of sum(images * noise) is M noise, whatever w is."""
    M, ws = torch.randn(5, 12, requires_grad=True), torch.randn(3, 2, 5, requires_grad=True)
    noise = torch.randn(3, 3, 2, 2)
    images = (ws.sum(dim=1) @ M).view(3, 3, 2, 2)
    actual_lengths = path_lengths(images, ws, noise, keeps_graph=True)
    lengths = (noise.flatten(1) @ M.T).norm(dim=1)
    torch.testing.assert_close(actual_lengths, lengths)
    penalty = path_length_penalty(actual_lengths, lengths.detach().mean(), torch.tensor(0.5), decay=0.1)
    mean = 0.9 * 0.5 + 0.1 * lengths.mean()
    expected = (lengths - mean).square()
    torch.testing.assert_close(penalty, expected)
    actual_gradient, expected_gradient, gradient_past_the_mean = (
        torch.autograd.grad(x.sum(), M, retain_graph=True)[0]
        for x in (penalty, expected, (lengths - mean.detach()).square())
    )
    torch.testing.assert_close(actual_gradient, expected_gradient)  # the mean sends gradients too
    assert (actual_gradient - gradient_past_the_mean).abs().max() > 0.05 * actual_gradient.abs().max()


def test_path_length_penalty_of_parts_is_that_of_the_whole():
    """Value and gradient: the gradient through the mean of all lengths is written down in each part."""
    lengths, pl_mean = torch.rand(6, dtype=torch.float64).requires_grad_(), torch.tensor(0.3).double()
    whole = (lengths - pl_mean.lerp(lengths.mean(), 0.2)).square()
    parts = [path_length_penalty(x, lengths.detach().mean(), pl_mean, 0.2) for x in lengths.split([1, 3, 2])]
    torch.testing.assert_close(torch.cat(parts), whole)
    expected, actual = (torch.autograd.grad(x.sum(), lengths)[0] for x in (whole, torch.cat(parts)))
    torch.testing.assert_close(actual, expected)


def test_path_lengths_without_a_graph_are_the_same():
    ws = torch.randn(3, 2, 5, requires_grad=True)
    noise = torch.randn(3, 3, 2, 2)
    M = torch.randn(5, 12)
    lengths = [
        path_lengths(torch.tanh(ws.sum(dim=1) @ M).view(3, 3, 2, 2), ws, noise, keeps_graph)
        for keeps_graph in (False, True)
    ]
    assert torch.equal(*lengths) and [x.requires_grad for x in lengths] == [False, True]


class ConstantLogits(nn.Module):
    """Two backbones whose logits are given, and which record what they were called with."""

    def __init__(self, *logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.calls = logits, []

    def forward(self, images, labels, augment):
        self.calls.append((images, augment))
        return {str(i): san.SANLogits.plain(x) for i, x in enumerate(self.logits)}


def make_batch(images: torch.Tensor, labels: torch.Tensor | None = None) -> Batch:
    draws = Draws(0, np.arange(len(images)))
    return Batch(images, labels, torch.zeros(len(images), 4), labels, draws)


def test_loss_does_not_depend_on_the_number_of_samples_and_adds_backbones():
    config, stats = make_config("gan"), StatsCollector()
    loss = ProjectedGANLoss(config)
    for num_samples in (1, 2, 8):
        first, second = torch.full((num_samples, 64), 0.25), torch.full((num_samples, 20), -3.0)
        D = ConstantLogits(first, second)
        images = torch.zeros(num_samples, 3, 16, 16)
        assert loss.generator_loss(D, images, make_batch(images), 10**6, stats).item() == pytest.approx(
            -0.25 + 3
        )
        batch = make_batch(images)
        assert loss.fake_loss(D, images, batch, 10**6, stats).item() == pytest.approx(1.25 + 0)
        assert loss.real_loss(D, batch, 10**6, stats).item() == pytest.approx(0.75 + 4)


def test_san_adds_the_direction_term():
    logits = torch.linspace(-2, 2, 12).view(3, 4)
    images, stats = torch.zeros(3, 3, 16, 16), StatsCollector()
    san_loss, gan_loss = (ProjectedGANLoss(make_config(kind)) for kind in ("san", "gan"))
    real, fake = ConstantLogits(logits + 0.1), ConstantLogits(logits - 0.3)
    batch = make_batch(images)
    for loss_name, D, inputs, sign in (("real_loss", real, (), -1), ("fake_loss", fake, (images,), 1)):
        extra = getattr(san_loss, loss_name)(D, *inputs, batch, 0, stats) - getattr(gan_loss, loss_name)(
            D, *inputs, batch, 0, stats
        )
        torch.testing.assert_close(extra, sign * D.logits[0].mean())
    same = (loss.generator_loss(fake, images, make_batch(images), 0, stats) for loss in (san_loss, gan_loss))
    assert len({value.item() for value in same}) == 1


@pytest.mark.parametrize("objective", san.OBJECTIVES)
@pytest.mark.parametrize("kind", ["san", "gan"])
def test_every_objective_of_single_logits_goes_through(objective, kind):
    """With its own functions on both backbones; the SAN form adds its potential."""
    chosen = san.OBJECTIVES[objective]
    if kind == "san" and chosen.potential is None:
        pytest.skip("no SAN form")
    loss, stats = ProjectedGANLoss(replace(make_config(kind), objective=objective)), StatsCollector()
    images, real, fake = torch.zeros(3, 3, 16, 16), torch.randn(3, 4), torch.randn(3, 4)
    batch = make_batch(images)
    D = ConstantLogits(fake, 2 * fake)
    potential = chosen.potential if kind == "san" else torch.zeros_like
    expected = [chosen.fake(x).mean() + potential(x).mean() for x in (fake, 2 * fake)]
    parts = loss.discriminator_losses(D, images, batch, 0, stats)
    torch.testing.assert_close(next(parts), sum(expected))
    D.logits = (real, 2 * real)  # reals are judged after the fakes' backward pass
    expected = [chosen.real(x).mean() - potential(x).mean() for x in (real, 2 * real)]
    torch.testing.assert_close(next(parts), sum(expected))
    torch.testing.assert_close(
        loss.generator_loss(D, images, batch, 0, stats), sum(chosen.generator(x).mean() for x in D.logits)
    )


def test_all_images_are_blurred_early_and_left_alone_later():
    config, stats = make_config("san"), StatsCollector()
    loss = ProjectedGANLoss(config)
    images = torch.randn(2, 3, 16, 16)
    batch = make_batch(images)
    for term, inputs in ((loss.generator_loss, (images,)), (loss.fake_loss, (images,)), (loss.real_loss, ())):
        D = ConstantLogits(torch.zeros(2, 4))
        for cur_nimg in (0, 150_000, 300_000):
            term(D, *inputs, batch, cur_nimg, stats)
        deviations = [seen.std().item() for seen, _ in D.calls]
        assert deviations[0] < deviations[1] < deviations[2] == images.std().item()


def test_augmentation_is_the_policys():
    config, images = make_config("san"), torch.randn(2, 3, 16, 16)
    D = ConstantLogits(torch.zeros(2, 4))
    draws = Draws(0, np.arange(2))
    ProjectedGANLoss(config).run_discriminator(D, images, None, 10**6, draws)
    with_policy = replace(config, discriminator=replace(config.discriminator, augment_policy="translation"))
    ProjectedGANLoss(with_policy).run_discriminator(D, images, None, 10**6, draws)
    (_, without), (_, augment) = D.calls
    assert without is None
    constant = torch.ones(2, 3, 16, 16)
    assert set(augment(constant).unique().tolist()) <= {0.0, 1.0}  # "color" would change the ones


def test_guidance_classifier_is_frozen_and_sees_normalized_images():
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.BatchNorm2d(3)

        def forward(self, x):
            assert not self.training
            self.seen = x
            return x.mean(dim=(2, 3))

    classifier = GuidanceClassifier(Spy())
    assert not any(p.requires_grad for p in classifier.parameters())
    images = torch.full((2, 3, 16, 16), -1.0).requires_grad_()
    classifier(images).sum().backward()
    assert classifier.model.seen.shape == (2, 3, 224, 224) and images.grad.abs().max() > 0
    black = torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(classifier.model.seen.mean(dim=(0, 2, 3)), -black)


@pytest.mark.parametrize("num_samples", [1, 4, 8])
def test_the_papers_guidance_weight_means_one_per_sample(num_samples):
    """--cls_weight 8 weighs the guidance like one backbone's loss, whatever the micro-batch."""
    assert PAPER_MICROBATCH_SIZE == 8
    config = make_config("san")
    config = replace(config, loss_terms=replace(config.loss_terms, cls_weight=8.0))
    stats, D = StatsCollector(), ConstantLogits(torch.full((num_samples, 4), 0.25))
    loss = ProjectedGANLoss(config, nn.Flatten())  # pixels as logits: equal ones, so -log(1 / classes)
    images = torch.zeros(num_samples, 3, 4, 4)
    value = loss.generator_loss(D, images, make_batch(images, torch.arange(num_samples)), 0, stats)
    assert value.item() == pytest.approx(-0.25 + math.log(48))
    assert stats.flush()["Loss/G/guidance_loss"]["mean"] == pytest.approx(math.log(48))


def test_objective_without_a_san_form_is_refused_for_san_only():
    with pytest.raises(ConfigError, match="'least_squares' has no SAN form"):
        ProjectedGANLoss(replace(make_config("san"), objective="least_squares"))
    ProjectedGANLoss(replace(make_config("gan"), objective="least_squares"))


def test_unknown_objective_is_refused():
    config = replace(make_config("san"), objective="hingee")
    with pytest.raises(ConfigError, match="'hingee' is not one of hinge, wasserstein"):
        ProjectedGANLoss(config)
