# SPDX-License-Identifier: MIT
"""The discriminator of an official file under our names, and the configuration that builds it.

Taken over: the heads and all random frozen layers, without which heads are worthless. The pretrained feature networks
are left out; they are had elsewhere. Needs neither timm nor the networks themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from training.config import DiscriminatorConfig
from training.network_file import NetworkFileError, check_names_and_shapes
from training.official_modules import OfficialModule, StateCopier

_VIT = re.compile(r"(deit|vit)_")
_RANDOM_VIT_LAYER = re.compile(r"layer[1-4]\.[34]\.")  # reassembly of tokens to a feature map
_NUM_LEVELS = 4
_AUGMENT_POLICY = "color,translation,cutout"


@dataclass(frozen=True)
class OfficialDiscriminator:
    """Trained and random frozen parts of a projected discriminator, under our names."""

    config: DiscriminatorConfig
    head_kind: Literal["san", "gan"]
    state: dict[str, Tensor]
    num_left_out: int  # tensors of the pretrained feature networks


def read_discriminator(
    D: OfficialModule, img_resolution: int, c_dim: int, copier: StateCopier
) -> OfficialDiscriminator:
    """D for `ProjectedDiscriminator(config, head_kind).load_trained_state_dict(state)`.

    img_resolution, c_dim: of the generator beside it. Raises NetworkFileError if it is not a whole projected
    discriminator.
    """
    if D.class_name != "ProjectedDiscriminator":
        raise NetworkFileError(f"{D.where} is a {D.class_name}, not a projected discriminator")
    tensors = D.tensors()
    backbones = tuple(D.text_list("backbones"))
    kept = [name for name in tensors if not is_pretrained(name)]
    try:
        state = {our_name(name): tensors[name] for name in kept}
    except (ValueError, IndexError) as error:
        raise NetworkFileError(f"{D.where} has a tensor in an unknown place") from error
    config, head_kind = _config(D, backbones, state, img_resolution, c_dim)
    check_names_and_shapes(_expected(config, head_kind, state), state, Path(D.where), "it is not a whole one")
    return OfficialDiscriminator(config, head_kind, copier.copy(state, D.where), len(tensors) - len(kept))


def is_pretrained(name: str) -> bool:
    """Whether an official tensor name belongs to a pretrained, frozen feature network."""
    root, backbone, part, rest = (*name.split(".", 3), "", "", "")[:4]
    if root != "feature_networks" or part != "pretrained":
        return False
    return not (_VIT.match(backbone) and _RANDOM_VIT_LAYER.match(rest))


def our_name(name: str) -> str:
    """Our name of a tensor of the official discriminator, pretrained or not.

    Official names are feature_networks.<backbone>.{pretrained,scratch}... and
    discriminators.<backbone>.mini_discs.<level>... ValueError for any other.
    """
    root, backbone, part, *rest = name.split(".")
    if root == "discriminators" and part == "mini_discs":
        level, member, *rest = rest
        if member == "main" and rest[1] == "main":  # main.<block>.main.<layer>.<tensor>
            tail = ".".join(["trunk", rest[0], *rest[2:]])
        elif member in (
            "main",
            "last_layer",
        ):  # an unconditional plain head ends inside main, a SAN one beside it
            tail = f"last.{rest[-1]}"
        else:  # cls, embed, embed_proj
            tail = f"last.{'conv' if member == 'cls' else member}.{rest[-1]}"
        return f"heads.{backbone}.{level}.{tail}"
    if root != "feature_networks":
        raise ValueError(name)
    if part == "scratch":  # layer2_ccm, layer2_csm.out_conv
        level, kind = rest[0].removeprefix("layer").split("_")
        return f"projectors.{backbone}.{kind}.{level}.{rest[-1]}"
    return _feature_network_name(backbone, *rest)


def _feature_network_name(backbone: str, *rest: str) -> str:
    prefix = f"feature_networks.{backbone}"
    if rest[0] == "model":
        return f"{prefix}.backbone." + ".".join(rest[1:])
    layer, index = int(rest[0].removeprefix("layer")), int(rest[1])
    if _VIT.match(backbone):
        return f"{prefix}.reassemble.{layer - 1}.{index - 3}.{rest[-1]}"
    if layer == 0 and index < 2:
        return f"{prefix}.backbone.{('conv_stem', 'bn1')[index]}.{rest[-1]}"
    stage = {0: -3, 1: 2, 2: 3, 3: 5}[layer] + index
    return f"{prefix}.backbone.blocks.{stage}." + ".".join(rest[2:])


def _config(
    D: OfficialModule, backbones: tuple[str, ...], state: dict[str, Tensor], img_resolution: int, c_dim: int
) -> tuple[DiscriminatorConfig, Literal["san", "gan"]]:
    head = f"heads.{backbones[0] if backbones else ''}.0"
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    is_conditional = f"{head}.last.conv.weight_orig" in shapes
    last = f"{head}.last.embed" if is_conditional else f"{head}.last"
    head_kind: Literal["san", "gan"] = "san" if f"{last}.scale" in shapes else "gan"
    options = {}
    if is_conditional:
        rows, width = shapes.get(f"{last}.weight", (0, 0))
        options = {
            "c_dim": c_dim,
            "num_class_embeddings": rows,
            "class_dim": shapes[f"{head}.last.conv.weight_orig"][0],
        }
        if head_kind == "gan":
            options["embedding_dim"] = width
    widths = [shape[0] for name, shape in shapes.items() if re.search(r"\.trunk\.\d+\.0\.weight_orig$", name)]
    projected = f"projectors.{backbones[0] if backbones else ''}.ccm.0.weight"
    if not widths or projected not in shapes or (is_conditional and not 0 < c_dim <= rows):
        raise NetworkFileError(f"{D.where} is not a whole projected discriminator")
    config = DiscriminatorConfig(
        img_resolution=img_resolution,
        backbones=backbones,
        feature_resolution=224 if D.flag("interp224", img_resolution < 224) else None,
        projected_channels=shapes[projected][0],
        max_head_channels=max(widths),
        augment_policy=_AUGMENT_POLICY if D.flag("diffaug", True) else "",
        official_batchnorm_statistics=True,  # published runs were trained with them
        **options,
    )
    return config, head_kind


def _expected(config: DiscriminatorConfig, head_kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes of what is saved of a discriminator with feature maps as wide as those in `state`."""
    # Imported here: a generator is read without these.
    from training.discriminator.heads import ProjectionHead
    from training.discriminator.projector import Projector

    expected: dict[str, Tensor] = {}
    with torch.device("meta"):
        for name in config.backbones:
            ccm = [state.get(f"projectors.{name}.ccm.{level}.weight") for level in range(_NUM_LEVELS)]
            channels = tuple(x.shape[1] for x in ccm if x is not None and x.ndim == 4)
            if len(channels) != _NUM_LEVELS:
                raise NetworkFileError(f"{config.backbones} lack a projection for {name}")
            projector = Projector(channels, config.projected_channels)
            heads = nn.ModuleList(
                ProjectionHead(config, head_kind, width, config.nominal_resolution // 2 ** (level + 1))
                for level, width in enumerate(projector.out_channels)
            )
            expected |= {f"projectors.{name}.{key}": x for key, x in projector.state_dict().items()}
            expected |= {f"heads.{name}.{key}": x for key, x in heads.state_dict().items()}
            if _VIT.match(name):
                expected |= _expected_reassembly(name, channels)
    return expected


def _expected_reassembly(name: str, channels: tuple[int, ...]) -> dict[str, Tensor]:
    """channels: of the feature maps; the coarsest is as wide as the tokens."""
    width = channels[-1]
    kernels = {0: 4, 1: 2, 3: 3}  # of the layers that change the resolution
    shapes: dict[str, tuple[int, ...]] = {}
    for level, count in enumerate(channels):
        prefix = f"feature_networks.{name}.reassemble.{level}"
        shapes |= {f"{prefix}.0.weight": (count, width, 1, 1), f"{prefix}.0.bias": (count,)}
        if level in kernels:
            side = kernels[level]
            shapes |= {f"{prefix}.1.weight": (count, count, side, side), f"{prefix}.1.bias": (count,)}
    return {key: torch.empty(shape) for key, shape in shapes.items()}
