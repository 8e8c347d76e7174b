# SPDX-License-Identifier: MIT
"""Discriminators of official files: whole ones are read to the last number, others are left out with the reason."""

from __future__ import annotations

import functools
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm

from training.config import DiscriminatorConfig, GeneratorConfig, MappingConfig, SynthesisConfig
from training.discriminator.projected import ProjectedDiscriminator
from training.generator.generator import Generator
from training.network_io import read_network
from training.official_discriminator import is_pretrained, our_name

DATA = Path(__file__).parents[1] / "data"
DEIT, LITE0 = "deit_tiny_distilled_patch16_224", "tf_efficientnet_lite0"


def tiny_generator(c_dim: int) -> Generator:
    mapping = MappingConfig(z_dim=6, w_dim=8, c_dim=c_dim, num_embeddings=5, embedding_dim=4)
    synthesis = SynthesisConfig(
        img_resolution=16, channel_base=128, channel_max=6, num_layers=6, margin_size=4
    )
    return Generator(GeneratorConfig(mapping=mapping, synthesis=synthesis))


def down_block(official, in_channels: int, out_channels: int) -> nn.Module:
    block = official.DownBlock()
    convolution = spectral_norm(nn.Conv2d(in_channels, out_channels, 4, 2, 1))
    block.main = nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2, inplace=True))
    return block


def head(official, kind: str, is_conditional: bool, in_channels: int, num_blocks: int) -> nn.Module:
    """One SingleDisc or SingleDiscCond with 16 channels inside."""
    disc = (official.SingleDiscCond if is_conditional else official.SingleDisc)()
    widths = [in_channels] + [16] * num_blocks
    blocks = [down_block(official, a, b) for a, b in itertools.pairwise(widths)]
    if kind == "gan" and not is_conditional:
        blocks.append(spectral_norm(nn.Conv2d(16, 1, 4, bias=False)))
    disc.main = nn.Sequential(*blocks)
    if is_conditional:
        disc.cls = spectral_norm(nn.Conv2d(16, 12, 4, bias=False))
        if kind == "san":
            disc.embed = official.SANEmbedding()
            disc.embed.weight, disc.embed.scale = (
                nn.Parameter(torch.zeros(7, 12)),
                nn.Parameter(torch.zeros(7, 1)),
            )
        else:
            disc.embed = nn.Embedding(7, 9)
            disc.embed_proj = nn.Module()  # stands for a persistent fully connected layer, see write_snapshot
            disc.embed_proj.weight = nn.Parameter(torch.zeros(12, 9))
            disc.embed_proj.bias = nn.Parameter(torch.zeros(12))
    elif kind == "san":
        disc.last_layer = official.SANConv2d()
        disc.last_layer.weight = nn.Parameter(torch.zeros(1, 16, 4, 4))
        disc.last_layer.scale = nn.Parameter(torch.zeros(1))
    return disc


def feature_network(official, name: str) -> nn.Module:
    """F_RandomProj: a pretrained network with hooks and bound methods, reassembly layers, and projections."""
    channels = (24, 48, 96, 192) if name == DEIT else (24, 40, 112, 320)
    network, pretrained, scratch = official.F_RandomProj(), nn.Module(), nn.Module()
    pretrained.model = official.VisionTransformer() if name == DEIT else official.InvertedResidual()
    pretrained.model.conv = nn.Conv2d(3, 4, 3)
    pretrained.model.register_forward_hook(functools.partial(official.store_activation, name="1"))
    pretrained.model.bound = pretrained.model.conv.forward  # pickles as a call of getattr
    if name == DEIT:
        for level, count in enumerate(channels):
            more = {0: [nn.ConvTranspose2d(count, count, 4, 4)], 1: [nn.ConvTranspose2d(count, count, 2, 2)]}
            more |= {2: [], 3: [nn.Conv2d(count, count, 3, 2, 1)]}
            layers = [nn.Identity(), nn.Identity(), nn.Identity(), nn.Conv2d(192, count, 1), *more[level]]
            setattr(pretrained, f"layer{level + 1}", nn.Sequential(*layers))
    else:
        pretrained.layer0 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for level, (count, width, out) in enumerate(zip(channels, (8, 16, 32, 64), (8, 8, 16, 32), strict=True)):
        setattr(scratch, f"layer{level}_ccm", nn.Conv2d(count, width, 1))
        csm = nn.Module()
        csm.out_conv = nn.Conv2d(width, out, 1)
        setattr(scratch, f"layer{level}_csm", csm)
    network.pretrained, network.scratch = pretrained, scratch
    return network


def official_discriminator(
    official, kind: str, is_conditional: bool, backbones: tuple[str, ...]
) -> nn.Module:
    D = official.ProjectedDiscriminator()
    D.feature_networks, D.discriminators = nn.ModuleDict(), nn.ModuleDict()
    for name in backbones:
        D.feature_networks[name] = feature_network(official, name)
        scales = official.MultiScaleD()
        widths = ((8, 4), (8, 3), (16, 2), (32, 1))
        heads = [head(official, kind, is_conditional, width, blocks) for width, blocks in widths]
        scales.mini_discs = nn.ModuleDict({str(level): x for level, x in enumerate(heads)})
        D.discriminators[name] = scales
    D.backbones, D.interp224, D.diffaug = list(backbones), True, True
    return D


def copy_weights_(D: nn.Module, ours: ProjectedDiscriminator) -> None:
    state = ours.trained_state_dict()
    with torch.no_grad():
        for name, value in D.state_dict().items():
            if not is_pretrained(name):
                value.copy_(state[our_name(name)])


