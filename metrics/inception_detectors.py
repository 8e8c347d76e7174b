# SPDX-License-Identifier: MIT
"""Inception networks as detectors: uint8 images to features, with the resize of the papers inside.

`InceptionDetector.outputs` gives the features of FID, sFID and IS in one pass.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from metrics.image_input import as_rgb, check_images, full_precision, memory_format, resize_clean, resize_tf1
from metrics.inception import (
    INPUT_SIDE,
    NUM_FEATURES,
    NUM_OUTPUTS,
    NUM_SFID,
    InceptionOutput,
    InceptionTrunk,
    InceptionV3,
    torch_layer_names,
)
from metrics.weight_files import read_tensors
from metrics.weight_layers import empty_network, group_layers, hash_weights, load_layers_, sort_layers

RESIZES = {"tf1": resize_tf1, "clean": resize_clean}
CPU_BATCH = 8  # 2 to 16 take the same time for an image, on one thread; small ones less memory
GPU_BATCH = 64


def prepare(images: Tensor, device: torch.device, resize: str) -> Tensor:
    """uint8 images (N, 3 or 1, H, W) as the network's input: (x - 128) / 128, (N, 3, 299, 299)."""
    x = RESIZES[resize](images.to(device), INPUT_SIDE)
    return ((as_rgb(x) - 128) / 128).contiguous(memory_format=memory_format(device))


class InceptionDetector:
    """Pooled features (N, 2048) of the Inception network of 2015, and what else one pass gives.

    resize: "tf1", that of FID's reference implementation, or "clean", clean-fid's; each has its own name.
    """

    num_features = NUM_FEATURES
    _recipe = "inception-2015-12-05-v2"  # change it with the preprocessing, as cached statistics depend on it

    def __init__(self, network: InceptionV3, device: torch.device | str = "cpu", resize: str = "tf1") -> None:
        self.name = "inception" if resize == "tf1" else f"inception_{resize}"
        self.device = torch.device(device)
        self.batch_size = CPU_BATCH if self.device.type == "cpu" else GPU_BATCH
        self.fingerprint = hash_weights(network, f"{self._recipe}-{resize}")
        self._resize = resize
        network = network.requires_grad_(False).eval()
        self._network = network.to(self.device, memory_format=memory_format(self.device))

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, 2048), float32 on `device`, of uint8 images (N, 3 or 1, H, W); grey is repeated."""
        return self.outputs(images).features

    @torch.inference_mode()
    def outputs(self, images: Tensor) -> InceptionOutput:
        """Features, sFID's maps and class probabilities of uint8 images (N, 3 or 1, H, W), in one pass."""
        check_images(images)
        with full_precision():
            parts = [
                self._network(prepare(x, self.device, self._resize)) for x in images.split(self.batch_size)
            ]
        if not len(images):
            sizes = (NUM_FEATURES, NUM_SFID, NUM_OUTPUTS)
            return InceptionOutput(*(torch.zeros(0, size, device=self.device) for size in sizes))
        return InceptionOutput(*(torch.cat(column) for column in zip(*parts, strict=True)))


class RandomInceptionDetector:
    """Pooled features (N, 2048) of the same architecture with random weights, as rFID has them."""

    name = "inception_random"
    num_features = NUM_FEATURES
    _recipe = "inception-random-v1"

    def __init__(self, trunk: InceptionTrunk, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.batch_size = CPU_BATCH if self.device.type == "cpu" else GPU_BATCH
        self.fingerprint = hash_weights(trunk, self._recipe)
        trunk = trunk.requires_grad_(False).eval()
        self._trunk = trunk.to(self.device, memory_format=memory_format(self.device))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, 2048), float32 on `device`, of uint8 images (N, 3 or 1, H, W); grey is repeated."""
        check_images(images)
        with full_precision():
            parts = [self._trunk(prepare(x, self.device, "tf1"))[0] for x in images.split(self.batch_size)]
        return torch.cat(parts) if parts and len(images) else torch.zeros(0, NUM_FEATURES, device=self.device)


def read_inception(path: Path) -> InceptionV3:
    """The network with the weights of a file: torch-fidelity's, pytorch-fid's or NVIDIA's. Raises UserError."""
    layers = sort_layers(group_layers(read_tensors(path), str(path)), torch_layer_names())
    network = empty_network(InceptionV3)
    load_layers_(network, layers, str(path))
    return network


def read_random_inception(path: Path) -> InceptionTrunk:
    """The network without its last layer, which a file for rFID need not have. Raises UserError."""
    layers = sort_layers(group_layers(read_tensors(path), str(path)), torch_layer_names())
    trunk = empty_network(InceptionTrunk)
    load_layers_(trunk, [layer for layer in layers if layer.weight.ndim != 2], str(path))
    return trunk
