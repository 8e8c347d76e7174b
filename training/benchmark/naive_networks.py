# SPDX-License-Identifier: MIT
"""The official forward passes of G and D, written naively on the very parameters of our modules.

`NaiveGenerator` has none of its own. `NaiveDiscriminator` takes its feature networks from timm as they come, with
BatchNorms, in the order of the formulas; heads and projections are copies of ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from san import SANLogits
from training.augment import CUTOUT_RATIO, OPERATIONS, brightness, contrast, saturation
from training.benchmark import naive_ops
from training.discriminator.feature_network import (
    PROBE_RESOLUTION,
    VIT_BLOCKS,
    VIT_RESOLUTION,
    ViTFeatures,
    build_feature_network,
)
from training.discriminator.projected import ProjectedDiscriminator, module_key
from training.draws import Draws
from training.generator.generator import Generator
from training.generator.synthesis import SynthesisInput, SynthesisLayer

BACKBONE_SEED = 1000  # of the first feature network's random weights; the others follow


class NaiveGenerator:
    """A generator of ours that is called as always and computes naively; gradients reach its own parameters."""

    def __init__(self, G: Generator) -> None:
        self.G = G
        self.z_dim, self.c_dim, self.num_ws = G.z_dim, G.c_dim, G.num_ws
        self.img_resolution = G.img_resolution
        self.mapping = G.mapping

    def __call__(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        return self.synthesis(self.mapping(z, c))

    def synthesis(self, ws: Tensor) -> Tensor:
        """Images (N, 3, H, W), float32, of style vectors (N, num_ws, w_dim)."""
        network = self.G.synthesis
        x = fourier_features(network.input, ws[:, 0])
        for index, layer in enumerate(network.layers):
            x = synthesis_layer(layer, x, ws[:, index + 1])
        return (x * network.plan.output_scale).float()


def fourier_features(block: SynthesisInput, w: Tensor) -> Tensor:
    """Sines of every frequency at every pixel, (N, C, H, W), of the first style vectors (N, w_dim)."""
    t = block.affine(w)
    cos, sin, x, y = (t / t[:, :2].norm(dim=1, keepdim=True)).unbind(dim=1)
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    rotation = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=1).view(-1, 3, 3)
    shift = torch.stack([one, zero, -x, zero, one, -y, zero, zero, one], dim=1).view(-1, 3, 3)
    motion = rotation @ shift @ block.transform
    phases = block.phases + (block.freqs @ motion[:, :2, 2:]).squeeze(2)  # (N, C)
    freqs = block.freqs @ motion[:, :2, :2]  # (N, C, 2)
    nyquist = block.sampling_rate / 2
    amplitudes = (1 - (freqs.norm(dim=2) - block.bandwidth) / (nyquist - block.bandwidth)).clamp(0, 1)
    scale = w.new_tensor([block.width, block.height]) * 0.5 / block.sampling_rate
    theta = F.pad(torch.diag(scale), [0, 1]).expand(len(w), -1, -1)  # (N, 2, 3)
    grid = F.affine_grid(theta, [len(w), 1, block.height, block.width], align_corners=False)
    features = (grid.unsqueeze(3) @ freqs.transpose(1, 2)[:, None, None]).squeeze(3)  # (N, H, W, C)
    features = torch.sin((features + phases[:, None, None]) * (2 * math.pi)) * amplitudes[:, None, None]
    weight = block.weight / math.sqrt(block.weight.shape[1])
    return (features @ weight.t()).permute(0, 3, 1, 2)


def synthesis_layer(layer: SynthesisLayer, x: Tensor, w: Tensor) -> Tensor:
    """One layer; half precision where the official code has it, on CUDA."""
    plan = layer.plan
    dtype = torch.float16 if plan.use_fp16 and x.is_cuda else torch.float32
    styles = layer.affine(w)
    if plan.is_torgb:
        styles = styles * (1 / math.sqrt(layer.weight[0].numel()))
    x = naive_ops.modulated_conv2d(
        x.to(dtype),
        layer.weight,
        styles,
        demodulate=not plan.is_torgb,
        padding=plan.conv_kernel - 1,
        input_gain=layer.magnitude_ema.rsqrt(),
    )
    return naive_ops.filtered_lrelu(
        x,
        fu=layer.up_filter,
        fd=layer.down_filter,
        b=layer.bias.to(dtype),
        up=plan.up_factor,
        down=plan.down_factor,
        padding=plan.padding,
        gain=1.0 if plan.is_torgb else math.sqrt(2),
        slope=1.0 if plan.is_torgb else 0.2,
        clamp=plan.conv_clamp,
    )


def seed_backbones_(D: ProjectedDiscriminator) -> None:
    """Give the feature networks of D other random weights: those that `NaiveDiscriminator` will have too."""
    for index, name in enumerate(D.names):
        torch.manual_seed(BACKBONE_SEED + index)
        network = build_feature_network(
            name, False, D.cfg.num_levels, official_batchnorm_statistics=D.cfg.official_batchnorm_statistics
        )
        D.feature_networks[module_key(name)] = network.to(D.projectors[module_key(name)].ccm[0].weight.device)
    D.to(memory_format=torch.channels_last)


class NaiveDiscriminator(nn.Module):
    """(images, labels, augment) -> {backbone: SANLogits}, as `ProjectedDiscriminator`, whose weights it has.

    D: one that went through `seed_backbones_`.
    """

    def __init__(self, D: ProjectedDiscriminator) -> None:
        import timm  # here, as it takes seconds, which work without feature networks need not wait for

        super().__init__()
        self.cfg = D.cfg
        self.backbones, self.reassemblers = nn.ModuleDict(), nn.ModuleDict()
        self.heads = copy.deepcopy(D.heads).to(memory_format=torch.contiguous_format)
        self.projectors = copy.deepcopy(D.projectors).to(memory_format=torch.contiguous_format)
        for index, name in enumerate(D.names):
            ours = D.feature_networks[module_key(name)]
            torch.manual_seed(BACKBONE_SEED + index)
            backbone = timm.create_model(
                name, pretrained=False, features_only=not isinstance(ours, ViTFeatures)
            )
            if isinstance(ours, ViTFeatures):
                self.reassemblers[module_key(name)] = copy.deepcopy(ours.reassemble).to(
                    memory_format=torch.contiguous_format
                )
            elif D.cfg.official_batchnorm_statistics:
                backbone(torch.zeros(1, 3, PROBE_RESOLUTION, PROBE_RESOLUTION))  # still in training mode
            device = next(D.heads.parameters()).device
            self.backbones[module_key(name)] = backbone.requires_grad_(False).eval().to(device)

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, SANLogits]:
        """Logits (N, K) of every backbone for images (N, 3, H, W) in [-1, 1], augmented for each apart."""
        logits = {}
        for name in self.cfg.backbones:
            x = augment(images) if augment else images
            projected = self.project(name, self.features(name, x))
            heads = self.heads[module_key(name)]
            logits[name] = torch.cat(
                [head(x, labels) for head, x in zip(heads, projected, strict=True)], dim=1
            )
        return logits

    def features(self, name: str, images: Tensor) -> list[Tensor]:
        """Feature maps, finest first."""
        backbone, key = self.backbones[module_key(name)], module_key(name)
        is_vit = key in self.reassemblers
        mean, std = (images.new_tensor(backbone.default_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
        x = ((images + 1) / 2 - mean) / std
        side = VIT_RESOLUTION if is_vit else self.cfg.feature_resolution
        if side is not None:
            x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        if not is_vit:
            return backbone(x)[-4:][: self.cfg.num_levels]
        taps = list(VIT_BLOCKS[: self.cfg.num_levels])
        tokens = backbone.forward_intermediates(x, indices=taps, output_fmt="NLC", intermediates_only=True)
        maps = [t.transpose(1, 2).unflatten(2, (side // 16, side // 16)) for t in tokens]
        return [layer(x) for layer, x in zip(self.reassemblers[key], maps, strict=True)]

    def project(self, name: str, features: Sequence[Tensor]) -> list[Tensor]:
        """Random mixing of channels, then of scales: add, up-sample, convolve."""
        projector = self.projectors[module_key(name)]
        mixed = [convolution(x) for convolution, x in zip(projector.ccm, features, strict=True)]
        projected: list[Tensor] = []
        for x, convolution in zip(reversed(mixed), reversed(projector.csm), strict=True):
            x = x + projected[-1] if projected else x
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            projected.append(convolution(x))
        return projected[::-1]


class NaiveAugment:
    """DiffAugment, an operation at a time, with the random numbers of `training.augment.DiffAugment`."""

    def __init__(self, policy: Sequence[str], draws: Draws) -> None:
        self.policy, self.draws = policy, draws
        self.num_calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        counts = [OPERATIONS[name].num_draws for name in self.policy]
        u = self.draws.uniform(f"augment{self.num_calls}", sum(counts))
        self.num_calls += 1
        for name, part in zip(self.policy, u.split(counts, dim=1), strict=True):
            arguments = OPERATIONS[name].arguments(part, *images.shape[2:])
            images = _AUGMENTATIONS[name](images, *arguments)
        return images


def _color(images: Tensor, u_brightness: Tensor, u_saturation: Tensor, u_contrast: Tensor) -> Tensor:
    return contrast(saturation(brightness(images, u_brightness), u_saturation), u_contrast)


def _cutout(images: Tensor, center_rows: Tensor, center_cols: Tensor) -> Tensor:
    return naive_ops.cut_out(images, center_rows, center_cols, CUTOUT_RATIO)


_AUGMENTATIONS = {"color": _color, "translation": naive_ops.translate, "cutout": _cutout}
