# SPDX-License-Identifier: MIT
"""Resizes against torch-fidelity's, a naive loop and PIL; normalisation; precision flags."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from metrics.image_input import (
    as_rgb,
    check_images,
    full_precision,
    memory_format,
    normalize,
    resize_bicubic,
    resize_clean,
    resize_pil,
    resize_tf1,
)


@pytest.mark.parametrize("size", [(16, 16), (1, 1), (299, 299), (64, 48), (300, 301), (640, 513)])
def test_tf1_resize_equals_torch_fidelity_in_every_bit(size):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    expected = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    assert torch.equal(resize_tf1(images, 299), expected)


def test_tf1_resize_equals_a_loop():
    image, side = torch.randint(0, 256, (1, 1, 5, 9), dtype=torch.uint8), 7
    expected = torch.zeros(side, side)
    pixels = image[0, 0].double()
    for i in range(side):
        for j in range(side):
            y, x = i * 5 / side, j * 9 / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 4), min(left + 1, 8)
            upper = pixels[top, left] * (1 - x + left) + pixels[top, right] * (x - left)
            lower = pixels[bottom, left] * (1 - x + left) + pixels[bottom, right] * (x - left)
            expected[i, j] = upper * (1 - y + top) + lower * (y - top)
    torch.testing.assert_close(resize_tf1(image, side)[0, 0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(16, 24), (299, 299), (500, 400)])
def test_clean_resize_equals_clean_fid(size):
    resize = pytest.importorskip("cleanfid.resize")
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    expected = torch.from_numpy(resize.build_resizer("clean")(image[0].permute(1, 2, 0).numpy()))
    found = resize_clean(image, 299)[0].permute(1, 2, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert size == (299, 299) or (float(found.min()), float(found.max())) == (0, 255)  # where it overshot


@pytest.mark.parametrize("size", [(16, 24), (224, 100), (224, 224), (500, 400)])
def test_pil_resize_equals_pil(size):
    """But for one level where PIL's weights, of 22 bits, and ours are on two sides of a half."""
    image = torch.randint(0, 256, (1, 1, *size), dtype=torch.uint8)
    expected = Image.fromarray(image[0, 0].numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    difference = (resize_pil(image, 224)[0, 0] - torch.from_numpy(np.array(expected)).float()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("size", [(16, 24), (299, 299), (500, 400)])
def test_bicubic_resize_equals_pil_of_floats(size):
    image = torch.randint(0, 256, (1, 1, *size), dtype=torch.uint8)
    floats = Image.fromarray(image[0, 0].numpy().astype(np.float32))
    expected = np.asarray(floats.resize((299, 299), Image.Resampling.BICUBIC))
    torch.testing.assert_close(
        resize_bicubic(image, 299)[0, 0], torch.from_numpy(expected.copy()), rtol=0, atol=2e-4
    )


def test_normalize_is_that_of_torchvision():
    images = torch.rand(2, 3, 4, 4) * 255
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    expected = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(normalize(images, mean, std), expected)


def test_grey_is_repeated():
    grey = torch.rand(2, 1, 3, 3)
    assert torch.equal(as_rgb(grey), torch.cat([grey] * 3, dim=1))


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(1, 4, 8, 8).byte()]
)
def test_anything_but_uint8_images_is_refused(images):
    with pytest.raises(ValueError, match="expected uint8"):
        check_images(images)


def test_channels_last_is_for_the_cpu():
    """It may choose other algorithms on a GPU, where nobody has compared the features."""
    assert memory_format(torch.device("cpu")) == torch.channels_last
    assert memory_format(torch.device("cuda", 1)) == torch.contiguous_format


def test_precision_is_restored_after_errors():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(KeyError), full_precision():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        raise KeyError
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
