# SPDX-License-Identifier: MIT
"""Generate images from a network file: `python gen_images.py --network digits --outdir out`.

Flags, seeds and file names are StyleGAN's, so the same seed and class give the same image as there.
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from torch_utils.errors import UserError
from training.sampling import (
    create_image_grid,
    images_for_seed,
    motion_matrix,
    move_images_,
    parse_seeds,
)
from training.sampling_cli import (
    CLASSES_HELP,
    NETWORK,
    check_truncation,
    compute_truncation,
    create_folder,
    open_network,
    parse_classes,
    read_truncation,
    sampling_options,
    save_png,
)

MAX_CLASSES_SHOWN = 20  # networks with at most so many classes show all of them when no class is given


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@NETWORK
@click.option("--outdir", required=True, metavar="DIR", help="Output folder; files are overwritten")
@click.option("--seeds", default="0-9", metavar="LIST", help="Random seeds, such as 0,1,4-6")
@click.option("--class", "--classes", "class_list", metavar="LIST", help=CLASSES_HELP)
@click.option("--batch-sz", type=click.IntRange(min=1), default=1, help="Samples per seed, tiled")
@click.option("--translate", default="0,0", metavar="X,Y", help="Move the images, in image widths")
@click.option("--rotate", type=float, default=0.0, metavar="ANGLE", help="Turn the images, in degrees")
@click.option(
    "--noise-mode",
    type=click.Choice(["const", "random", "none"]),
    default="const",
    help="Accepted and ignored: these networks have no noise",
)
@click.option("--grid/--no-grid", default=None, help="Also write grid.png, a row per class")
@sampling_options  # fmt: skip
def main(
    network, outdir, seeds, class_list, batch_sz, translate, rotate, noise_mode, grid,
    truncation_psi, trunc_cutoff, centroids_path, num_centroids, offline, device,
) -> None:  # fmt: skip
    """Write one PNG per seed, and per class where there are several: seed0003.png, seed0003_class07.png.

    Without --class, a network of at most 20 classes shows every class, and grid.png; one of more classes
    draws a random class for each seed, as the official tool does.
    """
    del noise_mode  # nothing to choose
    try:
        numbers = parse_seeds(seeds)
        translation = parse_translation(translate)
        if not math.isfinite(rotate):
            raise UserError(f"--rotate {rotate} is not an angle; give degrees, such as 30")
        check_truncation(truncation_psi, num_centroids, centroids_path)
        G, network_file = open_network(network, device, offline)
        move_images_(G, motion_matrix(translation, rotate))
        classes = choose_classes(class_list, G.c_dim, network_file)
        truncation = read_truncation(G, truncation_psi, trunc_cutoff, centroids_path, offline)
        folder = create_folder(outdir)
        if num_centroids is not None:
            truncation = compute_truncation(G, truncation, num_centroids, classes, folder / "centroids.npy")
        writes_grid = grid if grid is not None else class_list is None and classes is not None
        rows = []
        for seed in tqdm(numbers, unit="seed", desc="Generating"):
            images = images_for_seed(G, seed, batch_sz, classes, truncation)
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


def parse_translation(text: str) -> tuple[float, float]:
    """X and Y of --translate. UserError when they are not two finite numbers."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = math.nan
    if not math.isfinite(x) or not math.isfinite(y):
        raise UserError(f"--translate {text} is not two numbers; write for example 0.25,-0.1")
    return x, y


def choose_classes(class_list: str | None, c_dim: int, network: Path) -> list[int] | None:
    """Classes to draw for every seed; None = none (unconditional), or a random one per image."""
    if class_list is not None:
        return parse_classes(class_list, c_dim, network)
    return list(range(c_dim)) if 0 < c_dim <= MAX_CLASSES_SHOWN else None


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


if __name__ == "__main__":
    main()
