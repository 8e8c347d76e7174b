# SPDX-License-Identifier: MIT
"""Gradient penalties: closed forms, a naive double backward by finite differences, and what SAN heads let through."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import san
from training.batch import Batch
from training.dcgan_loss import make_dcgan_loss
from training.draws import Draws
from training.penalties import (
    image_gradients,
    interpolate,
    perturb,
    unit_norm_penalty,
    zero_norm_penalty,
)
from training.presets import dcgan

SHAPE = (4, 2, 3, 3)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_linear_critic_has_the_gradient_of_its_weights():
    """f(x) = <w, x>: the gradient is w everywhere, whatever the batch."""
    w, images = draw(18), draw(*SHAPE).requires_grad_()
    gradients = image_gradients(images.flatten(1) @ w.unsqueeze(1), images)
    for row in gradients:
        torch.testing.assert_close(row.flatten(), w)
    norm = w.norm().item()
    torch.testing.assert_close(unit_norm_penalty(gradients), torch.full((4,), (norm - 1) ** 2).double())
    torch.testing.assert_close(zero_norm_penalty(gradients), torch.full((4,), norm**2).double())


def test_quadratic_critic():
    """f(x) = a |x|^2 / 2: the gradient is a x, so R1 = a^2 |x|^2 and d R1 / d a = 2 a |x|^2."""
    a, images = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), draw(*SHAPE).requires_grad_()
    logits = a / 2 * images.flatten(1).square().sum(1, keepdim=True)
    gradients = image_gradients(logits, images)
    squares = images.detach().flatten(1).square().sum(1)
    torch.testing.assert_close(zero_norm_penalty(gradients), 0.49 * squares)
    (actual,) = torch.autograd.grad(zero_norm_penalty(gradients).sum(), a, retain_graph=True)
    torch.testing.assert_close(actual, 1.4 * squares.sum())
    (actual,) = torch.autograd.grad(unit_norm_penalty(gradients).sum(), a)
    torch.testing.assert_close(actual, (2 * (0.7 * squares.sqrt() - 1) * squares.sqrt()).sum())


@pytest.mark.parametrize("measure", [unit_norm_penalty, zero_norm_penalty])
def test_gradient_of_the_penalty_matches_finite_differences(measure):
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 5), nn.Softplus(), nn.Linear(5, 1)).double()
    weight, images = net[1].weight, draw(*SHAPE)

    def penalty() -> torch.Tensor:
        """Image by image: the naive way."""
        total = 0.0
        for image in images:
            point = image.unsqueeze(0).clone().requires_grad_()
            (gradient,) = torch.autograd.grad(net(point).sum(), point, create_graph=True)
            length = gradient.square().sum().sqrt()
            total = total + ((length - 1) ** 2 if measure is unit_norm_penalty else length**2)
        return total

    points = images.clone().requires_grad_()
    value = measure(image_gradients(net(points), points)).sum()
    torch.testing.assert_close(value, penalty())
    (actual,) = torch.autograd.grad(value, weight)
    step = 1e-6
    for index in ((0, 0), (3, 7)):
        with torch.no_grad():
            weight[index] += step
            above = penalty_value(penalty)
            weight[index] -= 2 * step
            below = penalty_value(penalty)
            weight[index] += step
        assert actual[index].item() == pytest.approx((above - below) / (2 * step), rel=1e-5)


def penalty_value(penalty) -> float:
    with torch.enable_grad():
        return penalty().item()


def test_constant_critic_gives_a_finite_gradient():
    images = draw(*SHAPE).requires_grad_()
    w = torch.zeros(18, 1, dtype=torch.float64, requires_grad=True)
    penalty = unit_norm_penalty(image_gradients(images.flatten(1) @ w, images)).mean()
    (gradient,) = torch.autograd.grad(penalty, w)
    assert penalty.item() == pytest.approx(1) and gradient.isfinite().all()


def test_penalties_stay_off_the_direction():
    D = nn.Sequential(nn.Flatten(), nn.Linear(18, 6), nn.LeakyReLU(0.2), san.SANLinear(6, 1)).double()
    images = draw(*SHAPE).requires_grad_()
    zero_norm_penalty(image_gradients(D(images).fun, images)).sum().backward()
    assert D[3].weight.grad is None or not D[3].weight.grad.any()
    assert D[3].scale.grad.abs() > 0 and D[1].weight.grad.abs().max() > 0


def test_points():
    real, fake = torch.zeros(2, 1, 1, 2), torch.ones(2, 1, 1, 2)
    points = interpolate(real, fake, torch.tensor([0.25, 0.5]))
    assert points.flatten().tolist() == [0.25, 0.25, 0.5, 0.5]
    real = torch.tensor([1.0, 3.0, -1.0, 5.0]).view(2, 1, 1, 2)
    points = perturb(real, torch.ones_like(real), torch.tensor([0.0, 1.0]))
    radius = 0.5 * (20 / 3) ** 0.5  # squares around the mean 2: 1 + 1 + 9 + 9
    torch.testing.assert_close(points.flatten(), torch.tensor([1.0, 3.0, -1 + radius, 5 + radius]))


class Quadratic(nn.Module):
    """f(x) = |x|^2 / 2, whose gradient is x: a penalty says where it looks. Keeps the images that it judged."""

    def __init__(self) -> None:
        super().__init__()
        self.judged: list[torch.Tensor] = []

    def forward(self, images, labels, augment) -> dict[str, san.SANLogits]:
        self.judged.append(images.detach())
        return {"critic0": san.SANLogits.plain(images.flatten(1).square().sum(1, keepdim=True) / 2)}


@pytest.mark.parametrize("objective", ["wgan_gp", "dragan", "relativistic"])
def test_each_objective_looks_at_its_own_points(objective):
    """WGAN-GP between real and generated images, DRAGAN beside real ones, R1 and R2 at both; values by hand."""
    config = dcgan(objective)
    loss, D = make_dcgan_loss(replace(config, loss="gan")), Quadratic()
    real, fake = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4)
    batch = Batch(real, None, torch.randn(6, 100), None, Draws(0, np.arange(6)))
    value = loss.penalty(D, fake, batch, cur_nimg=0)
    lengths = [points.flatten(1).norm(dim=1) for points in D.judged]
    if objective == "relativistic":
        assert torch.equal(D.judged[0], real) and torch.equal(D.judged[1], fake)
        torch.testing.assert_close(value, lengths[0].square() + lengths[1].square())
        return
    (points,) = D.judged
    torch.testing.assert_close(value, (lengths[0] - 1).square())
    if objective == "wgan_gp":
        places = ((points - real) / (fake - real)).flatten(1)
        torch.testing.assert_close(places, places[:, :1].expand_as(places), rtol=1e-2, atol=1e-3)
        assert places.min() > -1e-3 and places.max() < 1 + 1e-3 and places[:, 0].unique().numel() == 6
    else:
        steps = (points - real) / (0.5 * real.std())  # alpha times noise, both uniform in [0, 1)
        assert steps.min() >= -1e-5 and steps.max() < 1
        assert steps.flatten(1).std(dim=1).min() > 0.005  # noise, not one shift of all pixels
