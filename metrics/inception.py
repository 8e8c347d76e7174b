# SPDX-License-Identifier: MIT
"""The Inception network of FID, IS, KID and sFID: Inception-v3 as in the TensorFlow graph of 2015-12-05.

Architecture: arXiv:1512.00567, Figures 5 to 7 and 10. It differs from torchvision's: average pools do not count
their padding, the last block pools by maximum, and there are 1,008 outputs. BatchNorms are folded into the
convolutions when weights are read (`metrics/weight_layers.py`), so that a layer is a convolution and a ReLU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

NUM_FEATURES = 2048
NUM_OUTPUTS = 1008
INPUT_SIDE = 299
SFID_CHANNELS = 7  # of mixed_6, which sFID is about (arXiv:2103.03841); 7 * 17 * 17 numbers in all
NUM_SFID = SFID_CHANNELS * 17 * 17


class InceptionOutput(NamedTuple):
    """What the metrics need of one pass; float32."""

    features: Tensor  # (N, 2048), averaged over the last maps: FID, KID, precision and recall by some
    sfid: Tensor  # (N, 2023), the first 7 channels of mixed_6: sFID
    probabilities: Tensor  # (N, 1008), softmax without the bias of the last layer: IS


class Concat(nn.Module):
    """Branches on the same input, concatenated along channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def conv(
    in_channels: int, out_channels: int, kernel: int | tuple[int, int], stride: int = 1, padding: bool = False
) -> nn.Sequential:
    """Convolution and ReLU. kernel: side, or (height, width); padding: whether the size is kept."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    margins = (kernel[0] // 2, kernel[1] // 2) if padding else (0, 0)
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=margins)
    return nn.Sequential(layer, nn.ReLU(inplace=True))


def chain(in_channels: int, *layers: tuple[int, int | tuple[int, int]]) -> nn.Sequential:
    """Convolutions that keep the size, one after the other; each is (channels, kernel)."""
    modules = []
    for out_channels, kernel in layers:
        modules.append(conv(in_channels, out_channels, kernel, padding=True))
        in_channels = out_channels
    return nn.Sequential(*modules)


def pooled(in_channels: int, out_channels: int, pool: nn.Module | None = None) -> nn.Sequential:
    """A 3x3 pool that keeps the size, by default an average that leaves padding out, and a 1x1 convolution."""
    pool = pool or nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return nn.Sequential(pool, conv(in_channels, out_channels, 1))


def block_35(in_channels: int, pool_channels: int) -> Concat:
    """mixed, mixed_1, mixed_2: maps of side 35; (N, in_channels) -> (N, 224 + pool_channels)."""
    return Concat(
        chain(in_channels, (64, 1)),
        chain(in_channels, (48, 1), (64, 5)),
        chain(in_channels, (64, 1), (96, 3), (96, 3)),
        pooled(in_channels, pool_channels),
    )


def reduction_17() -> Concat:
    """mixed_3: side 35 to 17; 288 -> 768 channels."""
    return Concat(
        conv(288, 384, 3, stride=2),
        nn.Sequential(*chain(288, (64, 1), (96, 3)), conv(96, 96, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


def block_17(width: int) -> Concat:
    """mixed_4 to mixed_7: side 17, 7x7 convolutions as products of rows and columns; 768 -> 768 channels."""
    row, column = (1, 7), (7, 1)
    return Concat(
        chain(768, (192, 1)),
        chain(768, (width, 1), (width, row), (192, column)),
        chain(768, (width, 1), (width, column), (width, row), (width, column), (192, row)),
        pooled(768, 192),
    )


def reduction_8() -> Concat:
    """mixed_8: side 17 to 8; 768 -> 1,280 channels."""
    return Concat(
        nn.Sequential(*chain(768, (192, 1)), conv(192, 320, 3, stride=2)),
        nn.Sequential(*chain(768, (192, 1), (192, (1, 7)), (192, (7, 1))), conv(192, 192, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    )


def block_8(in_channels: int, pool: nn.Module | None = None) -> Concat:
    """mixed_9, mixed_10: side 8; in_channels -> 2,048 channels."""

    def fork() -> Concat:
        return Concat(chain(384, (384, (1, 3))), chain(384, (384, (3, 1))))

    return Concat(
        chain(in_channels, (320, 1)),
        nn.Sequential(*chain(in_channels, (384, 1)), fork()),
        nn.Sequential(*chain(in_channels, (448, 1), (384, 3)), fork()),
        pooled(in_channels, 192, pool),
    )


class InceptionTrunk(nn.Module):
    """Everything but the last layer: (N, 3, 299, 299) in [-1, 1) to (features (N, 2048), mixed_6 (N, 768, 17, 17))."""

    def __init__(self) -> None:
        super().__init__()
        self.to_mixed_6 = nn.Sequential(
            conv(3, 32, 3, stride=2),
            conv(32, 32, 3),
            conv(32, 64, 3, padding=True),
            nn.MaxPool2d(3, stride=2),
            conv(64, 80, 1),
            conv(80, 192, 3),
            nn.MaxPool2d(3, stride=2),
            block_35(192, 32),
            block_35(256, 64),
            block_35(288, 64),
            reduction_17(),
            block_17(128),
            block_17(160),
            block_17(160),
        )
        self.to_mixed_10 = nn.Sequential(
            block_17(192),
            reduction_8(),
            block_8(1280),
            block_8(2048, nn.MaxPool2d(3, stride=1, padding=1)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed_6 = self.to_mixed_6(x)
        return self.to_mixed_10(mixed_6).mean(dim=(2, 3)), mixed_6


class InceptionV3(nn.Module):
    """The whole network. x: (N, 3, 299, 299), (image - 128) / 128."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = InceptionTrunk()
        self.output = nn.Linear(NUM_FEATURES, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> InceptionOutput:
        features, mixed_6 = self.trunk(x)
        logits = nn.functional.linear(features, self.output.weight)
        sfid = mixed_6[:, :SFID_CHANNELS].flatten(1)  # row by row, whatever the memory format
        return InceptionOutput(features, sfid, logits.softmax(dim=1))


def torch_layer_names() -> list[str]:
    """Names of the convolutions in torch-fidelity's and pytorch-fid's weights files, in the order of ours."""
    block_35_names = "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool"
    block_17_names = "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool"
    block_8_names = "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool"
    blocks = {
        **dict.fromkeys(("5b", "5c", "5d"), block_35_names),
        "6a": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
        **dict.fromkeys(("6b", "6c", "6d", "6e"), block_17_names),
        "7a": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
        **dict.fromkeys(("7b", "7c"), block_8_names),
    }
    stem = [f"Conv2d_{name}.conv" for name in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    return stem + [
        f"Mixed_{block}.branch{branch}.conv" for block, names in blocks.items() for branch in names.split()
    ]
