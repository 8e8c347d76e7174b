# SPDX-License-Identifier: MIT
"""From seeds and class ids to images: what the sampling tools share.

A seed means the same latent and class as in the official tools: each is drawn from its own fresh legacy NumPy
generator. The official code rounds to 8 bits in three ways: `to_uint8`, `to_uint8_metrics`, and that of
training's grids in image_grid.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_utils.errors import UserError
from training.generator.dcgan import DCGANGenerator
from training.generator.kinds import AnyGenerator

LARGEST_SEED = 2**32 - 1  # of NumPy's legacy generator
PIXELS_PER_PASS = 2**22  # of a generator for metrics: 64 images of 256 x 256, 4 of 1024 x 1024 as officially
STREAM_BLOCK = 1024  # samples drawn at a time at least; does not change the sequence
MAX_SEEDS = 1_000_000  # in one list; more is a slip of the keyboard that would fill the memory


@dataclass(frozen=True, eq=False)  # tensors do not compare
class Truncation:
    """How far style vectors are pulled to a mean: `mean + (w - mean) * psi`.

    With centroids it is the multi-modal truncation of Self-Distilled StyleGAN (arXiv:2202.12211).
    """

    psi: float = 1.0  # 1 = not at all, 0 = all the way
    cutoff: int | None = None  # only the first so many style vectors of an image; None = all
    # (K, w_dim): the one nearest to w is the mean; None = w_avg, of the class.
    centroids: Tensor | None = None


NO_TRUNCATION = Truncation()


def latents_for_seed(seed: int, batch: int, z_dim: int) -> Tensor:
    """z of a seed, float64 (batch, z_dim), standard normal. A larger batch starts with the same latents."""
    return torch.from_numpy(np.random.RandomState(seed).randn(batch, z_dim))


def labels_for_seed(seed: int, batch: int, c_dim: int) -> Tensor:
    """Random class ids of a seed, int64 (batch,), for tools that were given no class."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, c_dim, size=batch)).long()


class SampleStream:
    """Latents and class ids by number: the rows of two endless sequences, one for each, that a seed stands for.

    Sample i is the same whatever others are asked for. What has been drawn is kept, 4 * z_dim bytes for each sample.
    """

    def __init__(self, seed: int, z_dim: int, c_dim: int, labels: np.ndarray | None = None) -> None:
        """labels: class ids that those of samples are drawn from, such as a data set's; None = uniform over classes."""
        self._latents, self._classes = np.random.RandomState(seed), np.random.RandomState(seed)
        self._z_dim, self._c_dim, self._from = z_dim, c_dim, labels
        self._z = np.empty((0, z_dim), dtype=np.float32)
        self._labels = np.empty(0, dtype=np.int64)

    def latents(self, items: Sequence[int] | np.ndarray) -> Tensor:
        """z of samples by number, float32 (N, z_dim), standard normal."""
        items = np.asarray(items, dtype=np.int64)
        self._extend(items)
        return torch.from_numpy(self._z[items])

    def labels(self, items: Sequence[int] | np.ndarray) -> Tensor | None:
        """Class ids of samples by number, int64 (N,); None without classes."""
        if not self._c_dim:
            return None
        items = np.asarray(items, dtype=np.int64)
        self._extend(items)
        return torch.from_numpy(self._labels[items])

    def _extend(self, items: np.ndarray) -> None:
        missing = int(items.max(initial=-1)) + 1 - len(self._z)
        if missing <= 0:
            return
        count = max(missing, len(self._z), STREAM_BLOCK)  # doubling: copies cost no more than draws
        z = self._latents.randn(count, self._z_dim).astype(np.float32)
        self._z = np.concatenate([self._z, z])
        if self._c_dim:
            bound = self._c_dim if self._from is None else len(self._from)
            drawn = self._classes.randint(0, bound, size=count)
            drawn = drawn if self._from is None else self._from[drawn]
            self._labels = np.concatenate([self._labels, drawn.astype(np.int64)])


def seeded_sampler(
    G: AnyGenerator,
    seed: int,
    device: torch.device | str,
    labels: np.ndarray | None = None,
    truncation: Truncation = NO_TRUNCATION,
) -> Callable[[Sequence[int] | np.ndarray], Tensor]:
    """Function from numbers of images to uint8 (n, 3, H, W), with the metrics' rounding: image i of `seed`.

    It depends on i alone, not on what else is asked for, when or by which process. labels: see SampleStream.
    """
    stream = SampleStream(seed, G.z_dim, G.c_dim, labels)

    @torch.inference_mode()
    def sample(items: Sequence[int] | np.ndarray) -> Tensor:
        return to_uint8_metrics(images_of(G, stream, items, device, truncation))

    return sample


