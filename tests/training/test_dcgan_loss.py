# SPDX-License-Identifier: MIT
"""Losses of the small networks: closed forms and gradients on given logits, what each term adds, clipping, k."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import san
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import ConfigError, TrainConfig
from training.curriculum import curriculum_weights
from training.dcgan_loss import BEGANLoss, DCGANLoss, clip_weights_, make_dcgan_loss
from training.discriminator.autoencoder import AutoencoderDiscriminator
from training.discriminator.dcgan import CodeLogits, DCGANDiscriminator
from training.draws import Draws
from training.generator.dcgan import latent_inputs
from training.presets import RECIPES, dcgan

N = 6


class PixelMean(nn.Module):
    """Critics whose logits are multiples of an image's mean: f = a x. Float64."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor(factors, dtype=torch.float64))

    def forward(self, images: Tensor, labels: Tensor | None, augment: object) -> dict[str, san.SANLogits]:
        means = images.flatten(1).mean(1, keepdim=True)
        return {f"critic{i}": san.SANLogits.plain(a * means) for i, a in enumerate(self.factors)}


def config_of(objective: str, loss: str = "gan", **critic: object) -> TrainConfig:
    config = dcgan(objective)
    return replace(config, loss=loss, critic=replace(config.critic, **critic))


def make_batch(values: Tensor) -> Batch:
    """Real images whose means are `values`."""
    return batch_of(images_of(values), None, torch.randn(len(values), 100))


def batch_of(images: Tensor, labels: Tensor | None, z: Tensor) -> Batch:
    return Batch(images, labels, z, labels, Draws(0, np.arange(len(z))))


def images_of(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()


def losses(config: TrainConfig, D: nn.Module, real: Tensor, fake: Tensor, cur_nimg: int = 0):
    """Loss of D and loss of G, and their statistics."""
    loss, stats, batch = make_dcgan_loss(config), StatsCollector(), make_batch(real)
    discriminator = sum(loss.discriminator_losses(D, images_of(fake), batch, cur_nimg, stats))
    generator = loss.generator_loss(D, images_of(fake), batch, cur_nimg, stats)
    return discriminator, generator, stats.flush()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# Formula of each objective for one real logit r and one fake logit f: loss of D, loss of G.
FORMULAS = {
    "saturating": lambda r, f: (
        -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)),
        math.log(1 - sigmoid(f)),
    ),
    "nonsaturating": lambda r, f: (
        -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)),
        -math.log(sigmoid(f)),
    ),
    "hinge": lambda r, f: (max(0, 1 - r) + max(0, 1 + f), -f),
    "least_squares": lambda r, f: ((r - 1) ** 2 + f**2, (f - 1) ** 2),
    "soft_least_squares": lambda r, f: (softplus(1 - r) ** 2 + softplus(f) ** 2, softplus(1 - f) ** 2),
    "wgan": lambda r, f: (f - r, -f),
    "relativistic": lambda r, f: (softplus(f - r), softplus(r - f)),
}


@pytest.mark.parametrize("objective", FORMULAS)
def test_closed_form_and_gradient(objective):
    """Values by hand; the gradient with respect to the critic's one weight by finite differences of the formula."""
    real, fake = torch.randn(N).double(), torch.randn(N).double()
    D, step = PixelMean(1.5), 1e-6
    config = config_of(objective, penalty="none")
    actual = losses(config, D, real, fake)[:2]

    def formula(a: float) -> tuple[float, float]:
        pairs = [FORMULAS[objective](a * r, a * f) for r, f in zip(real.tolist(), fake.tolist(), strict=True)]
        return sum(d for d, _ in pairs) / N, sum(g for _, g in pairs) / N

    above, below = formula(1.5 + step), formula(1.5 - step)
    for i, value in enumerate(actual):
        assert value.item() == pytest.approx(formula(1.5)[i], rel=1e-9)
        if objective == "relativistic" and i == 1:
            continue  # the reals are a constant to G: next test
        (gradient,) = torch.autograd.grad(value, D.factors)
        assert gradient.item() == pytest.approx((above[i] - below[i]) / (2 * step), rel=1e-5, abs=1e-9)


