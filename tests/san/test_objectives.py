# SPDX-License-Identifier: MIT
"""Every objective against its written-out formula in float64: values, gradients, and the weights r_J.

python -m pytest tests/san/test_objectives.py
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import san
from san import OBJECTIVES, PAIRED_OBJECTIVES, SANLogits, direction_weights

RELATIVISTIC = PAIRED_OBJECTIVES["relativistic"]


def sigma(f: float) -> float:
    return 1 / (1 + math.exp(-f))


def softplus(f: float) -> float:
    return math.log(1 + math.exp(f))


# V on a real and on a fake logit, J, R, r_J: of one number, written out.
FORMULAS = {
    "hinge": (lambda f: max(0, 1 - f), lambda f: max(0, 1 + f), lambda f: -f, lambda f: f, lambda f: 1.0),
    "wasserstein": (lambda f: -f, lambda f: f, lambda f: -f, lambda f: f, lambda f: 1.0),
    "saturating": (
        lambda f: -math.log(sigma(f)),
        lambda f: -math.log(1 - sigma(f)),
        lambda f: math.log(1 - sigma(f)),
        lambda f: -math.log(1 - sigma(f)),
        sigma,
    ),
    "nonsaturating": (
        lambda f: -math.log(sigma(f)),
        lambda f: -math.log(1 - sigma(f)),
        lambda f: -math.log(sigma(f)),
        lambda f: math.log(sigma(f)),
        lambda f: 1 - sigma(f),
    ),
    "least_squares": (lambda f: (1 - f) ** 2, lambda f: f**2, lambda f: (1 - f) ** 2, None, None),
    "soft_least_squares": (
        lambda f: softplus(1 - f) ** 2,
        lambda f: softplus(f) ** 2,
        lambda f: softplus(1 - f) ** 2,
        lambda f: -(softplus(1 - f) ** 2),
        lambda f: 2 * softplus(1 - f) * sigma(1 - f),
    ),
}
SAN_NAMES = [name for name in OBJECTIVES if OBJECTIVES[name].potential is not None]


def make_logits(seed: int, *shape: int) -> SANLogits:
    """Leaf views of equal value, float64."""
    values = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SANLogits(values.clone().requires_grad_(), values.clone().requires_grad_())


def mean_of(formula, logits: Tensor) -> float:
    values = [formula(f) for f in logits.flatten().tolist()]
    return sum(values) / len(values)


def slope(formula, f: float, step: float = 1e-5) -> float:
    return (formula(f + step) - formula(f - step)) / (2 * step)


def slopes(formula, logits: Tensor) -> Tensor:
    """Derivative of the mean of the formula with respect to each logit, by differences."""
    values = [slope(formula, f) / logits.numel() for f in logits.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).view(logits.shape)


def test_every_objective_has_a_formula_here() -> None:
    assert list(OBJECTIVES) == list(FORMULAS)
    assert SAN_NAMES == ["hinge", "wasserstein", "saturating", "nonsaturating", "soft_least_squares"]
    assert list(PAIRED_OBJECTIVES) == ["relativistic"]
    assert all(not objective.is_paired for objective in OBJECTIVES.values())
    assert RELATIVISTIC.is_paired


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gan_form_values_and_gradients(name: str) -> None:
    objective, (v_real, v_fake, j, _, _) = OBJECTIVES[name], FORMULAS[name]
    losses = {san.gan_real_loss: v_real, san.gan_fake_loss: v_fake, san.generator_loss: j}
    for loss, formula in losses.items():
        logits = make_logits(0, 3, 4)
        value = loss(objective, logits)
        value.backward()
        assert value.item() == pytest.approx(mean_of(formula, logits.fun), rel=1e-12)
        torch.testing.assert_close(logits.fun.grad, slopes(formula, logits.fun), rtol=1e-6, atol=1e-9)
        assert logits.dir.grad is None
    real, fake = make_logits(1, 5), make_logits(2, 3)
    both = san.gan_discriminator_loss(objective, real, fake).item()
    assert both == pytest.approx(mean_of(v_real, real.fun) + mean_of(v_fake, fake.fun), rel=1e-12)


@pytest.mark.parametrize("name", SAN_NAMES)
def test_san_form_values_and_gradients(name: str) -> None:
    objective, (v_real, v_fake, _, potential, weight) = OBJECTIVES[name], FORMULAS[name]
    real, fake = make_logits(1, 5), make_logits(2, 3, 2)
    value = san.san_discriminator_loss(objective, real, fake)
    value.backward()
    expected = mean_of(v_real, real.fun) + mean_of(v_fake, fake.fun)
    expected += mean_of(potential, fake.dir) - mean_of(potential, real.dir)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    for logits, formula, sign in ((real, v_real, -1), (fake, v_fake, 1)):
        torch.testing.assert_close(logits.fun.grad, slopes(formula, logits.fun), rtol=1e-6, atol=1e-9)
        by_weight = torch.tensor([weight(f) for f in logits.dir.flatten().tolist()], dtype=torch.float64)
        expected_grad = sign * by_weight.view(logits.shape) / logits.numel()
        torch.testing.assert_close(logits.dir.grad, expected_grad, rtol=1e-12, atol=1e-15)
    parts = san.san_real_loss(objective, real) + san.san_fake_loss(objective, fake)
    torch.testing.assert_close(parts, value)


GOLDEN = {  # by hand, at f = 0: V_real, V_fake, J, R, r_J
    "hinge": (1, 1, 0, 0, 1),
    "wasserstein": (0, 0, 0, 0, 1),
    "saturating": (math.log(2), math.log(2), -math.log(2), math.log(2), 0.5),
    "nonsaturating": (math.log(2), math.log(2), math.log(2), -math.log(2), 0.5),
    "soft_least_squares": (1.724658, 0.480453, 1.724658, -1.724658, 1.920142),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_numbers_by_hand_at_zero(name: str) -> None:
    objective, zero = OBJECTIVES[name], torch.zeros((), dtype=torch.float64)
    parts = (objective.real, objective.fake, objective.generator, objective.potential)
    actual = [part(zero).item() for part in parts] + [direction_weights(objective, zero).item()]
    assert actual == pytest.approx(GOLDEN[name], abs=2e-6)


@pytest.mark.parametrize("name", SAN_NAMES)
def test_potential_rises_and_is_minus_the_generator_loss(name: str) -> None:
    objective, logits = OBJECTIVES[name], torch.linspace(-12, 12, 481, dtype=torch.float64)
    assert (objective.potential(logits).diff() >= 0).all()
    difference = objective.potential(logits) + objective.generator(logits)
    torch.testing.assert_close(difference, difference[0].expand_as(difference), rtol=0, atol=1e-12)
    weights = direction_weights(objective, logits)
    assert (weights >= 0).all()
    assert not weights.requires_grad
    expected = torch.tensor([FORMULAS[name][4](f) for f in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_elementwise_and_finite_far_out(name: str) -> None:
    objective = OBJECTIVES[name]
    logits = torch.linspace(-4, 4, 33).view(3, 11)
    for part in (objective.real, objective.fake, objective.generator, objective.potential):
        if part is not None:
            assert part(logits).shape == logits.shape
            torch.testing.assert_close(part(logits)[1], part(logits[1]))
            far = torch.tensor([-1e4, 1e4], requires_grad=True)
            part(far).sum().backward()
            assert far.grad.isfinite().all()


def make_head(num_features: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """A direction that asks for a gradient, real features and fake features; float64."""
    omega = nn.functional.normalize(torch.randn(num_features, dtype=torch.float64), dim=0)
    real, fake = torch.randn(2, 7, num_features, dtype=torch.float64)
    return omega.requires_grad_(), real + 0.5, fake - 0.5


@pytest.mark.parametrize("name", [*SAN_NAMES, "relativistic"])
@pytest.mark.parametrize("normalize_weights", [False, True])
def test_direction_gradient_is_the_difference_of_weighted_feature_means(
    name: str, normalize_weights: bool
) -> None:
    """Potential form and explicit form give one gradient: minus (E[r h(real)] - E[r h(fake)])."""
    objective = {**OBJECTIVES, **PAIRED_OBJECTIVES}[name]
    omega, h_real, h_fake = make_head()
    views = [SANLogits((h @ omega).detach(), h @ omega) for h in (h_real, h_fake)]
    san.san_discriminator_loss(objective, *views, normalize_weights).backward()
    if name == "relativistic":
        reals = views[0].fun.tolist()
        weight = lambda f: sum(sigma(real - f) for real in reals) / len(reals)  # noqa: E731
    else:
        weight = FORMULAS[name][4]
    means = []
    for h, view in zip((h_real, h_fake), views, strict=True):
        weights = torch.tensor([weight(f) for f in view.fun.tolist()], dtype=torch.float64)
        weights = weights / weights.mean() if normalize_weights else weights
        means.append((weights[:, None] * h).mean(0))
    torch.testing.assert_close(omega.grad, means[1] - means[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SAN_NAMES)
def test_the_weights_of_hinge_and_wasserstein_need_no_normalisation(name: str) -> None:
    grads = []
    for normalize_weights in (False, True):
        logits = make_logits(0, 9)
        san.san_real_loss(OBJECTIVES[name], logits, normalize_weights).backward()
        grads.append(logits.dir.grad)
    assert torch.allclose(*grads) == (name in ("hinge", "wasserstein"))
    assert grads[1].sum().item() == pytest.approx(-1)


def test_normalised_weights_survive_underflow() -> None:
    logits = SANLogits(torch.full((4,), -500.0), torch.full((4,), -500.0, requires_grad=True))
    loss = san.san_real_loss(OBJECTIVES["saturating"], logits, normalize_weights=True)
    loss.backward()
    assert loss.isfinite()
    assert not logits.dir.grad.any()


@pytest.mark.parametrize("name", SAN_NAMES)
def test_features_learn_as_in_the_gan_with_its_direction_frozen(name: str) -> None:
    """The SAN loss gives trunk and scale the gradient of the plain GAN loss, in every objective."""
    torch.manual_seed(0)
    trunk, head = nn.Linear(3, 8).double(), san.SANLinear(8, 1).double()
    real, fake = torch.randn(2, 5, 3, dtype=torch.float64)
    san.san_discriminator_loss(OBJECTIVES[name], head(trunk(real)), head(trunk(fake))).backward()
    actual = trunk.weight.grad.clone()
    trunk.zero_grad()
    weight = (head.weight * head.scale[:, None]).detach()
    plain = [SANLogits.plain(nn.functional.linear(trunk(x), weight)) for x in (real, fake)]
    san.gan_discriminator_loss(OBJECTIVES[name], *plain).backward()
    torch.testing.assert_close(actual, trunk.weight.grad)


def test_relativistic_values_and_gradients() -> None:
    real, fake = make_logits(0, 4, 3), make_logits(1, 4, 3)
    pairs = list(zip(real.fun.flatten().tolist(), fake.fun.flatten().tolist(), strict=True))
    d_loss = san.gan_discriminator_loss(RELATIVISTIC, real, fake)
    g_loss = san.generator_loss(RELATIVISTIC, fake, real)
    assert d_loss.item() == pytest.approx(sum(softplus(-(r - f)) for r, f in pairs) / 12, rel=1e-12)
    assert g_loss.item() == pytest.approx(sum(softplus(-(f - r)) for r, f in pairs) / 12, rel=1e-12)
    d_loss.backward()
    expected = torch.tensor([-sigma(f - r) / 12 for r, f in pairs], dtype=torch.float64).view(4, 3)
    torch.testing.assert_close(real.fun.grad, expected)
    torch.testing.assert_close(fake.fun.grad, -expected)
    zero = SANLogits.plain(torch.zeros(6))
    assert san.gan_discriminator_loss(RELATIVISTIC, zero, zero).item() == pytest.approx(math.log(2))


def test_relativistic_weight_is_what_the_generator_feels() -> None:
    """r_J(t) = mean over reals of sigma(f(x) - t), the slope of G's loss averaged over all pairs."""
    reals, fakes = make_logits(0, 5).fun.detach(), make_logits(1, 7).fun
    loss = sum(
        san.generator_loss(RELATIVISTIC, SANLogits.plain(fakes), SANLogits.plain(r.expand(7))) for r in reals
    )
    (slopes_of_loss,) = torch.autograd.grad(loss / 5 * 7, fakes)
    weights = direction_weights(RELATIVISTIC, fakes, reals)
    torch.testing.assert_close(weights, -slopes_of_loss)
    by_position = direction_weights(RELATIVISTIC, torch.zeros(2, 3), torch.tensor([[0.0, 9, -9]] * 4))
    torch.testing.assert_close(by_position, torch.tensor([[0.5, 1.0, 0.0]] * 2), rtol=0, atol=2e-4)


