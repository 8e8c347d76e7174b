# SPDX-License-Identifier: MIT
"""Trained heads of the projected discriminator: one projected feature map to patch logits (StyleGAN-XL, SAN).

All share a trunk of spectrally normalised, strided convolutions and differ in the last layer: SAN
(arXiv:2301.12811) or plain, conditional (projection discriminator, arXiv:1802.05637) or not.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import san
from torch_utils.layers import FullyConnectedLayer
from torch_utils.ops.halving_conv import halving_conv2d
from training.config import ConfigError, DiscriminatorConfig

HeadKind = Literal["san", "gan"]
# Channels of a feature map inside a head, by its nominal side in pixels.
HEAD_CHANNELS = {4: 512, 8: 512, 16: 256, 32: 128, 64: 64, 128: 64, 256: 32, 512: 16, 1024: 8}
PATCH_SIZE = 4  # side of the last convolution's kernel
LEAK = 0.2  # slope of the leaky ReLU
SPECTRAL_EPS = 1e-12


class SpectralNormConv2d(nn.Module):
    """Convolution whose weight is divided by its largest singular value (arXiv:1802.05957).

    (N, C_in, H, W) -> (N, C_out, H_out, W_out). Each forward pass in training mode does one power iteration;
    evaluation mode uses the stored vectors. Names and numbers are those of `torch.nn.utils.spectral_norm`,
    which torch intends to deprecate and whose modules cannot be copied: weight_orig, weight_u, weight_v.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        plain = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)
        self.weight_orig = plain.weight
        self.bias = plain.bias
        self.stride, self.padding = stride, padding
        rows, columns = self.weight_orig.flatten(1).shape
        self.register_buffer("weight_u", _unit(torch.randn(rows)))
        self.register_buffer("weight_v", _unit(torch.randn(columns)))

    def forward(self, x: Tensor) -> Tensor:
        scale, taps = self.inverse_sigma(), self.weight_orig.shape[2:]
        if not self.training:  # rounds alike for any number of images, which the faster forms do not
            return F.conv2d(x, self.weight_orig * scale, self.bias, self.stride, self.padding)
        if self.padding == 0 and x.shape[2:] == taps:
            # A single position is a matrix product, for which a convolution takes several times as long on a CPU.
            out = F.linear(flatten_taps(x), flatten_taps(self.weight_orig)) * scale
            return (out if self.bias is None else out + self.bias)[:, :, None, None]
        if self.stride == 2 and taps == (4, 4):
            return halving_conv2d(x, self.weight_orig * scale, self.bias, self.padding)
        return F.conv2d(x, self.weight_orig * scale, self.bias, self.stride, self.padding)

    def inverse_sigma(self) -> Tensor:
        """1 / the largest singular value, a scalar; in training mode after a power iteration.

        u and v are constant to autograd.
        """
        matrix = flatten_taps(self.weight_orig)
        columns, *taps = self.weight_orig.shape[1:]
        with torch.no_grad():
            if self.training:
                u, v = _power_iteration(matrix, self.weight_u)
                self.weight_u.copy_(u)
                self.weight_v.view(columns, *taps).copy_(v.view(*taps, columns).permute(2, 0, 1))
            else:  # copies: a later training pass must not change what this pass's backward needs
                u, v = self.weight_u.clone(), flatten_taps(self.weight_v.view(1, columns, *taps)).clone()[0]
        return torch.dot(u, matrix @ v).reciprocal()