def test_relativistic_generator_compares_with_reals_of_the_same_place():
    loss, stats = make_dcgan_loss(config_of("relativistic")), StatsCollector()
    real, fake = torch.randn(N).double(), images_of(torch.randn(N).double()).requires_grad_()
    D = PixelMean(1.0)
    (gradient,) = torch.autograd.grad(loss.generator_loss(D, fake, make_batch(real), 0, stats), fake)
    slopes = -torch.sigmoid(real - fake.detach().flatten(1).mean(1)) / N
    torch.testing.assert_close(gradient.sum((1, 2, 3)), slopes)


@pytest.mark.parametrize("objective", ["saturating", "nonsaturating", "hinge", "soft_least_squares", "wgan"])
def test_san_adds_the_direction_term_to_d_alone(objective):
    """By the potential R of the objective: the mean of R over fakes minus the mean over reals."""
    real, fake = torch.randn(N).double(), torch.randn(N).double()
    D = PixelMean(1.0)
    potential = san.OBJECTIVES[{"wgan": "wasserstein"}.get(objective, objective)].potential
    configs = [replace(config_of(objective, kind), normalizes_san_weights=False) for kind in ("gan", "san")]
    gan, of_san = (losses(config, D, real, fake) for config in configs)
    torch.testing.assert_close(of_san[0] - gan[0], potential(fake).mean() - potential(real).mean())
    assert of_san[1] == gan[1]


@pytest.mark.parametrize("objective", ["saturating", "nonsaturating", "hinge", "soft_least_squares", "wgan"])
def test_by_default_the_weights_of_the_direction_term_have_mean_1(objective):
    real, fake = torch.randn(N).double(), torch.randn(N).double()
    of_objective = san.OBJECTIVES[{"wgan": "wasserstein"}.get(objective, objective)]
    gan, of_san = (losses(config_of(objective, kind), PixelMean(1.0), real, fake) for kind in ("gan", "san"))
    means = [
        (f * w / w.mean()).mean() for f in (fake, real) for w in [san.direction_weights(of_objective, f)]
    ]
    torch.testing.assert_close(of_san[0] - gan[0], means[0] - means[1])


@pytest.mark.parametrize("head_kind", ["san", "gan"])
def test_penalty_of_a_linear_critic(head_kind):
    """f(x) = a mean(x) has a gradient of length a / sqrt(192) everywhere."""
    real, fake, a = torch.randn(N).double(), torch.randn(N).double(), 40.0
    length = a / math.sqrt(3 * 8 * 8)
    expected = {
        "wgan_gp": 10 * (length - 1) ** 2,
        "dragan": 10 * (length - 1) ** 2,
        "relativistic": 0.5 * 2 * length**2,
    }
    for objective, value in expected.items():
        with_penalty = losses(config_of(objective, head_kind), PixelMean(a), real, fake)
        without = losses(config_of(objective, head_kind, penalty="none"), PixelMean(a), real, fake)
        assert (with_penalty[0] - without[0]).item() == pytest.approx(value)
        assert with_penalty[1] == without[1]
        weight = config_of(objective).critic.penalty_weight
        assert with_penalty[2]["Loss/D/penalty"]["mean"] == pytest.approx(value / weight)


