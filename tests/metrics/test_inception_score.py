# SPDX-License-Identifier: MIT
"""Inception score: golden values, closed forms, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.inception_score import inception_score
from torch_utils.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_metrics.npz")


@pytest.mark.parametrize(("num_splits", "name"), [(10, "is_mean_std"), (7, "is_mean_std_7splits")])
def test_equals_the_reference(num_splits, name):
    score = inception_score(torch.from_numpy(GOLDEN["is_probs"]), num_splits)
    np.testing.assert_allclose(score, GOLDEN[name], rtol=1e-5)


def test_certain_and_balanced_classes_score_their_number_and_uncertain_ones_1():
    """Probabilities of exactly 0 too, where the textbook formula is not a number."""
    certain = torch.eye(5).repeat(20, 1)
    assert tuple(inception_score(certain)) == pytest.approx((5, 0))
    assert tuple(inception_score(torch.full((100, 5), 0.2))) == pytest.approx((1, 0))


def test_splits_are_contiguous():
    certain = torch.eye(2).repeat_interleave(50, dim=0)  # each of two splits has one class
    assert inception_score(certain, num_splits=2).mean == pytest.approx(1)
    assert inception_score(certain, num_splits=1).mean == pytest.approx(2)


def test_fewer_images_than_splits_are_refused():
    with pytest.raises(UserError, match=r"\(9, 4\) make no 10 splits"):
        inception_score(torch.full((9, 4), 0.25))
