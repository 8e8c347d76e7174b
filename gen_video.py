# SPDX-License-Identifier: MIT
"""Make a video that runs through seeds: `python gen_video.py --network digits --seeds 0-31 --grid 4x2 --output a.mp4`.

Flags and motion are StyleGAN3's: cubic interpolation in W, a grid whose cells run through their own seeds.
"""

from __future__ import annotations

import re
from pathlib import Path

import click
from tqdm import tqdm

from torch_utils.errors import UserError
from training.sampling import parse_seeds
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
)
from training.video import keyframe_ws, plan_keyframes, render_frames
from training.video_file import check_output, write_video


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@NETWORK
@click.option(
    "--output",
    required=True,
    metavar="FILE|DIR",
    help="Video to write, replacing an old one: .mp4, .gif, .webp, .apng; or a new folder for PNG files",
)
@click.option("--seeds", required=True, metavar="LIST", help="Seeds of the keyframes, such as 0-31")
@click.option(
    "--shuffle-seed", type=click.IntRange(0, 2**32 - 1), help="Shuffle the keyframes with this seed"
)
@click.option("--grid", default="1x1", metavar="WxH", help="Cells side by side and below each other")
@click.option(
    "--num-keyframes",
    type=POSITIVE,
    help="Keyframes per cell; seeds repeat when they run out  [default: seeds / cells]",
)
@click.option("--w-frames", type=POSITIVE, default=120, help="Frames from one keyframe to the next")
@click.option("--fps", type=click.FloatRange(0.1, 1000), default=60, help="Frames per second")
@click.option(
    "--classes",
    "--class",
    "class_list",
    metavar="LIST",
    help=f"{CLASSES_HELP}: one for all seeds, or one for each  [default: random, by seed]",
)
@click.option("--batch-gpu", type=POSITIVE, default=16, help="Images drawn at a time")
@sampling_options  # fmt: skip
def main(
    network, output, seeds, shuffle_seed, grid, num_keyframes, w_frames, fps, class_list, batch_gpu,
    truncation_psi, trunc_cutoff, centroids_path, num_centroids, offline, device,
) -> None:  # fmt: skip
    """Write a video of seeds / (W * H) * w-frames frames that ends where it begins.

    The first cell of the grid runs through the first seeds, the second through the next, and so on, row by row.
    """
    try:
        numbers = parse_seeds(seeds)
        columns, rows = parse_grid(grid)
        positions = plan_keyframes(len(numbers), columns * rows, num_keyframes, shuffle_seed)
        check_truncation(truncation_psi, num_centroids, centroids_path)
        check_output(output)
        G, network_file = open_network(network, device, offline)
        classes = (
            None if class_list is None else seed_classes(class_list, len(numbers), G.c_dim, network_file)
        )
        truncation = read_truncation(G, truncation_psi, trunc_cutoff, centroids_path, offline)
        if num_centroids is not None:
            path = Path(output).with_suffix(".centroids.npy")
            truncation = compute_truncation(G, truncation, num_centroids, classes, path)
        ws = keyframe_ws(G, numbers, classes, truncation)
        num_frames = positions.shape[1] * w_frames
        frames = render_frames(G, ws[positions], w_frames, columns, batch_gpu)
        write_video(output, tqdm(frames, total=num_frames, unit="frame", desc="Rendering"), fps)
    except UserError as error:
        raise click.ClickException(str(error)) from error
    size = f"{columns * G.img_resolution}x{rows * G.img_resolution} pixels"
    click.echo(f"Wrote {num_frames} frames of {size} to {output}")


def parse_grid(text: str) -> tuple[int, int]:
    """(columns, rows) of a grid such as 4x2. UserError when it cannot be read."""
    match = re.fullmatch(r"\s*(\d+)\s*[x,]\s*(\d+)\s*", text.lower())
    if match is None or int(match[1]) < 1 or int(match[2]) < 1:
        raise UserError(f"--grid {text} is not columns x rows; write for example 4x2")
    return int(match[1]), int(match[2])


def seed_classes(class_list: str, num_seeds: int, c_dim: int, network: Path) -> list[int]:
    """A class for each seed, from one for all or one for each. UserError for another number of them."""
    classes = parse_classes(class_list, c_dim, network)
    if len(classes) == 1:
        return classes * num_seeds
    if len(classes) != num_seeds:
        raise UserError(
            f"{len(classes)} classes for {num_seeds} seeds; give one for all, or one for each seed"
        )
    return classes


if __name__ == "__main__":
    main()
