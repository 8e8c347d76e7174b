# SPDX-License-Identifier: MIT
"""BEGAN's equilibrium: a sequence by hand, its bounds, where it settles, and the measure."""

import pytest
import torch

from training.began import convergence_measure, next_k


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
