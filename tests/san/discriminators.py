# SPDX-License-Identifier: MIT
"""Small discriminators of the shape that the field's families have, for tests/san.

Written from the architectures' descriptions. A class with `Edited` in front has the one line of its forward
changed that docs/plugin.md changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

import san

NUM_CLASSES = 4


# StyleGAN2-ADA and StyleGAN3: learning-rate equalised layers, minibatch deviation, a mapped label vector.


class FullyConnectedLayer(nn.Module):
    def __init__(self, in_features, out_features, activation="linear", lr_multiplier=1.0, bias_init=0.0):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return x if self.activation == "linear" else F.leaky_relu(x, 0.2) * math.sqrt(2)


class Conv2dLayer(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, bias=True, activation="linear", down=1):
        super().__init__()
        self.activation, self.down, self.up, self.conv_clamp = activation, down, 1, None
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x = F.conv2d(x, (self.weight * self.weight_gain).to(x.dtype), bias, padding=self.padding)
        x = x if self.down == 1 else F.avg_pool2d(x, self.down)
        return x if self.activation == "linear" else F.leaky_relu(x, 0.2) * math.sqrt(2)


class StyleGAN2Epilogue(nn.Module):
    def __init__(self, channels: int, cmap_dim: int) -> None:
        super().__init__()
        self.cmap_dim = cmap_dim
        self.conv = Conv2dLayer(channels + 1, channels, 3, activation="lrelu")
        self.fc = FullyConnectedLayer(channels * 16, channels, activation="lrelu")
        self.out = FullyConnectedLayer(channels, cmap_dim or 1, bias_init=0.3)

    def forward(self, x: Tensor, cmap: Tensor | None) -> Tensor:
        x = x.float()
        deviation = x.var(0, unbiased=False).add(1e-8).sqrt().mean().expand(len(x), 1, *x.shape[2:])
        x = self.out(self.fc(self.conv(torch.cat([x, deviation], 1)).flatten(1)))
        return self.product(x, cmap) if self.cmap_dim else x

    def product(self, x: Tensor, cmap: Tensor) -> Tensor:
        return (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)


class EditedStyleGAN2Epilogue(StyleGAN2Epilogue):
    def product(self, x: Tensor, cmap: Tensor) -> Tensor:
        return san.project(x, cmap).unsqueeze(1) / math.sqrt(self.cmap_dim)


class StyleGAN2D(nn.Module):
    """(N, 3, 16, 16) and one-hot labels (N, c_dim) to (N, 1). low_precision: of the first block."""

    epilogue = StyleGAN2Epilogue

    def __init__(self, c_dim: int = 0, low_precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.low_precision, cmap_dim = low_precision, 8 if c_dim else 0
        self.b16 = nn.Sequential(
            Conv2dLayer(3, 8, 1, activation="lrelu"), Conv2dLayer(8, 8, 3, activation="lrelu", down=2)
        )
        self.b8 = Conv2dLayer(8, 16, 3, activation="lrelu", down=2)
        self.b4 = self.epilogue(16, cmap_dim)
        if c_dim:
            self.mapping = nn.Sequential(
                FullyConnectedLayer(c_dim, 8),
                FullyConnectedLayer(8, 8, activation="lrelu", lr_multiplier=0.1),
                FullyConnectedLayer(8, cmap_dim, activation="lrelu", lr_multiplier=0.1),
            )

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        x = self.b8(self.b16(img.to(self.low_precision)).float())
        return self.b4(x, self.mapping(c) if self.b4.cmap_dim else None)


class EditedStyleGAN2D(StyleGAN2D):
    epilogue = EditedStyleGAN2Epilogue


# Projected GAN and StyleGAN-XL: frozen features at several scales, a small discriminator on each.


class FeatureNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 8), (8, 8)))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = {}
        for i, stage in enumerate(self.stages):
            features[str(i)] = x = F.relu(stage(x))
        return features


def downsample(channels: int) -> list[nn.Module]:
    convolution = spectral_norm(nn.Conv2d(channels, channels, 4, 2, 1))
    return [convolution, nn.BatchNorm2d(channels), nn.LeakyReLU(0.2, inplace=True)]


class SingleDisc(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        layers = [m for _ in range(num_blocks) for m in downsample(8)]
        self.main = nn.Sequential(*layers, spectral_norm(nn.Conv2d(8, 1, 4, 1, 0, bias=False)))

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        return self.main(x)


class SingleDiscCond(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.cmap_dim = 8
        self.main = nn.Sequential(*[m for _ in range(num_blocks) for m in downsample(8)])
        self.cls = spectral_norm(nn.Conv2d(8, self.cmap_dim, 4, 1, 0, bias=False))
        self.embed = nn.Embedding(NUM_CLASSES, 12)
        self.embed_proj = FullyConnectedLayer(12, self.cmap_dim, activation="lrelu")

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.product(self.cls(self.main(x)), self.embed_proj(self.embed(c.argmax(1))))

    def product(self, out: Tensor, cmap: Tensor) -> Tensor:
        return (out * cmap[:, :, None, None]).sum(1, keepdim=True) / math.sqrt(self.cmap_dim)


class EditedSingleDiscCond(SingleDiscCond):
    def product(self, out: Tensor, cmap: Tensor) -> Tensor:
        return san.project(out, cmap).unsqueeze(1) / math.sqrt(self.cmap_dim)


class ProjectedD(nn.Module):
    """(N, 3, 32, 32) to (N, K): one backbone, logits of all scales side by side."""

    def __init__(self, single: type[nn.Module] = SingleDisc) -> None:
        super().__init__()
        self.feature_network = FeatureNetwork()
        self.mini_discs = nn.ModuleDict({"0": single(2), "1": single(1)})

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        features = self.feature_network(x)
        logits = [disc(features[k], c).view(x.size(0), -1) for k, disc in self.mini_discs.items()]
        return torch.cat(logits, dim=1)


class StyleGANXLD(nn.Module):
    """(N, 3, 32, 32) to a flat list of rows: those of the first backbone, then those of the second."""

    def __init__(self, single: type[nn.Module] = SingleDisc) -> None:
        super().__init__()
        self.discriminators = nn.ModuleDict({"deit": ProjectedD(single), "effnet": ProjectedD(single)})

    def forward(self, x: Tensor, c: Tensor | None = None) -> list[Tensor]:
        logits = []
        for disc in self.discriminators.values():
            logits += disc(x, c)
        return logits


# R3GAN: grouped residual blocks, a bias-free linear head, a relativistic loss.


class R3GAND(nn.Module):
    """(N, 3, 16, 16) and one-hot labels (N, c_dim) to (N,)."""

    def __init__(self, c_dim: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.expand, self.mix = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.contract = nn.Conv2d(32, 16, 1, bias=False)
        self.basis = nn.Conv2d(16, 16, 4, groups=16, bias=False)
        self.head = nn.Linear(16, 8 if c_dim else 1, bias=False)
        self.embed = nn.Linear(c_dim, 8, bias=False) if c_dim else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = F.avg_pool2d(self.stem(x), 4)
        x = x + self.contract(F.leaky_relu(self.mix(F.leaky_relu(self.expand(x), 0.2)), 0.2))
        x = self.head(self.basis(x).flatten(1))
        x = x if self.embed is None else self.product(x, self.embed(y))
        return x.view(x.shape[0])

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return (x * w).sum(dim=1, keepdim=True)


class EditedR3GAND(R3GAND):
    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return san.project(x, w)


# BigGAN (with a spectral norm of its own) and StudioGAN (with torch's): attention, and a projection head.


class PowerIteration:
    """A spectral norm that lives in the layer's class: `W_` is what forward uses, as BigGAN calls it."""

    def W_(self) -> Tensor:  # noqa: N802
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.u @ matrix, dim=1)
            u = F.normalize(v @ matrix.t(), dim=1)
            if self.training:
                self.u.copy_(u)
        return self.weight / (v @ matrix.t() @ u.t()).squeeze()


