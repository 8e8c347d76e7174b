# SPDX-License-Identifier: MIT
"""VGG16 against torchvision's and torch-fidelity's preprocessing; its files.

Weights are windows of one short random vector: 138 million numbers of their own take longer than the test.
"""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor
from torch.func import functional_call
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from metrics.vgg16 import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VGG16,
    VGG16Detector,
    VGG16Maps,
    read_vgg16,
    read_vgg16_maps,
)
from metrics.weight_layers import empty_network, group_layers, load_layers_
from torch_utils.errors import UserError


def windows(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """(out, ...) of numbers for ReLU networks; rows are windows of the same vector, each 3 further on."""
    num_inputs = shape[1:].numel()
    vector = torch.randn(num_inputs + 3 * shape[0], generator=generator) * (2 / num_inputs) ** 0.5
    return vector.as_strided((shape[0], num_inputs), (3, 1)).unflatten(1, shape[1:])


@pytest.fixture(scope="module")
def oracle() -> torch.nn.Module:
    with torch.device("meta"):
        return torchvision.models.vgg16().eval()


@pytest.fixture(scope="module")
def tensors(oracle) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {name: x.shape for name, x in oracle.state_dict().items()}
    return {
        name: windows(shape, generator) if len(shape) > 1 else torch.randn(shape, generator=generator) * 0.1
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def detector(tensors) -> VGG16Detector:
    network = empty_network(VGG16)
    without_classifier = {name: x for name, x in tensors.items() if not name.startswith("classifier.6")}
    load_layers_(network, group_layers(without_classifier, "vgg16"), "vgg16")
    return VGG16Detector(network)


def test_equals_torchvision_after_the_second_relu(oracle, detector, tensors):
    images = torch.randint(0, 256, (2, 3, 50, 40), dtype=torch.uint8)
    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(224, 224), align_corners=False)
    x = torchvision.transforms.functional.normalize(x / 255, IMAGENET_MEAN, IMAGENET_STD)
    seen = {}
    hook = oracle.classifier[4].register_forward_hook(
        lambda module, inputs, out: seen.update(features=out.clone())
    )
    with torch.inference_mode():
        functional_call(oracle, tensors, (x,))
    hook.remove()
    found = detector(images)
    assert found.shape == (2, 4096) and float(found.max()) > 0.1
    torch.testing.assert_close(found, seen["features"], rtol=1e-3, atol=1e-4 * float(found.max()))
    torch.testing.assert_close(detector(images[1:]), found[1:], rtol=1e-3, atol=1e-4 * float(found.max()))
    assert detector(images[:0]).shape == (0, 4096)


def test_wrong_images_are_refused(detector):
    with pytest.raises(ValueError, match="expected uint8"):
        detector(torch.zeros(1, 3, 8, 8))


def test_convolutions_are_read_from_files_that_hold_more(tensors, tmp_path):
    stored = {name: x.clone() for name, x in tensors.items() if name.startswith("features")}
    stored |= {f"lin{i}.model.1.weight": torch.ones(1, width, 1, 1) for i, width in enumerate((64, 128, 256))}
    stored["classifier.6.weight"] = torch.zeros(1000, 4096)
    torch.save(stored, tmp_path / "vgg.pth")
    maps = read_vgg16_maps(tmp_path / "vgg.pth")
    assert isinstance(maps, VGG16Maps)
    assert torch.equal(maps.stages[4][4].weight, tensors["features.28.weight"])
    with pytest.raises(UserError, match=r"has 0 linear layers, the network 2"):
        read_vgg16(tmp_path / "vgg.pth")
