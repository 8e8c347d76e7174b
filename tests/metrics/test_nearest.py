# SPDX-License-Identifier: MIT
"""Nearest training images of samples, and the picture of them."""

import pytest
import torch

from metrics.nearest import find_neighbours, neighbour_picture
from metrics.needs import ImageSet
from torch_utils.errors import UserError


class Means:
    """The mean of each quarter of the image."""

    name = fingerprint = "means"

    def __call__(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture
def images():
    return torch.randint(0, 256, (150, 3, 8, 8), dtype=torch.uint8)


def reference_of(images):
    return ImageSet(len(images), "abc", lambda items: images[items])


def test_equals_sorting_all_distances(images):
    samples = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    found = find_neighbours(samples, reference_of(images), Means(), k=4)
    expected = torch.cdist(Means()(samples).double(), Means()(images).double()).sort(dim=1)
    assert torch.equal(found.indices, expected.indices[:, :4])
    torch.testing.assert_close(found.distances.double(), expected.values[:, :4], rtol=1e-5, atol=1e-4)


def test_a_copy_is_found_at_distance_zero(images):
    found = find_neighbours(images[[149, 3]], reference_of(images), Means(), k=150)
    assert found.indices[:, 0].tolist() == [149, 3] and found.distances[:, 0].tolist() == [0, 0]
    assert found.indices[0].sort().values.tolist() == list(range(150))


def test_the_picture_has_each_sample_before_its_neighbours(images):
    samples = images[:2].flip(3)
    found = find_neighbours(samples, reference_of(images), Means(), k=3)
    picture = neighbour_picture(samples, found, reference_of(images), gap=2)
    assert picture.shape == (3, 16, 8 + 2 + 3 * 8) and picture.dtype == torch.uint8
    assert torch.equal(picture[:, 8:, :8], samples[1]) and (picture[:, :, 8:10] == 255).all()
    assert torch.equal(picture[:, :8, 26:], images[found.indices[0, 2]])


def test_wrong_use_is_refused(images):
    with pytest.raises(UserError, match="the 151 nearest of 150"):
        find_neighbours(images[:1], reference_of(images), Means(), k=151)
    with pytest.raises(ValueError, match=r"samples of \(4, 4\) px"):
        neighbour_picture(
            images[:1, :, :4, :4],
            find_neighbours(images[:1], reference_of(images), Means(), 1),
            reference_of(images),
        )
