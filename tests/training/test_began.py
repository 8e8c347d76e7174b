# SPDX-License-Identifier: MIT
"""BEGAN's equilibrium: a sequence by hand, its bounds, where it settles, and the measure."""

import numpy as np
import pytest
import torch
from torch import nn

import san
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.began import convergence_measure, next_k
from training.dcgan_loss import BEGANLoss
from training.draws import Draws
from training.presets import dcgan


def k_of(k: float, real: float, fake: float, gamma: float = 0.5, k_lr: float = 0.1) -> float:
    values = (torch.tensor(x, dtype=torch.float64) for x in (k, real, fake))
    return next_k(*values, gamma, k_lr).item()


def test_sequence_by_hand():
    """gamma 0.5, lambda_k 0.1: k + 0.1 (0.5 L(x) - L(G))."""
    k = 0.0
    errors = [(1.0, 0.1), (1.0, 0.3), (0.8, 0.4), (0.6, 0.9), (0.5, 0.9)]
    expected = [0.04, 0.06, 0.06, 0.0, 0.0]  # the last two would be 0 and -0.065
    for (real, fake), target in zip(errors, expected, strict=True):
        k = k_of(k, real, fake)
        assert k == pytest.approx(target, abs=1e-12)


def test_k_stays_between_0_and_1():
    assert k_of(0.99, real=10.0, fake=0.0) == 1
    assert k_of(0.01, real=0.0, fake=10.0) == 0


def test_k_rests_where_the_errors_have_the_ratio_gamma():
    assert k_of(0.3, real=0.8, fake=0.56, gamma=0.7) == pytest.approx(0.3)


def test_measure():
    real, fake = torch.tensor(0.8), torch.tensor(0.3)
    assert convergence_measure(real, fake, 0.5).item() == pytest.approx(0.8 + 0.1)
    assert convergence_measure(real, torch.tensor(0.4), 0.5).item() == pytest.approx(0.8)
    assert convergence_measure(real, torch.tensor(0.7), 0.5).item() == pytest.approx(0.8 + 0.3)


class Shrinking(nn.Module):
    """An autoencoder that gives a v for v, so that L(v) = |1 - a| mean |v|."""

    def __init__(self, a: float, k: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.register_buffer("k", torch.tensor(k, dtype=torch.float64))

    def forward(self, images, labels, augment) -> dict[str, san.SANLogits]:
        errors = (images - self.a * images).abs().flatten(1).mean(1, keepdim=True)
        return {"autoencoder": san.SANLogits.plain(errors)}


def test_losses_and_gradients_in_closed_form():
    """D: |1 - a| (m_real - k m_fake), m the mean of |v|; G: |1 - a| m_fake, which pulls every pixel alike."""
    loss, D, stats = BEGANLoss(dcgan("began")), Shrinking(a=0.75, k=0.25), StatsCollector()
    real, fake = (torch.randn(4, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    fake.requires_grad_()
    batch = Batch(real, None, torch.randn(4, 64), None, Draws(0, np.arange(4)))
    balance = (real.abs().mean() - 0.25 * fake.abs().mean()).detach()
    (of_D,) = loss.discriminator_losses(D, fake.detach(), batch, 0, stats)
    torch.testing.assert_close(of_D, 0.25 * balance)
    torch.testing.assert_close(torch.autograd.grad(of_D, D.a)[0], -balance)
    of_G = loss.generator_loss(D, fake, batch, 0, stats)
    torch.testing.assert_close(of_G, 0.25 * fake.detach().abs().mean())
    (gradient,) = torch.autograd.grad(of_G, fake)
    torch.testing.assert_close(gradient, 0.25 * fake.detach().sign() / fake.numel())