def test_curriculum_weighs_critics_for_g_and_trains_all_of_them():
    config = config_of("curriculum", penalty="none", curriculum_kimg=100.0)
    real, fake = torch.randn(N).double(), torch.randn(N).double()
    D = PixelMean(1.0, 2.0, 4.0)
    for cur_nimg in (0, 30_000, 50_000, 200_000):
        loss_D, loss_G, stats = losses(config, D, real, fake, cur_nimg)
        weights = curriculum_weights(cur_nimg, 100.0, 3)
        strength = sum(w * a for w, a in zip(weights, (1.0, 2.0, 4.0), strict=True))
        assert loss_G.item() == pytest.approx(-strength * fake.mean().item())
        assert loss_D.item() == pytest.approx(7 * (fake.mean() - real.mean()).item())
        assert [stats[f"Curriculum/critic{i}"]["mean"] for i in range(3)] == pytest.approx(weights)


def test_infogan_subtracts_the_information_from_both_losses():
    class WithCodes(PixelMean):
        def forward_with_codes(self, images, labels, augment):
            categorical, uniform = 3 * torch.eye(10)[: len(images)], torch.zeros(len(images), 2)
            return self(images, labels, augment), CodeLogits(categorical, uniform, uniform - 1)

    config = config_of("infogan")
    batch = batch_of(images_of(torch.randn(N).double()), None, torch.randn(N, 74))
    fake, D, stats = images_of(torch.randn(N).double()), WithCodes(1.0), StatsCollector()
    codes = latent_inputs(batch.z, config.generator)[:, 62:]
    log_q = F.log_softmax(3 * torch.eye(10)[:N], dim=1)
    categorical = (codes[:, :10] * log_q).sum(1).mean() + math.log(10)
    normal = torch.distributions.Normal(torch.zeros(N, 2), math.exp(-1.0) * torch.ones(N, 2))
    continuous = normal.log_prob(codes[:, 10:]).sum(1).mean() + 2 * math.log(2)
    information = (categorical + 0.1 * continuous).item()
    loss, plain = DCGANLoss(config), DCGANLoss(config_of("nonsaturating"))
    for name in ("generator_loss", "discriminator_losses"):
        values = [getattr(either, name)(D, fake, batch, 0, stats) for either in (loss, plain)]
        values = [sum(v) if name == "discriminator_losses" else v for v in values]
        assert (values[0] - values[1]).item() == pytest.approx(-information, rel=1e-5)


# SAN and Wasserstein.


@pytest.mark.parametrize("c_dim", [0, 3])
def test_san_with_the_wasserstein_loss_has_the_gradients_of_a_plain_critic(c_dim):
    """Both terms together: those of V on scale * <w / |w|, h> trained as one. Only the normalisation is new."""
    config = config_of("wgan", "san", penalty="none")
    cfg = replace(
        config.discriminator, img_resolution=8, channel_bases=(4,), c_dim=c_dim, has_batchnorm=False
    )
    D = DCGANDiscriminator(cfg, "san").double()
    labels = torch.arange(N) % 3 if c_dim else None
    real, fake = (torch.randn(N, 3, 8, 8).double() for _ in range(2))
    batch = batch_of(real, labels, torch.randn(N, 100))
    sum(make_dcgan_loss(config).discriminator_losses(D, fake, batch, 0, StatsCollector())).backward()

    critic = D.critics["critic0"]
    parameters = dict(critic.named_parameters())

    def plain(images: Tensor) -> Tensor:
        direction = critic.last.weight / critic.last.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        logits = F.conv2d(critic.trunk(images), direction * critic.last.scale.view(-1, 1, 1, 1)).flatten(1)
        return logits.gather(1, labels.unsqueeze(1)) if c_dim else logits

    expected = torch.autograd.grad(plain(fake).mean() - plain(real).mean(), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)


def test_clipping_bounds_all_but_directions():
    cfg = replace(dcgan("wgan").discriminator, img_resolution=16, channel_bases=(4,))
    for kind in ("san", "gan"):
        D = DCGANDiscriminator(cfg, kind)
        before = {name: p.clone() for name, p in D.named_parameters()}
        clip_weights_(D, 0.01)
        for name, p in D.named_parameters():
            if kind == "san" and name.endswith("last.weight"):
                assert torch.equal(p, before[name])
            elif kind == "san" and name.endswith("last.scale"):
                # As long as a plain layer of 8 x 4 x 4 clipped entries can be.
                assert p.item() == pytest.approx(min(before[name].item(), 0.01 * math.sqrt(8 * 16)))
            else:
                assert torch.equal(p, before[name].clamp(-0.01, 0.01))


