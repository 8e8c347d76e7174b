# SPDX-License-Identifier: MIT
"""Frozen, pretrained feature networks: images to four feature maps, from the finest to the coarsest.

Projected GANs (arXiv:2111.01007) compare images in the features of networks trained on ImageNet; StyleGAN-XL
(arXiv:2202.00273) takes EfficientNet-Lite0 and a distilled DeiT together. All networks come from timm (1.0 or
later). They are never trained and always in evaluation mode, but gradients flow through them to the images.
"""

from __future__ import annotations

import difflib
import functools
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.pretrained import create_pretrained
from training.config import ConfigError, FeaturePrecision
from training.discriminator.frozen_conv import fold_batchnorm_
from training.discriminator.reduced_precision import round_to_bfloat16_, run_in_tf32

MAX_LEVELS = 4  # feature maps of a network
CNN_REDUCTIONS = (4, 8, 16, 32)  # image side / side of the feature map, per level
VIT_BLOCKS = (2, 5, 8, 11)  # the transformer blocks whose outputs are used, 0-based
VIT_RESOLUTION = 224  # side of the images that the discriminator feeds to a ViT, pixels
PROBE_RESOLUTION = 256  # side of the official probe image, pixels
_VIT_NAME = re.compile(r"(deit|vit)_(tiny|small|base)(_distilled)?_patch16_224(\..+)?")


