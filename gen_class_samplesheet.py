# SPDX-License-Identifier: MIT
"""Draw a sheet of samples per class: `python gen_class_samplesheet.py --network digits --outdir sheets`.

Every class is drawn from the same latents, as in the official tool.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from torch_utils.errors import UserError
from training.generator.generator import Generator
from training.run_log import create_run_dir
from training.sampling import (
    Truncation,
    create_image_grid,
    draw_images,
    latents_for_seed,
    parse_seeds,
    style_vectors,
    to_uint8,
)
from training.sampling_cli import (
    CLASSES_HELP,
    NETWORK,
    POSITIVE,
    check_truncation,
    compute_truncation,
    open_network,
    parse_classes,
    read_truncation,
    sampling_options,
    save_png,
)

MAX_SHEET_PIXELS = 2**30  # 3 GB of memory


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@NETWORK
@click.option("--outdir", required=True, metavar="DIR", help="Where the numbered folders of sheets go")
@click.option("--desc", metavar="TEXT", help="Text to add to the folder's name")
@click.option(
    "--seed", "--seeds", "seeds", default="42", metavar="LIST", help="Random seeds; a sheet for each"
)
@click.option("--classes", "--class", "class_list", metavar="LIST", help=f"{CLASSES_HELP}  [default: all]")
@click.option("--samples-per-class", type=POSITIVE, default=4, help="Samples of each class")
@click.option(
    "--grid-width",
    type=POSITIVE,
    default=32,
    help="Most images per row; reduced to a multiple of the samples per class",
)
@click.option("--batch-gpu", type=POSITIVE, default=32, help="Images drawn at a time")
@sampling_options  # fmt: skip
def main(
    network, outdir, desc, seeds, class_list, samples_per_class, grid_width, batch_gpu,
    truncation_psi, trunc_cutoff, centroids_path, num_centroids, offline, device,
) -> None:  # fmt: skip
    """Write sheet.png into a new folder such as DIR/00000-digits-trunc0.7; sheet_seed0042.png for several seeds.

    The samples of a class stand side by side, the classes row by row. An unconditional network counts as one
    class.
    """
    try:
        numbers = parse_seeds(seeds)
        check_truncation(truncation_psi, num_centroids, centroids_path)
        G, network_file = open_network(network, device, offline)
        classes = None if class_list is None else parse_classes(class_list, G.c_dim, network_file)
        rows = classes or list(range(G.c_dim)) or [None]
        check_size(G, len(rows) * samples_per_class)
        truncation = read_truncation(G, truncation_psi, trunc_cutoff, centroids_path, offline)
        folder = create_run_dir(outdir, folder_description(network, truncation_psi, desc))
        if num_centroids is not None:
            truncation = compute_truncation(G, truncation, num_centroids, classes, folder / "centroids.npy")
        for seed in numbers:
            images = sheet_images(G, seed, samples_per_class, rows, truncation, batch_gpu)
            name = "sheet.png" if len(numbers) == 1 else f"sheet_seed{seed:04d}.png"
            columns = sheet_columns(grid_width, samples_per_class, len(images))
            save_png(folder / name, create_image_grid(images, columns))
    except UserError as error:
        raise click.ClickException(str(error)) from error
    of_what = f"{len(rows)} x {samples_per_class} images of {G.img_resolution} pixels"
    click.echo(f"Wrote {len(numbers)} sheet{'s' * (len(numbers) > 1)} of {of_what} to {folder}")


def folder_description(network: str, truncation_psi: float, desc: str | None) -> str:
    """What the name of the output folder says after its number."""
    words = [Path(network).stem, f"trunc{truncation_psi:g}", *([desc] if desc else [])]
    return "-".join(words)


def check_size(G: Generator, num_images: int) -> None:
    """Raise UserError for a sheet too large to hold, before anything is drawn."""
    if num_images * G.img_resolution**2 > MAX_SHEET_PIXELS:
        raise UserError(
            f"{num_images} images of {G.img_resolution} pixels are more than one sheet can hold "
            f"({MAX_SHEET_PIXELS // G.img_resolution**2}); give fewer --classes or --samples-per-class"
        )


def sheet_columns(grid_width: int, samples_per_class: int, num_images: int) -> int:
    """Images per row: the largest multiple of the samples per class within the width, at least one class."""
    columns = max(grid_width - grid_width % samples_per_class, samples_per_class)
    return min(columns, num_images)


def sheet_images(
    G: Generator,
    seed: int,
    samples_per_class: int,
    classes: list[int] | list[None],
    truncation: Truncation,
    batch: int,
) -> Tensor:
    """uint8 (len(classes) * samples_per_class, C, H, W) on the CPU, class by class; all have the same latents.

    classes: [None] for an unconditional network. At most `batch` images are drawn at a time.
    """
    z = latents_for_seed(seed, samples_per_class, G.z_dim).repeat(len(classes), 1)
    labels = torch.tensor(classes).repeat_interleave(samples_per_class) if G.c_dim else None
    images = []
    with tqdm(total=len(z), unit="img", desc=f"Seed {seed}") as bar:
        for index in torch.arange(len(z)).split(batch):
            ws = style_vectors(G, z[index], None if labels is None else labels[index], truncation)
            images.append(to_uint8(draw_images(G, ws)))
            bar.update(len(index))
    return torch.cat(images)


if __name__ == "__main__":
    main()
