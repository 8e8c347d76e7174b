# SPDX-License-Identifier: MIT
"""Detectors: uint8 images in, feature vectors out. A metric takes any object with the shape of `Detector`.

`Lite0Detector` is the one that needs no download: EfficientNet-Lite0 (arXiv:1905.11946, the "lite" variant)
with the weights that are installed with the package. Distances on it are called fd_lite0 and never FID.
"""

from __future__ import annotations

import functools
from typing import Protocol

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from metrics.image_input import check_images, full_precision, memory_format
from metrics.weight_layers import hash_weights
from torch_utils.pretrained import create_pretrained


class Detector(Protocol):
    """What a metric needs of a feature network."""

    name: str  # short, for messages and file names
    fingerprint: str  # changes whenever the features of the same image change: weights and preprocessing

    def __call__(self, images: Tensor) -> Tensor:
        """Features, float32 (N, D) on any device, of uint8 images (N, 3, H, W) in 0..255."""
        ...


class Lite0Detector:
    """Pooled last-stage features, float32 (N, 320), of EfficientNet-Lite0 at 128x128.

    The tap is the output of the last inverted-residual stage, before the 1,280-channel head convolution. A
    1,280-d covariance from the 1,797 built-in digits would be ill-conditioned, and rank deficient from a few
    hundred images of another set; 320 dimensions are well determined by so few.
    """

    name = "lite0"
    num_features = 320
    img_resolution = 128  # images are resized to this side: a third of the cost of 224, enough for strokes
    batch_size = 64  # fastest of 16..128 on one CPU thread: larger ones fall out of the cache
    # Version of the preprocessing and the tap; change it with them, so that cached statistics are not reused.
    _recipe = "lite0-blocks-mean-128-bilinear-antialias-v1"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        model = create_pretrained("tf_efficientnet_lite0", create=timm.create_model).eval()
        self.fingerprint = hash_weights(model, self._recipe)
        trunk = nn.Sequential(model.conv_stem, model.bn1, model.blocks)
        fold_batchnorm_(trunk)
        trunk.requires_grad_(False).eval()
        self._layout = memory_format(self.device)
        self._trunk = trunk.to(self.device, memory_format=self._layout)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, 320), float32 on `device`, of uint8 images (N, 3 or 1, H, W); grey is repeated."""
        check_images(images)
        with full_precision():
            features = [self._embed(batch) for batch in images.split(self.batch_size)]
        return torch.cat(features) if features else torch.zeros(0, self.num_features, device=self.device)

    def _embed(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float()
        x = x.expand(-1, 3, -1, -1) / 127.5 - 1  # = (x / 255 - 0.5) / 0.5
        x = resize_square(x, self.img_resolution)
        return self._trunk(x.contiguous(memory_format=self._layout)).mean(dim=(2, 3))


@functools.lru_cache(maxsize=2)
def lite0_detector(device: torch.device) -> Lite0Detector:
    """The shared detector of a device; loading and folding its weights takes half a second."""
    return Lite0Detector(device)


def resize_square(x: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) to (N, C, side, side): bilinear on pixel centres, antialiased when shrinking."""
    if x.shape[2:] == (side, side):
        return x
    is_shrinking = x.shape[2] > side or x.shape[3] > side
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=is_shrinking)


def fold_batchnorm_(module: nn.Module) -> None:
    """Fold every eval-mode BatchNorm that directly follows a convolution into it, in place.

    Halves the passes over memory. "Follows" means in order of registration, skipping identities, which is the
    order of execution in timm's EfficientNet blocks; activations that timm keeps inside its BatchNorm stay.
    """
    conv_name = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            conv_name = name
        elif isinstance(child, nn.BatchNorm2d) and conv_name is not None:
            fused = fuse_conv_bn_eval(module.get_submodule(conv_name), child)
            setattr(module, conv_name, fused)
            setattr(module, name, getattr(child, "act", nn.Identity()))
            conv_name = None
        elif not isinstance(child, nn.Identity):
            conv_name = None
            fold_batchnorm_(child)
