# SPDX-License-Identifier: MIT
"""LPIPS (arXiv:1801.03924), version 0.1 on VGG16: the distance of perceptual path length.

Features are the maps of five stages, scaled to unit length at each position, weighted by channel and divided by the
square root of the number of positions: the squared distance of two images' features is their LPIPS.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from metrics.image_input import full_precision, memory_format, normalize
from metrics.vgg16 import STAGES, VGG16Maps
from metrics.weight_files import read_tensors
from metrics.weight_layers import hash_weights
from torch_utils.errors import UserError

# LPIPS' own numbers: (x / 127.5 - 1 - shift) / scale with these shifts and scales; they are rounded from ImageNet's.
MEAN = ((1 - 0.030) / 2, (1 - 0.088) / 2, (1 - 0.188) / 2)
STD = (0.458 / 2, 0.448 / 2, 0.450 / 2)
WEIGHTS_PACKAGE = "lpips"  # on PyPI; holds the weights of the five layers, 7 kB
_EPSILON = 1e-10
_recipe = "lpips-0.1-vgg16-v1"


class Lpips:
    """Features and distances of images. weights: one (C,) of numbers >= 0 for each stage of VGG16."""

    def __init__(
        self, maps: VGG16Maps, weights: Sequence[Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        scales = nn.ParameterList(weight.sqrt().view(1, -1, 1, 1) for weight in weights)
        self.fingerprint = hash_weights(nn.ModuleList([maps, scales]), _recipe)
        self._layout = memory_format(self.device)
        self._maps = maps.requires_grad_(False).eval().to(self.device, memory_format=self._layout)
        self._scales = [scale.detach().to(self.device) for scale in scales]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, F), float32 on `device`; F grows with the images (7.6 million for 256x256)."""
        return torch.cat([x.flatten(1) for x in self._weighted_maps(images)], dim=1)

    @torch.inference_mode()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS (N,) of image i of `a` and image i of `b`, float32 on `device`."""
        if a.shape != b.shape:
            raise ValueError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
        pairs = zip(self._weighted_maps(a), self._weighted_maps(b), strict=True)
        return torch.stack([(x - y).square().sum(dim=(1, 2, 3)) for x, y in pairs]).sum(dim=0)

    def _weighted_maps(self, images: Tensor) -> list[Tensor]:
        """images: (N, 3, H, W) in 0..255, any type; sides of at least 16, as four pools halve them."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 16:
            raise ValueError(f"expected images (N, 3, H, W) of sides >= 16, got {tuple(images.shape)}")
        x = normalize(images.to(self.device).float(), MEAN, STD)
        with full_precision():
            maps = self._maps(x.contiguous(memory_format=self._layout))
        return [
            x
            / (x.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)
            * scale
            / math.sqrt(x.shape[2] * x.shape[3])
            for x, scale in zip(maps, self._scales, strict=True)
        ]


def find_packaged_weights() -> Path | None:
    """The weights file of the installed package `lpips`, found without importing it; None = not installed."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder, "weights", "v0.1", "vgg.pth")
        if path.is_file():
            return path
    return None


def read_lpips_weights(path: Path) -> list[Tensor]:
    """The five weights, (64,) to (512,), of `lpips`' or torch-fidelity's file. Raises UserError."""
    vectors = [tensor.flatten().float() for tensor in read_tensors(path).values()]
    found, wanted = [len(vector) for vector in vectors], [widths[-1] for widths in STAGES]
    if found != wanted:
        raise UserError(
            f"{path} holds vectors of lengths {found}, LPIPS on VGG16 has {wanted}; give its file"
        )
    if any(bool((vector < 0).any()) for vector in vectors):
        raise UserError(f"{path} holds negative weights, which LPIPS has not; give its file")
    return vectors
