# SPDX-License-Identifier: MIT
"""Frechet distances class by class."""

import numpy as np
import pytest
import torch

from metrics.frechet import frechet_distance_of_features
from metrics.per_class import per_class_frechet
from torch_utils.errors import UserError


def test_each_class_is_compared_with_itself():
    fake, real = torch.randn(40, 6), torch.randn(60, 6)
    fake_labels, real_labels = np.arange(40) % 3, np.arange(60) % 4
    real_labels[real_labels == 2] = 7
    found = per_class_frechet(fake, fake_labels, real, real_labels)
    assert list(found) == [0, 1]
    for label, distance in found.items():
        pair = fake[fake_labels == label], real[real_labels == label]
        assert distance == pytest.approx(frechet_distance_of_features(*pair))


def test_classes_of_one_image_are_left_out():
    x = torch.randn(5, 3)
    assert list(per_class_frechet(x, np.array([0, 0, 1, 2, 2]), x, np.array([0, 0, 1, 2, 2]))) == [0, 2]
    with pytest.raises(UserError, match="no class has 2 real"):
        per_class_frechet(x, np.arange(5), x, np.arange(5))
    with pytest.raises(ValueError, match="5 and 5 features have 4 and 5 labels"):
        per_class_frechet(x, np.arange(4), x, np.arange(5))