def write_snapshot(official, path: Path, D: nn.Module, c_dim: int) -> Path:
    for module in list(D.modules()):
        if isinstance(module._modules.get("embed_proj"), nn.Module):
            module.__dict__["_modules"]["embed_proj"] = official.node(
                "FullyConnectedLayer", module.embed_proj
            )
    return official.write(path, {"D": D, "G_ema": official.generator(tiny_generator(c_dim))})


@pytest.mark.parametrize("backbones", [(DEIT, LITE0), (LITE0,)], ids=["both", "one"])
@pytest.mark.parametrize("is_conditional", [True, False], ids=["cond", "uncond"])
@pytest.mark.parametrize("kind", ["san", "gan"])
def test_whole_discriminators_are_read(tmp_path, official, kind, is_conditional, backbones):
    c_dim = 3 if is_conditional else 0
    config = DiscriminatorConfig(
        img_resolution=16,
        c_dim=c_dim,
        backbones=backbones,
        projected_channels=8,
        max_head_channels=16,
        official_batchnorm_statistics=True,
    )
    if is_conditional:
        config = replace(config, class_dim=12, num_class_embeddings=7)
        config = replace(config, embedding_dim=9) if kind == "gan" else config
    ours = ProjectedDiscriminator(config, kind, pretrained=False)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    D = official_discriminator(official, kind, is_conditional, backbones)
    copy_weights_(D, ours)
    stored = read_network(write_snapshot(official, tmp_path / "net.pkl", D, c_dim))
    assert stored.discriminator_config == config, stored.info
    assert stored.head_kind == kind
    state = ours.trained_state_dict()
    assert stored.D.keys() == state.keys()
    assert all(torch.equal(stored.D[name], value) for name, value in state.items())
    assert f"{kind.upper()} heads on {backbones[0]}" in stored.info["discriminator"]
    if backbones == (LITE0,):
        assert_same_logits(ours, stored, is_conditional)


def assert_same_logits(ours: ProjectedDiscriminator, stored, is_conditional: bool) -> None:
    """With the same pretrained network, which is not in the file."""
    again = ProjectedDiscriminator(stored.discriminator_config, stored.head_kind, pretrained=False)
    again.feature_networks[LITE0].load_state_dict(ours.feature_networks[LITE0].state_dict())
    again.load_trained_state_dict(stored.D)
    images, labels = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([2, 0]) if is_conditional else None
    with torch.no_grad():
        a, b = (network.eval()(images, labels)[LITE0].fun for network in (ours, again))
    assert torch.equal(a, b) and a.shape == (2, 64)


@pytest.mark.parametrize("tag", ["PD_uncond_32", "PD_cond_32"])
@pytest.mark.parametrize("kind", ["san", "gan"])
def test_official_names_of_a_full_size_discriminator_have_a_place(tmp_path, official, kind, tag):
    """The list of official names and shapes, as modules; numbers are tested where the heads are."""
    with np.load(DATA / f"d_discriminator_{kind}.npz") as data:
        names = [
            (name, shape)
            for name, shape in json.loads(str(data[f"{tag}/names"]))
            if ".num_batches" not in name
        ]
    D = official.ProjectedDiscriminator()
    for name, shape in names:
        *path, last = name.split(".")
        module = D
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_buffer(last, torch.zeros(1 if is_pretrained(name) else shape))
        if last == "running_mean":
            module.register_buffer("num_batches_tracked", torch.tensor(3))
    D.backbones, D.interp224, D.diffaug = [DEIT, LITE0], True, False
    stored = read_network(write_snapshot(official, tmp_path / "net.pkl", D, 3 if "_cond_" in tag else 0))
    assert stored.head_kind == kind, stored.info
    official = {our_name(name): tuple(shape) for name, shape in names if not is_pretrained(name)}
    found = {name: tuple(x.shape) for name, x in stored.D.items() if not name.endswith("num_batches_tracked")}
    assert found == official
    expected = DiscriminatorConfig(img_resolution=16, backbones=(DEIT, LITE0), augment_policy="")
    assert replace(stored.discriminator_config, c_dim=0) == replace(
        expected, official_batchnorm_statistics=True
    )


def damaged_discriminators(official) -> dict[str, tuple[nn.Module, str]]:
    def fresh() -> nn.Module:
        return official_discriminator(official, "san", True, (LITE0,))

    another, no_projection, no_head, shape = nn.Linear(2, 2), fresh(), fresh(), fresh()
    del no_projection.feature_networks[LITE0].scratch.layer2_ccm
    del no_head.discriminators[LITE0].mini_discs["3"]
    shape.discriminators[LITE0].mini_discs["2"].embed.scale = nn.Parameter(torch.zeros(5, 1))
    elsewhere, unnamed = fresh(), fresh()
    elsewhere.logits = nn.Linear(2, 2)
    unnamed.backbones = []
    return {
        "another network": (another, "D is a Linear, not a projected discriminator"),
        "no projection": (no_projection, "lack a projection"),
        "no head": (no_head, "D lacks tensor 'heads.tf_efficientnet_lite0.3"),
        "misshapen": (shape, r"has shape \(5, 1\), expected \(7, 1\)"),
        "tensor elsewhere": (elsewhere, "a tensor in an unknown place"),
        "no backbones": (unnamed, "not a whole projected discriminator"),
    }


@pytest.mark.parametrize(
    "name", ["another network", "no projection", "no head", "misshapen", "tensor elsewhere", "no backbones"]
)
def test_a_discriminator_that_is_not_whole_is_left_out_with_the_reason(tmp_path, official, name):
    D, reason = damaged_discriminators(official)[name]
    stored = read_network(write_snapshot(official, tmp_path / "net.pkl", D, 3))
    assert stored.D is None and stored.discriminator_config is None
    assert re.search(reason, stored.info["discriminator"]), stored.info["discriminator"]