class ProjectionHead(nn.Module):
    """Patch logits of a projected feature map: (N, C, H, W), int64 labels (N,) or None -> SANLogits (N, K).

    Strided blocks halve the map until its nominal side is `head_resolution`; a 4x4 convolution without
    padding then yields one logit per position. `start_resolution` is the nominal side of the input: it plans
    the depth and is not always the true one. Unconditional heads ignore the labels.
    """

    def __init__(
        self, cfg: DiscriminatorConfig, kind: HeadKind, in_channels: int, start_resolution: int
    ) -> None:
        """Raises ConfigError if the class table is too small for the classes."""
        super().__init__()
        if cfg.c_dim > cfg.num_class_embeddings:
            raise ConfigError(
                f"num_class_embeddings={cfg.num_class_embeddings} is less than the number of classes "
                f"c_dim={cfg.c_dim}; give the class table at least one row per class"
            )
        self.is_conditional = cfg.c_dim > 0
        widths = plan_widths(cfg, in_channels, start_resolution)
        self.trunk = nn.Sequential(*(DownBlock(i, o) for i, o in itertools.pairwise(widths)))
        if self.is_conditional:
            self.last = (
                SANClassProjection(cfg, widths[-1]) if kind == "san" else ClassProjection(cfg, widths[-1])
            )
        elif kind == "san":
            self.last = san.SANConv2d(widths[-1], 1, PATCH_SIZE)
        else:
            self.last = SpectralNormConv2d(widths[-1], 1, PATCH_SIZE, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> san.SANLogits:
        x = self.trunk(x)
        if self.is_conditional:
            if labels is None:
                raise ValueError("labels are None, but the discriminator is conditional: pass class ids (N,)")
            return self.last(x, labels).flatten(1)
        logits = self.last(x)
        return (logits if isinstance(logits, san.SANLogits) else san.SANLogits.plain(logits)).flatten(1)

    def freeze_blocks_(self, count: int) -> None:
        """Freeze the first `count` blocks of the trunk for good, or all of them if there are fewer."""
        for block in self.trunk[:count]:
            block.freeze_()

    def final_size(self, size: int) -> int:
        """Side of the map of logits for a square input of side `size`; less than 1 if that is too small."""
        for _ in self.trunk:
            size //= 2
        return size - PATCH_SIZE + 1


class DownBlock(nn.Sequential):
    """Convolution with stride 2, BatchNorm, leaky ReLU: (N, C_in, H, W) -> (N, C_out, H // 2, W // 2).

    A frozen block (FreezeD, arXiv:2002.10964) computes what it computed, and none of its tensors moves: its
    spectral vectors stay, and BatchNorm still normalises by each batch but no longer averages the statistics.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            SpectralNormConv2d(in_channels, out_channels, 4, stride=2, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(LEAK, inplace=True),
        )
        self.is_frozen = False

    def freeze_(self) -> None:
        """Let neither gradients nor training mode change the block any more."""
        self.is_frozen = True
        self.requires_grad_(False)
        # Fixed statistics in place of the batch's would tell real from fake batches apart by their means alone.
        self[1].track_running_stats = False
        self.train(self.training)

    def train(self, mode: bool = True) -> DownBlock:
        super().train(mode)
        if self.is_frozen:
            self[0].eval()  # the stored spectral vectors, without a power iteration
        return self


class SANClassProjection(nn.Module):
    """Conditional SAN head: features and class vectors meet in an inner product over `class_dim` channels.

    The directions of the class vectors are trained by `dir`; their scales, and everything before, by `fun`.
    """

    def __init__(self, cfg: DiscriminatorConfig, in_channels: int) -> None:
        super().__init__()
        self.conv = SpectralNormConv2d(in_channels, cfg.class_dim, PATCH_SIZE, bias=False)
        self.embed = san.SANEmbedding(cfg.num_class_embeddings, cfg.class_dim)

    def forward(self, x: Tensor, labels: Tensor) -> san.SANLogits:
        h = self.conv(x)  # (N, class_dim, H', W')
        return san.project(h, self.embed(labels)) / math.sqrt(h.shape[1])


class ClassProjection(nn.Module):
    """Conditional plain head: class vectors are projected rows of a trained table of image features."""

    def __init__(self, cfg: DiscriminatorConfig, in_channels: int) -> None:
        super().__init__()
        self.conv = SpectralNormConv2d(in_channels, cfg.class_dim, PATCH_SIZE, bias=False)
        self.embed = nn.Embedding(cfg.num_class_embeddings, cfg.embedding_dim)
        self.embed_proj = FullyConnectedLayer(cfg.embedding_dim, cfg.class_dim, activation="lrelu")

    def forward(self, x: Tensor, labels: Tensor) -> san.SANLogits:
        h = self.conv(x)  # (N, class_dim, H', W')
        vectors = self.embed_proj(self.embed(labels))
        logits = (h * vectors[:, :, None, None]).sum(dim=1) / math.sqrt(h.shape[1])
        return san.SANLogits.plain(logits)


def plan_widths(cfg: DiscriminatorConfig, in_channels: int, start_resolution: int) -> list[int]:
    """Channels before the first block and after each block of a head; one block per halving."""
    size = min(HEAD_CHANNELS, key=lambda key: abs(key - start_resolution))
    widths = [in_channels]
    while size > cfg.head_resolution:
        size //= 2
        widths.append(min(HEAD_CHANNELS[size], cfg.max_head_channels))
    return widths


def flatten_taps(x: Tensor) -> Tensor:
    """(N, C, H, W) as a matrix (N, H W C): no copy in channels_last format, that of heads and of their input."""
    return x.permute(0, 2, 3, 1).flatten(1)


def _power_iteration(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The next left and right singular vector."""
    v = _unit(matrix.T @ u)
    return _unit(matrix @ v), v


def _unit(vector: Tensor) -> Tensor:
    return F.normalize(vector, dim=0, eps=SPECTRAL_EPS)
