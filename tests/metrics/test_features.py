# SPDX-License-Identifier: MIT
"""The EfficientNet-Lite0 detector: against the unfused network, input handling, and its fingerprint."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from metrics.features import Lite0Detector, fold_batchnorm_, hash_weights, lite0_detector, resize_square
from torch_utils.pretrained import create_pretrained


@pytest.fixture(scope="module")
def detector():
    return lite0_detector(torch.device("cpu"))


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)


def test_equals_the_unfused_network(detector, images):
    model = create_pretrained("tf_efficientnet_lite0", create=timm.create_model).eval()
    x = (images.float() / 255 - 0.5) / 0.5
    x = F.interpolate(x, size=(128, 128), mode="bilinear", align_corners=False)
    with torch.no_grad():
        last_tap = model.forward_intermediates(x, intermediates_only=True)[-1]
    expected = last_tap.mean(dim=(2, 3))
    assert expected.shape == (3, 320)
    torch.testing.assert_close(detector(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_features_do_not_depend_on_the_batch(detector, images, monkeypatch):
    whole = detector(images)
    monkeypatch.setattr(detector, "batch_size", 2)
    torch.testing.assert_close(detector(images), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(detector(images[1:2]), whole[1:2], rtol=1e-4, atol=1e-4)


def test_convolutions_are_float32_proper(detector, images, monkeypatch):
    """TF32, torch's default on CUDA, would give a GPU other features than a CPU."""
    seen = []
    hook = detector._trunk.register_forward_pre_hook(
        lambda module, inputs: seen.append(torch.backends.cudnn.allow_tf32)
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    detector(images)
    hook.remove()
    assert seen == [False] and torch.backends.cudnn.allow_tf32


def test_grey_images_count_as_three_equal_channels(detector, images):
    grey = images[:, :1]
    torch.testing.assert_close(detector(grey), detector(grey.repeat(1, 3, 1, 1)))


def test_no_images_have_no_features(detector, images):
    assert detector(images[:0]).shape == (0, 320)


def test_fingerprint_is_that_of_weights_and_recipe(detector):
    assert Lite0Detector().fingerprint == detector.fingerprint
    layer = nn.Linear(2, 2)
    first = hash_weights(layer, "recipe")
    assert first == hash_weights(layer, "recipe") != hash_weights(layer, "another recipe")
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert hash_weights(layer, "recipe") != first


def test_images_are_antialiased_only_when_they_shrink():
    large, small = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 8, 8)
    antialiased = F.interpolate(large, size=(16, 16), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(resize_square(large, 16), antialiased)
    plain = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    assert torch.equal(resize_square(small, 16), plain)
    assert resize_square(small, 8) is small


def test_folding_keeps_the_function():
    block = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    block[1].running_mean.normal_(), block[1].running_var.uniform_(0.5, 2), nn.init.normal_(block[1].weight)
    block.eval()
    x = torch.randn(2, 3, 8, 8)
    expected = block(x)
    fold_batchnorm_(block)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    torch.testing.assert_close(block(x), expected)


def test_a_batchnorm_without_a_convolution_before_it_stays():
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)).eval()
    fold_batchnorm_(block)
    assert isinstance(block[2], nn.BatchNorm2d)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 4, 8, 8, dtype=torch.uint8),
    ],
)
def test_anything_but_uint8_images_is_refused(detector, images):
    with pytest.raises(ValueError, match="expected uint8"):
        detector(images)
