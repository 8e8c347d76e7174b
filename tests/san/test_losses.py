# SPDX-License-Identifier: MIT
"""Objectives on SANLogits: values by hand, who trains what, and short trainings that must get somewhere.

python -m pytest tests/san/test_losses.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import san
from san import OBJECTIVES, SANLogits


def make_logits(seed: int, *shape: int) -> SANLogits:
    """Leaf views of equal value."""
    values = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return SANLogits(values.clone().requires_grad_(), values.clone().requires_grad_())


def naive_losses(name: str, real: Tensor, fake: Tensor) -> tuple[float, float, float]:
    """Discriminator's real and fake loss without direction term, generator's loss: one number at a time."""
    reals, fakes = real.flatten().tolist(), fake.flatten().tolist()
    if name == "hinge":
        real_terms, fake_terms = [max(0.0, 1 - f) for f in reals], [max(0.0, 1 + f) for f in fakes]
    else:
        real_terms, fake_terms = [-f for f in reals], list(fakes)
    mean = [sum(t) / len(t) for t in (real_terms, fake_terms, [-f for f in fakes])]
    return mean[0], mean[1], mean[2]


@pytest.mark.parametrize("name", ["hinge", "wasserstein"])
def test_values_equal_the_formulas(name: str) -> None:
    real, fake = make_logits(0, 5, 3), make_logits(1, 4, 7)
    real_loss, fake_loss, g_loss = naive_losses(name, real.fun, fake.fun)
    objective = OBJECTIVES[name]
    real_mean, fake_mean = real.dir.mean().item(), fake.dir.mean().item()
    assert san.gan_real_loss(objective, real).item() == pytest.approx(real_loss, rel=1e-5)
    assert san.gan_fake_loss(objective, fake).item() == pytest.approx(fake_loss, rel=1e-5)
    assert san.san_real_loss(objective, real).item() == pytest.approx(real_loss - real_mean, rel=1e-5)
    assert san.san_fake_loss(objective, fake).item() == pytest.approx(fake_loss + fake_mean, rel=1e-5)
    assert san.generator_loss(objective, fake).item() == pytest.approx(g_loss, rel=1e-5)
    total = real_loss + fake_loss - real_mean + fake_mean
    d_loss = {"hinge": san.hinge_discriminator_loss, "wasserstein": san.wasserstein_discriminator_loss}[name]
    named_g_loss = {"hinge": san.hinge_generator_loss, "wasserstein": san.wasserstein_generator_loss}[name]
    assert d_loss(real, fake).item() == pytest.approx(total, rel=1e-5)
    assert named_g_loss(fake).item() == pytest.approx(g_loss, rel=1e-5)


@pytest.mark.parametrize("name", ["hinge", "wasserstein"])
def test_gradients_of_the_two_views(name: str) -> None:
    """dir gets the Wasserstein gradient whatever the objective; fun gets the GAN's."""
    real, fake = make_logits(0, 5, 3), make_logits(1, 4, 7)
    san.san_real_loss(OBJECTIVES[name], real).backward()
    san.san_fake_loss(OBJECTIVES[name], fake).backward()
    torch.testing.assert_close(real.dir.grad, torch.full((5, 3), -1 / 15))
    torch.testing.assert_close(fake.dir.grad, torch.full((4, 7), 1 / 28))
    real_active = (real.fun < 1) if name == "hinge" else torch.ones(5, 3)
    fake_active = (fake.fun > -1) if name == "hinge" else torch.ones(4, 7)
    torch.testing.assert_close(real.fun.grad, -real_active.float() / 15)
    torch.testing.assert_close(fake.fun.grad, fake_active.float() / 28)
    if name == "hinge":  # both sides of the hinge are present, or the test would say little
        assert 0 < real_active.sum() < 15
        assert 0 < fake_active.sum() < 28


