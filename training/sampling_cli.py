# SPDX-License-Identifier: MIT
"""What the command lines of the sampling tools share: their common flags, class names, truncation, PNG files."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click
from PIL import Image
from torch import Tensor

from torch_utils.checkpoint import atomic_write
from torch_utils.download import fetch, is_url
from torch_utils.errors import UserError
from training.centroids import DEFAULT_SAMPLES, compute_centroids, load_centroids, save_centroids
from training.generator.generator import Generator
from training.network_io import load_network, read_info, resolve_path
from training.sampling import Truncation, parse_seeds, pick_device, require_styles

POSITIVE = click.IntRange(min=1)
NETWORK = click.option(
    "--network",
    required=True,
    metavar="FILE|URL|NAME",
    help="Network: a .safetensors or official .pkl file, its https address, or digits",
)
CLASSES_HELP = "Classes by index, range or name, such as 3, 0,3,5-7 or cat,dog"
COMMON = [
    click.option("--trunc", "truncation_psi", type=float, default=1.0, help="Truncation psi; 1 = none"),
    click.option("--trunc-cutoff", type=click.IntRange(min=0), help="Truncate only the first N layers"),
    click.option("--centroids-path", metavar="FILE|URL",
                 help="Multi-modal truncation: means of w to choose from, .npy (K, w_dim)"),
    click.option("--centroids", "num_centroids", type=click.IntRange(1, DEFAULT_SAMPLES), metavar="K",
                 help=f"The same, and compute the K means first, from {DEFAULT_SAMPLES:,} latents of the classes "
                 "given; saved next to the output"),
    click.option("--offline", is_flag=True, help="Download nothing; addresses must have been used before"),
    click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps"),
]  # fmt: skip


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags that every sampling tool has below its own to a click command."""
    for option in reversed(COMMON):
        command = option(command)
    return command


def open_network(network: str, device: str, offline: bool) -> tuple[Generator, Path]:
    """G_ema on the device of the flags, and its file. Raises UserError for what cannot be opened."""
    target = pick_device(device)
    file = resolve_path(network, offline)
    return load_network(file, target), file


def parse_classes(text: str, c_dim: int, network: Path) -> list[int]:
    """Class ids of a list such as '3', '0,3,5-7' or 'cat,dog'. UserError for classes that do not exist.

    network: the file whose class names count; it is read only when a part is neither number nor range. A number
    means the index, also where a class has that name. Names may hold commas; capitals matter only between names.
    """
    if c_dim == 0:
        raise UserError(f"--class {text} was given, but the network is unconditional; leave it out")
    parts = [part.strip() for part in text.split(",")]
    is_index = [re.fullmatch(r"\d+(\s*-\s*\d+)?", part) is not None for part in parts]
    names = [] if all(is_index) else _read_class_names(network, parts[is_index.index(False)], c_dim)
    classes: list[int] = []
    start = 0
    while start < len(parts):
        if is_index[start]:
            classes += parse_seeds(parts[start])
            end = start + 1
        else:
            label, end = _match_name(parts, start, names)
            classes.append(label)
        start = end
    if too_large := [label for label in classes if label >= c_dim]:
        raise UserError(f"class {too_large[0]} does not exist: the network has classes 0 to {c_dim - 1}")
    return classes


def _read_class_names(network: Path, wanted: str, c_dim: int) -> list[str]:
    names = read_info(network).get("class_names") or []
    if not names:
        raise UserError(
            f"class {wanted!r} is no index, and {network} has no class names; give an index, 0 to {c_dim - 1}"
        )
    return names


def _match_name(parts: Sequence[str], start: int, names: Sequence[str]) -> tuple[int, int]:
    """Class id of the longest name that begins at `parts[start]`, and where the parts after it start."""
    lower = [name.lower() for name in names]
    for end in range(len(parts), start, -1):
        joined = re.sub(r"\s+", " ", ", ".join(parts[start:end]))
        for spelling in (joined, joined.replace(", ", ",")):
            if spelling in names:
                return names.index(spelling), end
            if lower.count(spelling.lower()) == 1:
                return lower.index(spelling.lower()), end
    wanted = parts[start]
    close = difflib.get_close_matches(wanted.lower(), lower, n=5, cutoff=0.5)
    close += [name for name in lower if wanted and wanted.lower() in name and name not in close][:5]
    if close:
        advice = "did you mean " + ", ".join(repr(names[lower.index(name)]) for name in close) + "?"
    else:
        shown = ", ".join(repr(name) for name in names[:10])
        advice = f"the network knows {shown}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    raise UserError(f"class {wanted!r} is neither an index nor a class name; {advice}")


def check_truncation(psi: float, num_centroids: int | None, centroids_path: str | None) -> None:
    """Raise UserError for truncation flags that cannot be meant; before anything is read or computed."""
    if not math.isfinite(psi):
        raise UserError(f"--trunc {psi} is not a number to scale by; give one such as 0.7, or 1 for none")
    if num_centroids is not None and centroids_path is not None:
        raise UserError(
            f"--centroids {num_centroids} computes centroids and --centroids-path {centroids_path} reads them; "
            "give one of the two"
        )
    if psi == 1 and (num_centroids is not None or centroids_path is not None):
        click.echo("Note: --trunc 1 truncates nothing, so the centroids change no image; try --trunc 0.7")


def read_truncation(
    G: Generator, psi: float, cutoff: int | None, centroids_path: str | None, offline: bool
) -> Truncation:
    """Truncation of the flags, after `check_truncation`. UserError for a file without centroids for G."""
    if psi != 1:
        require_styles(G, f"--trunc {psi:g}")
    if centroids_path is None:
        return Truncation(psi, cutoff)
    file = fetch(centroids_path, offline=offline) if is_url(centroids_path) else centroids_path
    return Truncation(psi, cutoff, load_centroids(file, G.w_dim))


def compute_truncation(
    G: Generator, truncation: Truncation, num_centroids: int, classes: Sequence[int] | None, save_path: Path
) -> Truncation:
    """`truncation` with centroids of `classes` (None = all), which are written to `save_path` too."""
    centroids = compute_centroids(G, num_centroids, classes=classes)
    try:
        save_centroids(save_path, centroids)
    except OSError as error:
        raise UserError(
            f"{save_path} cannot be written: {error.strerror or error}; choose another"
        ) from error
    click.echo(f"Centroids: {save_path} (use them again with --centroids-path)")
    return replace(truncation, centroids=centroids)


def create_folder(outdir: str) -> Path:
    """The output folder, made when missing. UserError when that is impossible."""
    folder = Path(outdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outdir {outdir} cannot be made: {error.strerror}; choose another") from error
    return folder


def save_png(path: Path, image: Tensor) -> None:
    """Write a uint8 image (C, H, W), C = 1 or 3, atomically. UserError when the file cannot be written."""
    pixels = image.permute(1, 2, 0).squeeze(2) if image.shape[0] == 1 else image.permute(1, 2, 0)
    try:
        with atomic_write(path) as temporary:
            Image.fromarray(pixels.contiguous().numpy()).save(temporary, format="PNG")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written: {reason}; choose another --outdir") from error