def test_clipping_follows_every_step_of_d():
    D = DCGANDiscriminator(replace(dcgan("wgan").discriminator, img_resolution=8, channel_bases=(4,)), "gan")
    make_dcgan_loss(config_of("wgan")).finish_step_(D, StatsCollector())
    assert max(p.abs().max().item() for p in D.parameters()) <= 0.01
    before = [p.clone() for p in D.parameters()]
    make_dcgan_loss(config_of("hinge")).finish_step_(D, StatsCollector())
    assert all(torch.equal(p, q) for p, q in zip(D.parameters(), before, strict=True))


# BEGAN.


def test_began_by_hand_and_its_equilibrium_over_two_micro_batches():
    config = config_of("began", began_k_lr=0.1)
    D = AutoencoderDiscriminator(replace(config.discriminator, img_resolution=8, channel_base=4)).double()
    D.k.fill_(0.3)
    loss, stats = BEGANLoss(config), StatsCollector()
    errors = {"real": [], "fake": []}
    for _ in range(2):
        batch, fake = make_batch(torch.randn(N).double()), images_of(torch.randn(N).double())
        real_error = (batch.images - D.reconstruct(batch.images)).abs().mean()
        fake_error = (fake - D.reconstruct(fake)).abs().mean()
        (value,) = loss.discriminator_losses(D, fake, batch, 0, stats)
        torch.testing.assert_close(value, real_error - 0.3 * fake_error)
        assert D.k.item() == pytest.approx(0.3)  # not before the step is done
        torch.testing.assert_close(loss.generator_loss(D, fake, batch, 0, stats), fake_error)
        errors["real"].append(real_error.item())
        errors["fake"].append(fake_error.item())
    loss.finish_step_(D, stats)
    real, fake = (sum(errors[kind]) / 2 for kind in ("real", "fake"))
    k = min(max(0.3 + 0.1 * (0.5 * real - fake), 0), 1)
    assert D.k.item() == pytest.approx(k)
    reported = stats.flush()
    assert reported["BEGAN/k"]["mean"] == pytest.approx(k)
    assert reported["BEGAN/measure"]["mean"] == pytest.approx(real + abs(0.5 * real - fake))


def test_began_keeps_k_when_an_error_is_not_a_number():
    config = config_of("began")
    D = AutoencoderDiscriminator(replace(config.discriminator, img_resolution=8, channel_base=4)).double()
    D.k.fill_(0.3)
    loss = BEGANLoss(config)
    batch = make_batch(torch.full((N,), math.nan).double())
    list(loss.discriminator_losses(D, batch.images, batch, 0, StatsCollector()))
    loss.finish_step_(D, StatsCollector())
    assert D.k.item() == pytest.approx(0.3)


# Refusals.


def test_objectives_without_a_san_form_are_refused():
    with pytest.raises(ConfigError, match="'least_squares' has no SAN form"):
        make_dcgan_loss(config_of("least_squares", "san"))
    with pytest.raises(ConfigError, match="'began' has no SAN form: its discriminator is an autoencoder"):
        make_dcgan_loss(config_of("began", "san"))


def test_recipes_ask_for_san_where_there_is_one():
    assert {name for name in RECIPES if dcgan(name).loss == "gan"} == {"least_squares", "began"}
    for name in RECIPES:
        make_dcgan_loss(dcgan(name))


def test_unknown_objective_is_refused():
    with pytest.raises(ConfigError, match="'hingee' is not one of hinge, wasserstein"):
        make_dcgan_loss(replace(dcgan(), objective="hingee"))
