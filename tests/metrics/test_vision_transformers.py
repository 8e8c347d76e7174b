# SPDX-License-Identifier: MIT
"""Vision transformers: preprocessing against PIL, DINOv2's positions against a formula, recipes against timm's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from metrics.vision_transformers import (
    CLIP,
    DINOV2,
    VitDetector,
    clip_detector,
    dinov2_detector,
    embed_positions_,
)
from torch_utils.errors import UserError

SMALL = dataclasses.replace(DINOV2, model="vit_small_patch14_dinov2.lvd142m", img_resolution=56)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(1)
    model = timm.create_model(SMALL.model, pretrained=False)
    nn.init.normal_(model.pos_embed, std=0.5)
    path = tmp_path_factory.mktemp("weights") / "dinov2.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def detector(file) -> VitDetector:
    return dinov2_detector("cpu", file, SMALL)


def resized(image: Tensor, side: int) -> Tensor:
    """A uint8 image (3, H, W) through PIL."""
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float()


def test_features_are_the_class_token_of_resized_images(detector):
    images = torch.randint(0, 256, (2, 3, 100, 80), dtype=torch.uint8)
    x = torch.stack([resized(image, 56) for image in images]) / 255
    x = (x - torch.tensor(DINOV2.mean)[:, None, None]) / torch.tensor(DINOV2.std)[:, None, None]
    with torch.inference_mode():
        expected = detector._model.forward_features(x)[:, 0]
    found = detector(images)
    assert found.shape == (2, detector.num_features) == (2, 384) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(detector(images[1:]), found[1:], rtol=1e-4, atol=1e-4)
    assert detector(images[:0]).shape == (0, 384)
    with pytest.raises(ValueError, match="expected uint8"):
        detector(images.float())


def cubic(t: float) -> float:
    """Keys' kernel with a = -0.75, that of torch."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def test_positions_are_interpolated_with_the_original_offset():
    model = timm.create_model(SMALL.model, pretrained=False)
    nn.init.normal_(model.pos_embed)
    before = model.pos_embed.detach().clone()
    embed_positions_(model, 56)  # 37 x 37 positions to 4 x 4
    grid = before[0, 1:].unflatten(0, (37, 37)).double()
    scale = 37 / (4 + 0.1)
    weights = torch.zeros(4, 37, dtype=torch.float64)
    for i in range(4):
        centre = (i + 0.5) * scale - 0.5
        for k in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(k, 0), 36)] += cubic(centre - k)
    expected = torch.einsum("ik,jl,kld->ijd", weights, weights, grid).flatten(0, 1)
    assert model.pos_embed.shape == (1, 17, 384)
    assert torch.equal(model.pos_embed[0, 0], before[0, 0])
    torch.testing.assert_close(model.pos_embed[0, 1:].detach().double(), expected, rtol=1e-3, atol=1e-3)


def test_positions_of_the_native_size_stay():
    model = timm.create_model(SMALL.model, pretrained=False)
    before = model.pos_embed.detach().clone()
    embed_positions_(model, 518)
    assert torch.equal(model.pos_embed, before)


def test_clip_features_have_unit_length():
    torch.manual_seed(2)
    model = timm.create_model("test_vit", pretrained=False, num_classes=24)
    recipe = dataclasses.replace(CLIP, img_resolution=model.pretrained_cfg["input_size"][1])
    detector = VitDetector("clip", model, recipe)
    found = detector(torch.randint(0, 256, (3, 1, 20, 20), dtype=torch.uint8))
    assert found.shape == (3, 24)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(("recipe", "width", "resolution"), [(DINOV2, 1024, 518), (CLIP, 768, 336)])
def test_recipes_agree_with_timm(recipe, width, resolution):
    with torch.device("meta"):
        model = recipe.create(pretrained=False)
    cfg = model.pretrained_cfg
    assert (cfg["mean"], cfg["std"]) == (recipe.mean, recipe.std)
    assert cfg["input_size"] == (3, resolution, resolution)
    assert (model.num_classes or model.num_features) == width
    assert model.global_pool == "token"
    assert isinstance(model.norm, nn.LayerNorm)


def test_clip_has_its_own_gelu():
    with torch.device("meta"):
        model = CLIP.create(pretrained=False)
    x = torch.tensor([-1.0, 0.5, 2.0])
    torch.testing.assert_close(model.blocks[0].mlp.act(x), x * torch.sigmoid(1.702 * x))


def test_other_weights_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="does not hold the weights of test_vit") as caught:
        save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
        clip_detector("cpu", tmp_path / "other.safetensors", dataclasses.replace(CLIP, model="test_vit"))
    assert "\n" not in str(caught.value)
