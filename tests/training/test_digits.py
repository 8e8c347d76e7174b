# SPDX-License-Identifier: MIT
"""The built-in digits in their two sizes."""

import numpy as np
import pytest
from PIL import Image

from training.dataset import open_dataset

pytest.importorskip("sklearn")


@pytest.mark.parametrize(("name", "side"), [("digits", 16), ("digits8", 8)])
def test_size_and_classes(name, side):
    dataset = open_dataset(name, use_labels=True)
    assert (dataset.resolution, dataset.c_dim, len(dataset), dataset.name) == (side, 10, 1797, name)


def test_the_large_ones_are_the_small_ones_enlarged():
    (small, labels), (large, same_labels) = (
        open_dataset(x, True).batch([0, 100, 1796]) for x in ("digits8", "digits")
    )
    assert labels.tolist() == same_labels.tolist()
    for scan, image in zip(small.numpy(), large.numpy(), strict=True):
        assert scan.dtype == np.uint8 and (scan == scan[:1]).all() and scan.max() > 200
        enlarged = Image.fromarray(scan[0]).resize((16, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(enlarged), image[0])