class SNLinear(nn.Linear, PowerIteration):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("u", torch.randn(1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_(), self.bias)


class SNEmbedding(nn.Embedding, PowerIteration):
    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.register_buffer("u", torch.randn(1, num_embeddings))

    def forward(self, y: Tensor) -> Tensor:
        return F.embedding(y, self.W_())


def plain_linear(layer: SNLinear) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features)
    plain.load_state_dict({"weight": layer.W_().detach(), "bias": layer.bias.detach()})
    return plain


def plain_embedding(layer: SNEmbedding) -> nn.Embedding:
    return nn.Embedding.from_pretrained(layer.W_().detach(), freeze=False)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.value = spectral_norm(nn.Conv2d(channels, channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.value(x).softmax(1) + x


def projection_trunk() -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, 16, 3, 2, 1)), nn.ReLU(), Attention(16),
        spectral_norm(nn.Conv2d(16, 16, 3, 2, 1)), nn.ReLU(inplace=True),
    )  # fmt: skip


class BigGAND(nn.Module):
    """(N, 3, 16, 16) and class ids (N,) to (N, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = projection_trunk()
        self.linear, self.embed = SNLinear(16, 1), SNEmbedding(NUM_CLASSES, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.blocks(x).sum((2, 3))
        return self.head(h, y)

    def head(self, h: Tensor, y: Tensor) -> Tensor:
        return self.linear(h) + torch.sum(self.embed(y) * h, 1, keepdim=True)


class EditedBigGAND(BigGAND):
    def head(self, h: Tensor, y: Tensor) -> Tensor:
        return self.linear(h) + san.project(h, self.embed(y)).unsqueeze(1)


class StudioGAND(nn.Module):
    """(N, 3, 16, 16) and class ids (N,) to a dictionary with logits (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = projection_trunk()
        self.linear1 = spectral_norm(nn.Linear(16, 1))
        self.embedding = spectral_norm(nn.Embedding(NUM_CLASSES, 16))

    def forward(self, x: Tensor, label: Tensor) -> dict[str, Tensor]:
        h = self.blocks(x).sum((2, 3))
        return {"h": h, "adv_output": self.head(h, label)}

    def head(self, h: Tensor, label: Tensor) -> Tensor:
        return torch.squeeze(self.linear1(h)) + torch.sum(torch.mul(self.embedding(label), h), 1)


class EditedStudioGAND(StudioGAND):
    def head(self, h: Tensor, label: Tensor) -> Tensor:
        return torch.squeeze(self.linear1(h)) + san.project(h, self.embedding(label))


# PatchGAN (pix2pix, CycleGAN, VQGAN): a padded last convolution with a bias, a logit per patch.


class PatchD(nn.Module):
    """(N, 3, 32, 32) to (N, 1, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, True),
            nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2, True),
            nn.Conv2d(16, 16, 4, 1, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2, True),
            nn.Conv2d(16, 1, 4, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


# HiFi-GAN and BigVGAN: sub-discriminators on periods, scales and spectrograms; lists of logits and features.


class SubD(nn.Module):
    """Waves (N, 1, T) to logits (N, K) and the list of feature maps, the logits' own map last."""

    def __init__(self, kind: str, period: int, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.kind, self.period = kind, period
        conv, kernel = (nn.Conv1d, 5) if kind == "scale" else (nn.Conv2d, (5, 1) if kind == "period" else 3)
        padding = 2 if kind == "scale" else (2, 0) if kind == "period" else 1
        self.convs = nn.ModuleList(norm(conv(i, o, kernel, 2, padding)) for i, o in ((1, 8), (8, 8)))
        last_kernel, last_padding = ((3, 1), (1, 0)) if kind == "period" else (3, 1)
        self.conv_post = norm(conv(8, 1, last_kernel, 1, last_padding))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.kind == "period":
            x = F.pad(x, (0, -x.shape[2] % self.period), "reflect")
            x = x.view(x.shape[0], 1, -1, self.period)
        elif self.kind == "spectrogram":
            window = torch.hann_window(4 * self.period)
            x = (
                torch.stft(x.squeeze(1), 4 * self.period, window=window, return_complex=True)
                .abs()
                .unsqueeze(1)
            )
        fmap = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            fmap.append(x)
        x = self.conv_post(x)
        fmap.append(x)
        return torch.flatten(x, 1, -1), fmap


class WaveD(nn.Module):
    """Real and generated waves to four lists: logits of both, feature lists of both."""

    def __init__(self, kinds: tuple[str, ...], norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        periods = (2, 3, 5)
        self.discriminators = nn.ModuleList(SubD(k, p, norm) for k, p in zip(kinds, periods, strict=False))

    def forward(self, y: Tensor, y_hat: Tensor) -> tuple[list[Tensor], ...]:
        real, fake = ([d(wave) for d in self.discriminators] for wave in (y, y_hat))
        return [r[0] for r in real], [f[0] for f in fake], [r[1] for r in real], [f[1] for f in fake]