@pytest.mark.parametrize("name", ["hinge", "wasserstein"])
def test_gan_and_generator_losses_leave_dir_alone(name: str) -> None:
    logits = make_logits(0, 6)
    for loss in (san.gan_real_loss, san.gan_fake_loss, san.generator_loss):
        loss(OBJECTIVES[name], logits).backward()
    assert logits.fun.grad is not None
    assert logits.dir.grad is None


def test_loss_does_not_depend_on_how_the_batch_is_split() -> None:
    logits = make_logits(0, 8, 5)
    for loss in (san.san_real_loss, san.san_fake_loss, san.generator_loss):
        whole = loss(OBJECTIVES["hinge"], logits)
        parts = [loss(OBJECTIVES["hinge"], part) for part in logits.split(2)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_half_precision_logits_are_averaged_in_float32() -> None:
    values = torch.full((1000, 64), 0.1, dtype=torch.bfloat16)
    loss = san.hinge_generator_loss(SANLogits.plain(values))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-values[0, 0].item(), rel=1e-5)
    assert san.hinge_generator_loss(SANLogits.plain(values.double())).dtype == torch.float64


@pytest.mark.parametrize(
    "loss", [san.gan_real_loss, san.gan_fake_loss, san.san_real_loss, san.generator_loss]
)
def test_a_bare_tensor_is_refused_with_the_remedy(loss) -> None:
    with pytest.raises(TypeError, match=r"got a Tensor.*SANLogits\.plain\(tensor\)"):
        loss(OBJECTIVES["hinge"], torch.zeros(3))


def direction_cosine(D: nn.Sequential, real: Tensor, fake: Tensor) -> float:
    """Cosine between the learned direction and the optimal one, the difference of mean features."""
    with torch.no_grad():
        optimal = D[:-1](real).mean(0) - D[:-1](fake).mean(0)
        return F.cosine_similarity(D[-1].weight[0], optimal, dim=0).item()


@pytest.mark.parametrize("name", ["hinge", "wasserstein"])
def test_training_the_direction_lowers_the_loss_and_finds_the_optimum(name: str) -> None:
    torch.manual_seed(0)
    D = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), san.SANLinear(16, 1))
    D[:-1].requires_grad_(False)
    D[-1].scale.requires_grad_(False)
    real, fake = torch.randn(256, 2) * 0.3 + 1.0, torch.randn(256, 2) * 0.3 - 1.0
    optimizer = torch.optim.SGD(D[-1].parameters(), lr=0.3)
    objective, losses = OBJECTIVES[name], []
    for _ in range(100):
        optimizer.zero_grad()
        loss = san.san_real_loss(objective, D(real)) + san.san_fake_loss(objective, D(fake))
        loss.backward()
        optimizer.step()
        assert san.normalize_directions_(D) == 1
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert D[-1].weight.norm().item() == pytest.approx(1.0, abs=1e-6)
    assert direction_cosine(D, real, fake) > 0.999


def test_a_tiny_san_learns_to_move_its_generator() -> None:
    """G(z) = z + shift starts away from the data; a few hundred alternating steps bring it there."""
    torch.manual_seed(0)
    shift = nn.Parameter(torch.tensor([2.0, -1.0]))
    D = nn.Sequential(
        nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), san.SANLinear(32, 1)
    )
    optimizer_G = torch.optim.Adam([shift], lr=2e-2, betas=(0.0, 0.9))
    optimizer_D = torch.optim.Adam(D.parameters(), lr=2e-3, betas=(0.0, 0.9))
    distance = []
    for _ in range(400):
        real, z = torch.randn(64, 2), torch.randn(64, 2)
        optimizer_D.zero_grad()
        san.hinge_discriminator_loss(D(real), D(z + shift.detach())).backward()
        optimizer_D.step()
        san.normalize_directions_(D)
        optimizer_G.zero_grad()
        san.hinge_generator_loss(D(z + shift)).backward()
        optimizer_G.step()
        distance.append(shift.detach().norm().item())
    assert sum(distance[-50:]) / 50 < 0.25 * distance[0]
