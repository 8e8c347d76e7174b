# SPDX-License-Identifier: MIT
"""What detectors share around their network: checks, the resizes of the papers, full float32 precision.

Resizing changes scores more than networks' rounding does (arXiv:2104.11222), so every way of it has its own name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def check_images(images: Tensor) -> None:
    """ValueError unless `images` are uint8 (N, 3 or 1, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected uint8 (N, 3 or 1, H, W), got {images.dtype} {tuple(images.shape)}")


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W), in 0..255 of any type, to float32 (N, C, side, side) as TensorFlow 1 did it.

    Bilinear; output pixel i lies on input position i * H / side, at the corner and not the middle of a pixel,
    and nothing is averaged when images shrink (`tf.image.resize_bilinear`, align_corners=False).
    """
    top, bottom, y = _neighbours(images.shape[2], side, images.device)
    left, right, x = _neighbours(images.shape[3], side, images.device)
    # Pixels are picked before they become floats: a large image costs no more than a small one.
    upper, lower = images.index_select(2, top), images.index_select(2, bottom)
    upper, lower = (
        _mix(rows.index_select(3, left), rows.index_select(3, right), x) for rows in (upper, lower)
    )
    return _mix(upper, lower, y[:, None])


def resize_bicubic(images: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W), in 0..255, to float32 (N, C, side, side): PIL's antialiased bicubic filter in floats.

    Neither rounded nor clamped, as JAX does it for CMMD. In float64, as PIL's weights are.
    """
    return _cubic(images.double(), side, side).float()


def resize_clean(images: Tensor, side: int) -> Tensor:
    """As `resize_bicubic`, clamped to 0..255: clean-fid's (arXiv:2104.11222)."""
    return resize_bicubic(images, side).clamp_(0, 255)


def resize_pil(images: Tensor, side: int) -> Tensor:
    """As PIL does it with 8-bit images: rows, then columns, each rounded to whole numbers of 0..255. float32."""
    rows = _to_levels(_cubic(images.double(), images.shape[2], side))
    return _to_levels(_cubic(rows, side, side)).float()


def _cubic(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)


def _to_levels(x: Tensor) -> Tensor:
    return (x + 0.5).floor_().clamp_(0, 255)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Float images (N, 3, H, W) in 0..255, scaled to [0, 1], minus `mean`, over `std`."""
    scale = images.new_tensor(std)[:, None, None] * 255
    return (images - images.new_tensor(mean)[:, None, None] * 255) / scale


def as_rgb(images: Tensor) -> Tensor:
    """Images (N, 1 or 3, H, W) with three channels; grey is repeated."""
    return images.expand(-1, 3, -1, -1)


def memory_format(device: torch.device) -> torch.memory_format:
    """How detectors lay out images and weights: channels last on the CPU, where features were measured to agree."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """CUDA convolutions and matrix products in float32 proper; torch's default for convolutions is TF32."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def _neighbours(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(index below, index above, fraction of the way between them) of each output position, (side,)."""
    position = torch.arange(side, dtype=torch.float32, device=device) * (size / side)
    below = position.floor()
    index = below.long()
    return index, (index + 1).clamp(max=size - 1), position - below


def _mix(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
    a = a.float()
    return a + (b.float() - a) * fraction
