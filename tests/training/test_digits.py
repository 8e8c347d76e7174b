# SPDX-License-Identifier: MIT
"""The built-in digits in their two sizes."""

import numpy as np
import pytest
from PIL import Image

from training.dataset import open_dataset
from training.digits import open_digits, open_digits8

pytest.importorskip("sklearn")


@pytest.mark.parametrize(("name", "side"), [("digits", 16), ("digits8", 8)])
def test_size_and_classes(name, side):
    dataset = open_dataset(name, use_labels=True)
    assert (dataset.resolution, dataset.c_dim, len(dataset), dataset.name) == (side, 10, 1797, name)


def test_the_large_ones_are_the_small_ones_enlarged():
    small, large = open_digits8(), open_digits()
    for index in (0, 100, 1796):
        scan = np.asarray(small.images[index])
        assert scan.dtype == np.uint8 and (scan == scan[..., :1]).all() and scan.max() > 200
        enlarged = Image.fromarray(scan).resize((16, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(enlarged), large.images[index])
