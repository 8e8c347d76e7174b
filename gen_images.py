# SPDX-License-Identifier: MIT
"""Generate images from a network file: `python gen_images.py --network digits --outdir out`.

Flags, seeds and file names are StyleGAN's, so the same seed and class give the same latent as there.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from torch_utils.errors import UserError
from training.network_io import load_network
from training.sampling import create_image_grid, images_for_seed, parse_classes, parse_seeds, pick_device

MAX_CLASSES_SHOWN = 20  # networks with at most so many classes show all of them when no class is given


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--network", required=True, metavar="FILE|NAME", help="Network file (.safetensors), or digits")
@click.option("--outdir", required=True, metavar="DIR", help="Output folder; files are overwritten")
@click.option("--seeds", default="0-9", metavar="LIST", help="Random seeds, such as 0,1,4-6")
@click.option("--class", "class_list", metavar="LIST", help="Class indices, such as 3 or 0,3,5-7")
@click.option("--trunc", "truncation_psi", type=float, default=1.0, help="Truncation psi; 1 = none")
@click.option("--trunc-cutoff", type=click.IntRange(min=0), help="Truncate only the first N layers")
@click.option("--batch-sz", type=click.IntRange(min=1), default=1, help="Samples per seed, tiled")
@click.option("--grid/--no-grid", default=None, help="Also write grid.png, a row per class")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps")
def main(network, outdir, seeds, class_list, truncation_psi, trunc_cutoff, batch_sz, grid, device) -> None:
    """Write one PNG per seed, and per class where there are several: seed0003.png, seed0003_class07.png.

    Without --class, a network of at most 20 classes shows every class, and grid.png; one of more classes
    draws a random class for each seed, as the official tool does.
    """
    try:
        numbers = parse_seeds(seeds)
        G = load_network(network, pick_device(device))
        classes = choose_classes(class_list, G.c_dim)
        folder = create_folder(outdir)
        writes_grid = grid if grid is not None else class_list is None and classes is not None
        rows = []
        for seed in tqdm(numbers, unit="seed", desc="Generating"):
            images = images_for_seed(G, seed, batch_sz, classes, truncation_psi, trunc_cutoff)
            save_images(folder, seed, images, classes)
            if writes_grid:  # without a grid, any number of seeds takes the memory of one
                rows.append(images)
        if writes_grid:
            save_png(folder / "grid.png", class_grid(rows))
    except UserError as error:
        raise click.ClickException(str(error)) from error
    num_files = len(numbers) * len(classes or [None])
    click.echo(f"Wrote {num_files} files of {G.img_resolution}-pixel images to {folder}")
    if writes_grid:
        click.echo(f"Overview: {folder / 'grid.png'}")


def choose_classes(class_list: str | None, c_dim: int) -> list[int] | None:
    """Classes to draw for every seed; None = none (unconditional), or a random one per image."""
    if class_list is not None:
        return parse_classes(class_list, c_dim)
    return list(range(c_dim)) if 0 < c_dim <= MAX_CLASSES_SHOWN else None


def create_folder(outdir: str) -> Path:
    """The output folder, made when missing. UserError when that is impossible."""
    folder = Path(outdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outdir {outdir} cannot be made: {error.strerror}; choose another") from error
    return folder


def save_images(folder: Path, seed: int, images: Tensor, classes: list[int] | None) -> None:
    """Write the images (classes, batch, C, H, W) of one seed, a file per class."""
    for row, samples in enumerate(images):
        suffix = f"_class{classes[row]:02d}" if classes is not None and len(classes) > 1 else ""
        save_png(folder / f"seed{seed:04d}{suffix}.png", create_image_grid(samples))


def class_grid(rows: list[Tensor]) -> Tensor:
    """Grid of the images per seed (classes, batch, C, H, W): a row per class; a square without classes."""
    images = torch.cat(rows, dim=1)
    columns = images.shape[1] if images.shape[0] > 1 else None
    return create_image_grid(images.flatten(0, 1), columns)


def save_png(path: Path, image: Tensor) -> None:
    """Write a uint8 image (C, H, W), C = 1 or 3. UserError when the file cannot be written."""
    pixels = image.permute(1, 2, 0).squeeze(2) if image.shape[0] == 1 else image.permute(1, 2, 0)
    try:
        Image.fromarray(pixels.contiguous().numpy()).save(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written: {reason}; choose another --outdir") from error


if __name__ == "__main__":
    main()
