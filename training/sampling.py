# SPDX-License-Identifier: MIT
"""From seeds and class ids to images: what the sampling tools share.

A seed means the same latent and class as in the official tools: each is drawn from its own fresh legacy NumPy
generator. The official code rounds to 8 bits in several ways; the two for single images are here, the one for
training's grids is in image_grid.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from torch_utils.errors import UserError
from training.generator.generator import Generator


def latents_for_seed(seed: int, batch: int, z_dim: int) -> Tensor:
    """z of a seed, float64 (batch, z_dim), standard normal. A larger batch starts with the same latents."""
    return torch.from_numpy(np.random.RandomState(seed).randn(batch, z_dim))


def labels_for_seed(seed: int, batch: int, c_dim: int) -> Tensor:
    """Random class ids of a seed, int64 (batch,), for tools that were given no class."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, c_dim, size=batch)).long()


def seeded_sampler(G: Generator, seed: int, device: torch.device | str) -> Callable[[int], Tensor]:
    """Function n -> uint8 (n, 3, H, W): new images per call, classes uniform, reproducible from `seed`.

    Feeds the metrics: no truncation, and their rounding. Calls of any sizes continue one stream of latents
    and one of classes, so image number i does not depend on how many are asked for at a time.
    """
    latents, classes = np.random.RandomState(seed), np.random.RandomState(seed)

    @torch.inference_mode()
    def sample(n: int) -> Tensor:
        z = torch.from_numpy(latents.randn(n, G.z_dim)).float().to(device)
        labels = torch.from_numpy(classes.randint(0, G.c_dim, size=n)).long().to(device) if G.c_dim else None
        return to_uint8_metrics(G(z, labels))

    return sample


def to_uint8(images: Tensor) -> Tensor:
    """uint8 of float images in [-1, 1] as gen_images makes it: scaled to [0, 255], clamped, truncated."""
    return ((images + 1) * (255 / 2)).clamp(0, 255).to(torch.uint8)


def to_uint8_metrics(images: Tensor) -> Tensor:
    """uint8 of float images in [-1, 1] as the metrics make it: x * 127.5 + 128, clamped, truncated."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def create_image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """One image (C, rows * H, columns * W) of a batch (N, C, H, W), row by row; the rest is black (0).

    columns: None = as square as possible, ceil(sqrt(N)).
    """
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    padded = images.new_zeros(rows * columns, c, h, w)
    padded[:n] = images
    return padded.view(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def parse_seeds(text: str) -> list[int]:
    """Integers of a list such as '1,2,5-10'; ranges include both ends. UserError when it cannot be read."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UserError(f"{text!r} is not a list of numbers and ranges; write for example 0,3,5-10")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"range {part.strip()!r} runs backwards; write {last}-{first}")
        if last >= 2**32:
            raise UserError(f"{last} is too large a seed; the largest is {2**32 - 1}")
        numbers += range(first, last + 1)
    return numbers


def parse_classes(text: str, c_dim: int) -> list[int]:
    """Class ids of a list such as '3' or '0,3,5-7'. UserError for ids that the network does not have."""
    if c_dim == 0:
        raise UserError(f"--class {text} was given, but the network is unconditional; leave it out")
    classes = parse_seeds(text)
    if too_large := [label for label in classes if label >= c_dim]:
        raise UserError(f"class {too_large[0]} does not exist: the network has classes 0 to {c_dim - 1}")
    return classes


def images_for_seed(
    G: Generator,
    seed: int,
    batch: int,
    classes: Sequence[int] | None = None,
    truncation_psi: float = 1.0,
    truncation_cutoff: int | None = None,
) -> Tensor:
    """uint8 (len(classes), batch, C, H, W) on the CPU: the latents of `seed`, the same for every class.

    classes: None = one random class per image drawn from the seed, or no class for an unconditional network;
    the first dimension is 1 then.
    """
    device = next(G.parameters()).device
    z = latents_for_seed(seed, batch, G.z_dim).float().to(device)
    if classes is not None:
        rows = [torch.full((batch,), label) for label in classes]
    else:
        rows = [labels_for_seed(seed, batch, G.c_dim) if G.c_dim else None]
    results = []
    with torch.inference_mode():
        for labels in rows:
            c = None if labels is None else labels.to(device)
            results.append(to_uint8(G(z, c, truncation_psi, truncation_cutoff)).cpu())
    return torch.stack(results)


def pick_device(name: str) -> torch.device:
    """Device that --device names: auto (cuda, else mps, else cpu), cpu, cuda or mps. UserError if absent."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in available.items() if is_there)
    if name not in available:
        raise UserError(f"--device {name} is unknown; choose auto, {', '.join(sorted(available))}")
    if not available[name]:
        raise UserError(f"--device {name} is not available on this machine; use --device auto or cpu")
    return torch.device(name)