def images_of(
    G: AnyGenerator,
    stream: SampleStream,
    items: Sequence[int] | np.ndarray,
    device: torch.device | str,
    truncation: Truncation = NO_TRUNCATION,
) -> Tensor:
    """Images by number, float32 (n, 3, H, W) on `device`, nominally in [-1, 1]. PIXELS_PER_PASS bounds the memory."""
    if truncation is not NO_TRUNCATION:
        require_styles(G, "truncation")
    step = max(PIXELS_PER_PASS // G.img_resolution**2, 1)
    parts = [items[start : start + step] for start in range(0, len(items), step)]
    images = [_images_of_part(G, stream, part, device, truncation) for part in parts]
    return images[0] if len(images) == 1 else torch.cat(images)


def _images_of_part(
    G: AnyGenerator,
    stream: SampleStream,
    items: Sequence[int] | np.ndarray,
    device: torch.device | str,
    truncation: Truncation,
) -> Tensor:
    z, labels = stream.latents(items).to(device), stream.labels(items)
    labels = None if labels is None else labels.to(device)
    if truncation is NO_TRUNCATION:
        return G(z, labels)
    return G.synthesis(style_vectors(G, z, labels, truncation))


@torch.inference_mode()
def style_vectors(
    G: AnyGenerator, z: Tensor, labels: Tensor | None, truncation: Truncation = NO_TRUNCATION
) -> Tensor:
    """ws, float32 (N, num_ws, w_dim) on the device of G, truncated.

    z: (N, z_dim); labels: class ids (N,), None for an unconditional network. Raises UserError for classes
    that do not fit.
    """
    if truncation.centroids is not None:
        require_styles(G, "--centroids")
    device = next(G.parameters()).device
    z, labels = z.float().to(device), None if labels is None else labels.to(device)
    if truncation.centroids is None:
        return G.mapping(z, labels, truncation.psi, truncation.cutoff)
    ws = G.mapping(z, labels)
    centroids = truncation.centroids.to(ws)
    # Exact distances: the faster form by a matrix product loses the digits that decide between neighbours.
    distances = torch.cdist(ws[:, 0], centroids, compute_mode="donot_use_mm_for_euclid_dist")
    mean = centroids[distances.argmin(dim=1)].unsqueeze(1)  # (N, 1, w_dim)
    num_truncated = G.num_ws if truncation.cutoff is None else truncation.cutoff
    truncated = mean + (ws[:, :num_truncated] - mean) * truncation.psi
    return torch.cat([truncated, ws[:, num_truncated:]], dim=1)


def require_styles(G: AnyGenerator, what: str) -> None:
    """Raise UserError if G has no style vectors, for `what` works on them."""
    if isinstance(G, DCGANGenerator):
        raise UserError(f"{what} works on style vectors, and a DCGAN has none; leave it out")


def images_for_seed(
    G: AnyGenerator,
    seed: int,
    batch: int,
    classes: Sequence[int] | None = None,
    truncation: Truncation = NO_TRUNCATION,
) -> Tensor:
    """uint8 (len(classes), batch, C, H, W) on the CPU: the latents of `seed`, the same for every class.

    classes: None = one random class per image drawn from the seed, or no class for an unconditional network;
    the first dimension is 1 then.
    """
    z = latents_for_seed(seed, batch, G.z_dim)
    if classes is not None:
        rows = [torch.full((batch,), label) for label in classes]
    else:
        rows = [labels_for_seed(seed, batch, G.c_dim) if G.c_dim else None]
    return torch.stack([to_uint8(draw_images(G, style_vectors(G, z, c, truncation))) for c in rows])


@torch.inference_mode()
def draw_images(G: AnyGenerator, ws: Tensor) -> Tensor:
    """Images of style vectors (N, num_ws, w_dim), float32 (N, C, H, W) on the CPU, nominally in [-1, 1]."""
    return G.synthesis(ws.to(next(G.parameters()).device)).cpu()


def to_uint8(images: Tensor) -> Tensor:
    """uint8 of float images in [-1, 1] as gen_images makes it: scaled to [0, 255], clamped, truncated."""
    return ((images + 1) * (255 / 2)).clamp(0, 255).to(torch.uint8)


def to_uint8_metrics(images: Tensor) -> Tensor:
    """uint8 of float images in [-1, 1] as the metrics and videos make it: x * 127.5 + 128, clamped, truncated."""
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


def motion_matrix(translate: tuple[float, float], degrees: float) -> Tensor:
    """Matrix (3, 3), float64, of the official --translate (x, y; in image widths) and --rotate."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = translate
    return torch.tensor([[cos, sin, x], [-sin, cos, y], [0, 0, 1]], dtype=torch.float64)


def move_images_(G: AnyGenerator, motion: Tensor) -> None:
    """Make G draw every image moved by `motion` (3, 3), see `motion_matrix`.

    The Fourier features are moved, not pixels: what comes in from outside the image is drawn too. UserError for a
    network without them, unless nothing moves.
    """
    if isinstance(G, DCGANGenerator):
        if not torch.equal(motion, torch.eye(3).to(motion)):
            raise UserError(
                "--translate and --rotate move StyleGAN3's Fourier features, and a DCGAN has none"
            )
        return
    inverse = motion.inverse()  # features are looked up where a point came from
    G.synthesis.input.transform.copy_(inverse.float())


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
        if last > LARGEST_SEED:
            raise UserError(f"{last} is too large a seed; the largest is {LARGEST_SEED}")
        if len(numbers) + last - first >= MAX_SEEDS:
            raise UserError(f"{text!r} names more than {MAX_SEEDS} numbers; give fewer")
        numbers += range(first, last + 1)
    return numbers


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