def test_relativistic_direction_term_vanishes_for_equal_distributions() -> None:
    omega, h, _ = make_head()
    views = [SANLogits((h @ omega).detach(), (x @ omega)) for x in (h, h.flip(0))]
    views[1] = SANLogits(views[0].fun.flip(0), views[1].dir)
    san.san_discriminator_loss(RELATIVISTIC, *views).backward()
    assert omega.grad.abs().max() < 1e-12


def test_refusals_say_what_to_use() -> None:
    logits = make_logits(0, 4)
    with pytest.raises(ValueError, match=r"no SAN form.*soft_least_squares"):
        san.san_real_loss(OBJECTIVES["least_squares"], logits)
    with pytest.raises(ValueError, match="no SAN form"):
        san.san_discriminator_loss(OBJECTIVES["least_squares"], logits, logits)
    with pytest.raises(ValueError, match="no SAN form"):
        direction_weights(OBJECTIVES["least_squares"], logits.fun)
    for loss in (san.gan_real_loss, san.gan_fake_loss, san.san_real_loss, san.san_fake_loss):
        with pytest.raises(TypeError, match="no separate real and fake losses"):
            loss(RELATIVISTIC, logits)
    with pytest.raises(ValueError, match=r"generator_loss\(objective, fake, real\)"):
        san.generator_loss(RELATIVISTIC, logits)
    with pytest.raises(ValueError, match=r"\(4,\) and fake logits \(3,\)"):
        san.gan_discriminator_loss(RELATIVISTIC, logits, logits[:3])
    with pytest.raises(ValueError, match="pass them as real"):
        direction_weights(RELATIVISTIC, logits.fun)
