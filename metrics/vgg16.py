# SPDX-License-Identifier: MIT
"""VGG16 (arXiv:1409.1556, configuration D), the network of precision and recall, and of LPIPS.

Features for precision and recall (arXiv:1904.06991) are those of the second fully connected layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metrics.image_input import as_rgb, check_images, full_precision, memory_format, normalize, resize_tf1
from metrics.weight_files import read_tensors
from metrics.weight_layers import Layer, empty_network, group_layers, hash_weights, load_layers_

NUM_FEATURES = 4096
INPUT_SIDE = 224
STAGES = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)  # channels of 3x3 convolutions
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of torchvision's weights
IMAGENET_STD = (0.229, 0.224, 0.225)
_CLASSIFIER_SHAPE = (1000, NUM_FEATURES)  # of the last layer, which no metric uses


class VGG16Maps(nn.Module):
    """The convolutions. x: (N, 3, H, W), normalised -> the last map of each of the five stages, before its pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        in_channels = 3
        for widths in STAGES:
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                in_channels = width
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(F.max_pool2d(maps[-1], 2) if maps else x)
            maps.append(x)
        return maps


class VGG16(nn.Module):
    """x: (N, 3, 224, 224), normalised -> (N, 4096), the second fully connected layer after its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = VGG16Maps()
        self.fc1 = nn.Linear(512 * 7 * 7, NUM_FEATURES)
        self.fc2 = nn.Linear(NUM_FEATURES, NUM_FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(self.maps(x)[-1], 2)  # (N, 512, 7, 7)
        return F.relu(self.fc2(F.relu(self.fc1(pooled.flatten(1)))))


class VGG16Detector:
    """Features (N, 4096) of VGG16 at 224x224, resized as TensorFlow 1 did."""

    name = "vgg16"
    num_features = NUM_FEATURES
    _recipe = "vgg16-fc2-relu-tf1-224-imagenet-v1"

    def __init__(self, network: VGG16, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.batch_size = 8 if self.device.type == "cpu" else 64
        self.fingerprint = hash_weights(network, self._recipe)
        network = network.requires_grad_(False).eval()
        self._network = network.to(self.device, memory_format=memory_format(self.device))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, 4096), float32 on `device`, of uint8 images (N, 3 or 1, H, W); grey is repeated."""
        check_images(images)
        if not len(images):
            return torch.zeros(0, NUM_FEATURES, device=self.device)
        with full_precision():
            return torch.cat([self._embed(batch) for batch in images.split(self.batch_size)])

    def _embed(self, images: Tensor) -> Tensor:
        x = as_rgb(resize_tf1(images.to(self.device), INPUT_SIDE))
        x = normalize(x, IMAGENET_MEAN, IMAGENET_STD)
        return self._network(x.contiguous(memory_format=memory_format(self.device)))


def read_vgg16(path: Path) -> VGG16:
    """The network with the weights of a file, torchvision's or NVIDIA's. Raises UserError."""
    network = empty_network(VGG16)
    load_layers_(network, _own_layers(path), str(path))
    return network


def read_vgg16_maps(path: Path) -> VGG16Maps:
    """Its convolutions alone. Raises UserError."""
    maps = empty_network(VGG16Maps)
    load_layers_(maps, [layer for layer in _own_layers(path) if layer.weight.ndim == 4], str(path))
    return maps


def _own_layers(path: Path) -> list[Layer]:
    """Without the classifier, and without the weights of LPIPS, which a file may hold as well (one output each)."""
    layers = group_layers(read_tensors(path), str(path))
    return [x for x in layers if x.weight.shape[0] != 1 and tuple(x.weight.shape) != _CLASSIFIER_SHAPE]
