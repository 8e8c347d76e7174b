# SPDX-License-Identifier: MIT
"""Vision transformers as detectors: DINOv2 (FD-DINOv2, arXiv:2306.04675) and CLIP (CMMD, arXiv:2401.09603).

Networks and weights are timm's. Images are resized to a square as the published code of each metric does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from metrics.image_input import (
    as_rgb,
    check_images,
    full_precision,
    normalize,
    resize_bicubic,
    resize_pil,
)
from metrics.weight_layers import hash_weights
from torch_utils.errors import UserError
from torch_utils.pretrained import create_pretrained


@dataclass(frozen=True)
class VitRecipe:
    """A network and what is done around it."""

    model: str  # timm's name
    img_resolution: int  # side of the network's input, pixels
    resize: Callable[[Tensor, int], Tensor]  # of metrics.image_input
    mean: tuple[float, float, float]  # of its training images, in [0, 1]
    std: tuple[float, float, float]  # likewise
    has_unit_length: bool  # whether features are divided by their length
    version: str  # changes with anything that changes features

    def create(self, **options: object) -> nn.Module:
        return timm.create_model(self.model, **options)


DINOV2 = VitRecipe(
    model="vit_large_patch14_dinov2.lvd142m",
    img_resolution=224,
    resize=resize_pil,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    has_unit_length=False,
    version="dinov2-224-pil-v2",
)
CLIP = VitRecipe(
    model="vit_large_patch14_clip_quickgelu_336.openai",
    img_resolution=336,
    resize=resize_bicubic,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    has_unit_length=True,
    version="clip-336-bicubic-antialias-unit-v1",
)
# The original DINOv2 gives bicubic interpolation a scale with this added to the side, against rounding.
_POSITION_OFFSET = 0.1


class VitDetector:
    """Features (N, D): the class token after the last norm, projected where the network has a projection."""

    def __init__(
        self, name: str, model: nn.Module, recipe: VitRecipe, device: torch.device | str = "cpu"
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self.batch_size = 4 if self.device.type == "cpu" else 64
        self.num_features = model.num_classes or model.num_features
        self.fingerprint = hash_weights(model, recipe.version)
        self._recipe = recipe
        self._model = model.requires_grad_(False).eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D), float32 on `device`, of uint8 images (N, 3 or 1, H, W); grey is repeated."""
        check_images(images)
        if not len(images):
            return torch.zeros(0, self.num_features, device=self.device)
        with full_precision():
            return torch.cat([self._embed(batch) for batch in images.split(self.batch_size)])

    def _embed(self, images: Tensor) -> Tensor:
        x = as_rgb(self._recipe.resize(images.to(self.device), self._recipe.img_resolution))
        features = self._model(normalize(x, self._recipe.mean, self._recipe.std))
        return F.normalize(features, dim=1) if self._recipe.has_unit_length else features


def dinov2_detector(
    device: torch.device | str, path: Path | None = None, recipe: VitRecipe = DINOV2
) -> VitDetector:
    """FD-DINOv2's detector. path: a local file of weights, timm's or Meta's. Raises UserError without weights."""
    model = _load(recipe, path)
    embed_positions_(model, recipe.img_resolution)
    return VitDetector("dinov2", model, recipe, device)


def clip_detector(
    device: torch.device | str, path: Path | None = None, recipe: VitRecipe = CLIP
) -> VitDetector:
    """CMMD's detector: image embeddings of unit length. path: a local file. Raises UserError without weights."""
    return VitDetector("clip", _load(recipe, path), recipe, device)


def embed_positions_(model: nn.Module, img_resolution: int) -> None:
    """Fit a DINOv2's position embedding to smaller images, in place, as the original code does.

    timm's own way antialiases, which gives other features.
    """
    original = model.pos_embed.detach()  # (1, 1 + side^2, D), the class token's first
    side = round((original.shape[1] - 1) ** 0.5)
    model.set_input_size(img_size=img_resolution)
    new_side = img_resolution // model.patch_embed.patch_size[0]
    if new_side == side:
        return
    grid = original[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    scale = (new_side + _POSITION_OFFSET) / side
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    positions = torch.cat([original[:, :1].float(), grid.flatten(2).transpose(1, 2)], dim=1)
    with torch.no_grad():
        model.pos_embed.copy_(positions)


def _load(recipe: VitRecipe, path: Path | None) -> nn.Module:
    if path is None:
        return create_pretrained(recipe.model, create=timm.create_model)
    model = recipe.create(pretrained=False)
    try:
        timm.models.load_checkpoint(model, str(path), filter_fn=checkpoint_filter_fn, weights_only=True)
    except Exception as error:  # timm raises what its file formats raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path} does not hold the weights of {recipe.model} ({reason}); give its file"
        ) from error
    return model