class FeatureNetwork(nn.Module):
    """What the networks share: input normalisation, and that nothing ever switches them to training.

    `backbone` holds the pretrained part, which is never saved; a subclass may have random layers beside it.
    """

    precision: FeaturePrecision = "paper"  # see `set_precision_`
    channels: tuple[int, ...]  # of the feature maps, finest first
    required_resolution: int | None = None  # side that the images must be resized to; None = any

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        mean, std = (torch.tensor(backbone.default_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        # (x + 1) / 2 and (x - mean) / std in one step. Lite0's 0.5 and 0.5 make it the identity.
        self.register_buffer("input_scale", 0.5 / std, persistent=False)
        self.register_buffer("input_shift", (0.5 - mean) / std, persistent=False)
        statistics = [*backbone.default_cfg["mean"], *backbone.default_cfg["std"]]
        self.is_identity_normalization = all(value == 0.5 for value in statistics)

    def normalize(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] with the mean and deviation that the network was trained on."""
        return images if self.is_identity_normalization else images * self.input_scale + self.input_shift

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of normalised images (N, 3, H, W), of the images' type in every precision."""
        if self.precision == "tf32":
            return run_in_tf32(self.feature_maps, images)
        return self.feature_maps(images)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """What `forward` gives, with the process's switches as they are."""
        raise NotImplementedError

    def level_sizes(self, resolution: int) -> tuple[int, ...]:
        """Sides of the feature maps for square images, in pixels, finest first."""
        raise NotImplementedError

    def set_precision_(self, precision: FeaturePrecision) -> None:
        """Compute in "paper" (float32), "tf32" (in float32 layers on CUDA) or "bf16" from now on.

        "bf16" rounds the pretrained weights, after BatchNorms were folded, for good. BatchNorms that were not folded
        stay in float32, as do random layers that are saved with the discriminator.
        """
        self.precision = precision
        if precision == "bf16":
            round_to_bfloat16_(self.backbone)

    def to_own_type(self, images: Tensor) -> Tensor:
        """Images in the type that the pretrained part computes in."""
        return images.to(torch.bfloat16) if self.precision == "bf16" else images

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in evaluation mode whatever `mode` is: nothing frozen may depend on the batch."""
        return super().train(False)


class CNNFeatures(FeatureNetwork):
    """Feature maps at 1/4, 1/8, 1/16 and 1/32 of a convolutional network; the coarsest may be left out.

    Normalised images (N, 3, H, W) -> list of float (N, C_k, ceil(H / 4 / 2^k), ceil(W / 4 / 2^k)).
    For EfficientNet-Lite0: 24, 40, 112, 320 channels, the outputs of stages 1, 2, 4 and 6.
    """

    def __init__(self, backbone: nn.Module, num_levels: int = MAX_LEVELS) -> None:
        """backbone: `timm.create_model(..., features_only=True)`."""
        super().__init__(backbone)
        info = backbone.feature_info
        self._first = len(info.reduction()) - MAX_LEVELS
        if self._first < 0 or tuple(info.reduction()[self._first :]) != CNN_REDUCTIONS:
            raise ConfigError(
                f"feature maps at 1/{info.reduction()} of the image are not supported as a backbone: "
                "choose a network with maps at 1/4, 1/8, 1/16 and 1/32, such as tf_efficientnet_lite0"
            )
        self.channels = tuple(info.channels()[self._first :][:num_levels])
        if is_efficientnet(backbone):  # stages behind the last tap would run for nothing
            last_stage = int(info.module_name()[self._first + num_levels - 1].removeprefix("blocks."))
            backbone.blocks = backbone.blocks[: last_stage + 1]
        self.requires_grad_(False).eval()

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x = self.to_own_type(images).contiguous(memory_format=torch.channels_last)
        return [y.to(images.dtype) for y in self.backbone(x)[self._first :][: len(self.channels)]]

    def level_sizes(self, resolution: int) -> tuple[int, ...]:
        return tuple(-(-resolution // reduction) for reduction in CNN_REDUCTIONS[: len(self.channels)])

    @torch.no_grad()
    def pooled_features(self, images: Tensor, resolution: int | None = None) -> Tensor:
        """Spatial mean of the coarsest feature map, float (N, C): (N, 320) for Lite0 with all levels.

        images: (N, 3, H, W) in [-1, 1], resized bilinearly to `resolution` first; None = as they are.
        """
        return self(resize(self.normalize(images), resolution))[-1].mean(dim=(2, 3))

    @torch.no_grad()
    def shift_statistics_(self) -> None:
        """Move all BatchNorm statistics a tenth of the way towards those of an image of zeros.

        The official code runs one zero image through the fresh network, in training mode, to learn channel
        counts; the published models were trained with the statistics that this leaves behind, which changes
        features by 18 % to 49 %. Call before `fold_batchnorm_`. See docs/fidelity.md#batchnorm-statistics.
        """
        parameter = next(self.backbone.parameters())
        self.backbone.train()
        self.backbone(torch.zeros(1, 3, PROBE_RESOLUTION, PROBE_RESOLUTION, device=parameter.device))
        self.backbone.eval()

    def fold_batchnorm_(self) -> None:
        """Merge every BatchNorm into the convolution before it; the features stay the same up to rounding.

        Halves the time on a CPU. Call after the weights are loaded: the layout changes.
        Only EfficientNets are known to be fit for it; other networks stay as they are.
        """
        if is_efficientnet(self.backbone):
            from timm.layers import Conv2dSame

            fold_batchnorm_(self.backbone, same_padding_type=Conv2dSame)


class ViTFeatures(FeatureNetwork):
    """Feature maps of a plain or distilled vision transformer (DeiT, arXiv:2012.12877) with 16x16 patches.

    Normalised images (N, 3, H, W) -> list of float (N, C_k, ...) with sides 4, 2, 1 and 1/2 times the token
    grid (56, 28, 14, 7 for 224x224) and width / 8, / 4, / 2 and / 1 channels. The tokens after blocks 2, 5, 8
    and 11, without class and distillation tokens, are brought to these shapes by random convolutions,
    `reassemble`, that are never trained: they are part of the discriminator and must be saved with it.
    """

    required_resolution = VIT_RESOLUTION

    def __init__(self, backbone: nn.Module, num_levels: int = MAX_LEVELS) -> None:
        """backbone: the whole classifier, `timm.create_model(...)`."""
        super().__init__(backbone)
        dim = backbone.embed_dim
        backbone.blocks = backbone.blocks[: VIT_BLOCKS[num_levels - 1] + 1]
        self.channels = (dim // 8, dim // 4, dim // 2, dim)[:num_levels]
        c0, c1, c2, c3 = dim // 8, dim // 4, dim // 2, dim
        layers = [
            nn.Sequential(nn.Conv2d(dim, c0, 1), nn.ConvTranspose2d(c0, c0, 4, stride=4)),
            nn.Sequential(nn.Conv2d(dim, c1, 1), nn.ConvTranspose2d(c1, c1, 2, stride=2)),
            nn.Sequential(nn.Conv2d(dim, c2, 1)),
            nn.Sequential(nn.Conv2d(dim, c3, 1), nn.Conv2d(c3, c3, 3, stride=2, padding=1)),
        ]
        self.reassemble = nn.ModuleList(layers[:num_levels])
        self.requires_grad_(False).eval()

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        grid = (images.shape[2] // 16, images.shape[3] // 16)
        return [
            layer(tokens[:, self.backbone.num_prefix_tokens :].to(images).transpose(1, 2).unflatten(2, grid))
            for layer, tokens in zip(self.reassemble, self.block_tokens(images), strict=True)
        ]

    def block_tokens(self, images: Tensor) -> list[Tensor]:
        """Tokens (N, prefix + patches, width) after each used block, before the final LayerNorm."""
        vit = self.backbone
        patches = vit.patch_embed.proj(self.to_own_type(images))  # (N, width, H / 16, W / 16)
        prefix = [vit.cls_token] + ([vit.dist_token] if vit.num_prefix_tokens == 2 else [])
        tokens = torch.cat(
            [*(token.expand(len(images), -1, -1) for token in prefix), patches.flatten(2).transpose(1, 2)],
            dim=1,
        )
        tokens = tokens + self.position_embedding(*patches.shape[2:])
        taps = []
        for index, block in enumerate(vit.blocks):
            tokens = block(tokens)
            if index in VIT_BLOCKS:
                taps.append(tokens)
        return taps

    def position_embedding(self, height: int, width: int) -> Tensor:
        """Position embedding (1, prefix + height * width, token width), resized bilinearly to a grid."""
        num_prefix = self.backbone.num_prefix_tokens
        prefix, patches = self.backbone.pos_embed.tensor_split([num_prefix], dim=1)
        side = int(patches.shape[1] ** 0.5)
        if (side, side) == (height, width):
            return self.backbone.pos_embed
        image = patches.transpose(1, 2).unflatten(2, (side, side))
        image = F.interpolate(image, (height, width), mode="bilinear", align_corners=False)
        return torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)

    def level_sizes(self, resolution: int) -> tuple[int, ...]:
        grid = resolution // 16
        return (4 * grid, 2 * grid, grid, (grid + 1) // 2)[: len(self.channels)]


def build_feature_network(
    name: str,
    pretrained: bool = True,
    num_levels: int = MAX_LEVELS,
    official_batchnorm_statistics: bool = False,
) -> CNNFeatures | ViTFeatures:
    """The feature network of a timm name, frozen, in its fastest form.

    pretrained: False = random weights, for tests. num_levels: feature maps, 1 to 4, from the finest; what
    only coarser ones need is not built. official_batchnorm_statistics: see `CNNFeatures.shift_statistics_`.
    Raises ConfigError for a name that timm does not know or a network without suitable feature maps,
    UserError when the weights cannot be had.
    """
    import timm  # here, as it takes seconds, which a run without feature networks need not wait for

    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "timm.list_models() lists the names"
        raise ConfigError(f"backbone {name!r} is not the name of a timm model; {hint}")
    is_vit = _VIT_NAME.fullmatch(name) is not None
    create = timm.create_model if is_vit else functools.partial(timm.create_model, features_only=True)
    try:
        backbone = create_pretrained(name, create) if pretrained else create(name, pretrained=False)
    except AttributeError as error:
        raise ConfigError(
            f"backbone {name!r} has no feature maps in timm; use tf_efficientnet_lite0"
        ) from error
    if is_vit:
        return ViTFeatures(backbone, num_levels)
    features = CNNFeatures(backbone, num_levels)
    if official_batchnorm_statistics:
        features.shift_statistics_()
    features.fold_batchnorm_()
    return features


def is_efficientnet(backbone: nn.Module) -> bool:
    """Whether timm built an EfficientNet for its feature maps."""
    from timm.models import EfficientNetFeatures

    return isinstance(backbone, EfficientNetFeatures)


def resize(images: Tensor, resolution: int | None) -> Tensor:
    """Images resized to a square of side `resolution`: bilinear, not antialiased. None = as they are."""
    if resolution is None or images.shape[2:] == (resolution, resolution):
        return images
    return F.interpolate(images, (resolution, resolution), mode="bilinear", align_corners=False)
