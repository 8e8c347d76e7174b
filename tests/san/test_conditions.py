# SPDX-License-Identifier: MIT
"""The three conditions on distributions whose answer is known, and against naive references.

python -m pytest tests/san/test_conditions.py
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import san
from san import conditions


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_direction_between_gaussians_is_the_difference_of_their_means() -> None:
    shift = torch.tensor([1.0, -2.0, 2.0])
    difference = conditions.mean_difference(draw(0, 20_000, 3) + shift, draw(1, 20_000, 3))
    assert difference.norm().item() == pytest.approx(3.0, abs=0.05)
    assert conditions.direction_cosine(shift / 3, difference).item() > 0.999
    assert conditions.direction_cosine(-shift, difference).item() < -0.999
    orthogonal = torch.tensor([2.0, 1.0, 0.0])
    assert abs(conditions.direction_cosine(orthogonal, difference).item()) < 0.05


def test_cosine_without_a_difference_is_zero() -> None:
    features = draw(0, 10, 4)
    difference = conditions.mean_difference(features, features)
    assert conditions.direction_cosine(draw(1, 4), difference).item() == 0


@pytest.mark.parametrize("name", [name for name, o in san.OBJECTIVES.items() if o.potential is not None])
def test_weighted_difference_is_what_the_direction_term_of_the_loss_climbs(name: str) -> None:
    """With a free direction w, the gradient of E[R(<w, real>)] - E[R(<w, fake>)] is the weighted difference."""
    objective, real, fake = san.OBJECTIVES[name], draw(0, 40, 6) + 0.3, draw(1, 30, 6)
    w = draw(2, 6).requires_grad_()
    gain = objective.potential(real @ w).mean() - objective.potential(fake @ w).mean()
    (expected,) = torch.autograd.grad(gain, w)
    weights = [san.direction_weights(objective, h @ w) for h in (real, fake)]
    torch.testing.assert_close(conditions.mean_difference(real, fake, *weights), expected)


def test_leading_axes_are_independent() -> None:
    real, fake, weights = draw(0, 3, 20, 5), draw(1, 3, 10, 5), draw(2, 3, 20).abs()
    together = conditions.mean_difference(real, fake, weights)
    order = conditions.compare_slices(real[..., 0], fake[..., 0])
    for i in range(3):
        alone = conditions.mean_difference(real[i], fake[i], weights[i])
        torch.testing.assert_close(together[i], alone)
        expected = conditions.compare_slices(real[i, :, 0], fake[i, :, 0])
        torch.testing.assert_close(order.in_order[i], expected.in_order)
        torch.testing.assert_close(order.gap[i], expected.gap)


@pytest.mark.parametrize("degrees", [1e-4, 1.0, 90.0, 179.0, 180.0])
def test_angle_is_exact(degrees: float) -> None:
    angle = math.radians(degrees)
    turned = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    found = conditions.direction_angle(torch.tensor([2.0, 0.0], dtype=torch.float64), turned)
    assert found.item() == pytest.approx(degrees, rel=1e-6)


@pytest.mark.parametrize(("num_real", "num_fake"), [(1, 1), (7, 7), (5, 3), (12, 8), (100, 33)])
def test_slices_equal_naive_quantiles(num_real: int, num_fake: int) -> None:
    real, fake = (draw(0, num_real) + 0.5).double(), 2 * draw(1, num_fake).double()
    order = conditions.compare_slices(real, fake)
    total = math.lcm(num_real, num_fake)  # with so many copies, both samples have the same size
    ahead = real.sort().values.repeat_interleave(total // num_real) - fake.sort().values.repeat_interleave(
        total // num_fake
    )
    assert order.mean_difference.item() == pytest.approx((real.mean() - fake.mean()).item())
    assert order.in_order.item() == pytest.approx((ahead >= 0).double().mean().item())
    distance = stats.wasserstein_distance(real.numpy(), fake.numpy())
    assert order.wasserstein.item() == pytest.approx(distance)
    assert order.gap.item() == pytest.approx(1 - (real.mean() - fake.mean()).item() / distance)


def test_separable_reversed_and_crossing_slices() -> None:
    numbers = draw(0, 500)
    ahead = conditions.compare_slices(numbers + 0.1, numbers)
    assert ahead.gap.item() == pytest.approx(0, abs=1e-5)
    assert ahead.in_order.item() == pytest.approx(1)
    assert ahead.wasserstein.item() == pytest.approx(0.1, abs=1e-5)
    behind = conditions.compare_slices(numbers - 0.1, numbers)
    assert behind.gap.item() == pytest.approx(2, abs=1e-5)
    assert behind.in_order.item() == pytest.approx(0, abs=1e-5)
    wider = conditions.compare_slices(draw(1, 20_000), 3 * draw(2, 20_000))  # equal means, quantiles cross
    assert wider.gap.item() == pytest.approx(1, abs=0.05)
    assert wider.in_order.item() == pytest.approx(0.5, abs=0.05)
    assert wider.wasserstein.item() == pytest.approx(2 * math.sqrt(2 / math.pi), abs=0.05)


def test_equal_slices_are_in_order() -> None:
    numbers = draw(0, 10)
    order = conditions.compare_slices(numbers, numbers.flip(0))
    assert (order.gap.item(), order.in_order.item(), order.wasserstein.item()) == (0, pytest.approx(1), 0)


def test_expansion_of_an_isometry_and_of_a_folding() -> None:
    points = draw(0, 20, 3)
    rotation = torch.linalg.qr(draw(1, 3, 3)).Q
    torch.testing.assert_close(conditions.expansion_ratios(points, points @ rotation), torch.ones(190))
    folded = torch.cat([points, -points])
    ratios = conditions.expansion_ratios(folded, folded.square())
    assert (ratios < 1e-6).sum() == 20
    repeated = torch.cat([points, points])  # the same input twice is no pair
    assert len(conditions.expansion_ratios(repeated, repeated)) == 40 * 39 // 2 - 20


def test_singular_values_of_a_linear_map() -> None:
    matrix = draw(0, 4, 7)
    values = conditions.jacobian_singular_values(lambda x: x @ matrix, draw(1, 3, 4))
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix).expand(3, 4))
    some = conditions.jacobian_singular_values(lambda x: x @ matrix, draw(1, 3, 4), num_directions=2)
    assert some.shape == (3, 2)
    assert (some[:, -1] >= values[:, -1]).all()  # never below the smallest of the whole Jacobian
    assert (some[:, 0] <= values[:, 0] + 1e-5).all()


def test_local_rank_tells_injective_from_collapsing_networks() -> None:
    torch.manual_seed(0)
    points = draw(0, 10, 1, 4, 4)
    conv = nn.Conv2d(1, 32, 3, padding=1)
    wide = nn.Sequential(conv, nn.LeakyReLU(0.2, inplace=True))
    bottleneck = nn.Sequential(wide, nn.AdaptiveAvgPool2d(1))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv)  # sees the mean of an image only
    ranks = [
        conditions.local_rank(conditions.jacobian_singular_values(f, points)).tolist()
        for f in (wide, bottleneck, pooled)
    ]
    assert ranks[0] == [16] * 10
    assert max(ranks[1]) <= 16
    assert ranks[2] == [1] * 10
    some = conditions.jacobian_singular_values(pooled, points, 3, torch.Generator().manual_seed(0))
    assert conditions.local_rank(some).tolist() == [1] * 10


def test_no_result_carries_a_graph() -> None:
    h = draw(0, 6, 4).requires_grad_()
    layer = nn.Linear(4, 4)
    values = [
        conditions.mean_difference(h, h + 1),
        conditions.direction_cosine(h[0], h[1]),
        conditions.compare_slices(h[:, 0], h[:, 1]).gap,
        conditions.expansion_ratios(h, h * 2),
        conditions.jacobian_singular_values(layer, h),
    ]
    assert not any(value.requires_grad for value in values)
    assert layer.weight.grad is None


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="0 real and 3 fake"):
        conditions.compare_slices(torch.zeros(0), torch.zeros(3))
    with pytest.raises(ValueError, match="2 inputs and 3 features"):
        conditions.expansion_ratios(torch.zeros(2, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="two different inputs"):
        conditions.expansion_ratios(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="num_directions=5"):
        conditions.jacobian_singular_values(lambda x: x, torch.zeros(1, 4), num_directions=5)
