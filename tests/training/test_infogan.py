# SPDX-License-Identifier: MIT
"""InfoGAN's bound: exact for a true posterior, lower for any other, closed forms and gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from training.infogan import MIN_LOG_STD, categorical_information, continuous_information


def test_a_guess_says_nothing_and_certainty_says_everything():
    codes = torch.eye(10, dtype=torch.float64)
    assert categorical_information(codes, torch.zeros_like(codes)).abs().max() < 1e-12
    certain = categorical_information(codes, 1000 * codes)
    torch.testing.assert_close(certain, torch.full((10,), math.log(10), dtype=torch.float64))


def test_bound_equals_the_mutual_information_for_the_true_posterior_only():
    """A code of 3 values through a noisy channel, whose information is known: I = log 3 - H(noise)."""
    channel = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    true_information = math.log(3) + (channel[0] * channel[0].log()).sum().item()

    def bound(posterior: torch.Tensor) -> float:
        """E over code c and image x, which is one of three: P(c) P(x | c) (log Q(c | x) + H(c))."""
        total = 0.0
        for c in range(3):
            for x in range(3):
                code = F.one_hot(torch.tensor([c]), 3).double()
                information = categorical_information(code, posterior[x : x + 1].log())
                total += channel[c, x].item() / 3 * information.item()
        return total

    assert bound(channel) == pytest.approx(true_information)  # symmetric: P(c | x) = P(x | c)
    for other in (channel.flip(0), torch.full((3, 3), 1 / 3, dtype=torch.float64), 0.5 * channel + 1 / 6):
        assert bound(other / other.sum(1, keepdim=True)) < true_information - 1e-3


def test_continuous_information_is_the_normal_log_likelihood_plus_log_2():
    codes, mean, log_std = (torch.randn(5, 2, dtype=torch.float64) for _ in range(3))
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(codes).sum(1) + 2 * math.log(2)
    torch.testing.assert_close(continuous_information(codes, mean, log_std), expected)


def test_gradients_are_those_of_cross_entropy_and_squared_error():
    codes = torch.eye(4, dtype=torch.float64)
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(categorical_information(codes, logits).sum(), logits)
    torch.testing.assert_close(actual, codes - logits.softmax(1))
    targets, zeros = torch.randn(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    mean = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(continuous_information(targets, mean, zeros).sum(), mean)
    torch.testing.assert_close(actual, targets - mean)


def test_certainty_about_a_continuous_code_is_bounded():
    codes = torch.zeros(1, 1)
    values = [continuous_information(codes, codes, torch.full((1, 1), s)) for s in (MIN_LOG_STD, -50.0)]
    assert values[0] == values[1] and values[0] < 6
