# SPDX-License-Identifier: MIT
"""How the cost of our training iteration grows: with the batch, the resolution, the classes and the processes.

The recipes are ImageNet's with a sixteenth of the channels, and EfficientNet-Lite0 alone in D, on 64x64 images or
larger: small enough to see all of a range on two cores in ten minutes. Every point runs in processes of its own.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import click
import torch
from tqdm import tqdm

from torch_utils.checkpoint import atomic_write
from torch_utils.distributed import barrier, init_from_environment, shut_down
from torch_utils.errors import UserError
from training.benchmark.measure import Machine, read_peak, reset_peak, set_up, start_process, synchronize
from training.benchmark.recipes import benchmark_config
from training.benchmark.subjects import OurTrainer, build_networks, draw_images
from training.config import TrainConfig
from training.text_table import align_columns

Axis = Literal["batch", "resolution", "classes", "processes"]
WIDTH = 1 / 16  # of G's channels
FEATURE_RESOLUTION = 64  # smaller images are resized to it
BATCHES, RESOLUTIONS = (1, 2, 4, 8, 16, 32, 64), (16, 32, 64, 128, 256, 512, 1024)
CLASSES, PROCESSES = (10, 100, 1000, 10_000, 20_000), (1, 2, 4)
QUICK = {"batch": (1, 2), "resolution": (16, 32), "classes": (10, 100), "processes": (1, 2)}
BATCH, RESOLUTION_BATCH, RANK_BATCH = 8, 1, 8  # images per process where the batch is not what varies
WARMUP, REPEATS = 1, 3  # iterations of a point
FIGURE, DATA = "growth.png", "growth.json"


@dataclass(frozen=True)
class Point:
    """One measurement."""

    axis: Axis  # what varies
    value: int  # its value
    images: int  # in one iteration, all processes together
    seconds: float | None  # of one iteration; None = out of memory
    peak_bytes: int | None  # most memory of a process


def run_growth(folder: Path, machine: Machine, is_quick: bool = False) -> list[Point]:
    """Measure all points, print them, write growth.png and growth.json to `folder`, which is made.

    Raises UserError when matplotlib is missing, before anything is measured.
    """
    try:
        from training.benchmark.growth_figure import draw_growth
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("plots need matplotlib, which is not installed: pip install matplotlib") from error
    points = []
    for axis, value in (progress := tqdm(plan_points(machine, is_quick), unit="point")):
        progress.set_description(f"{axis} {value}")
        points.append(measure_point(axis, value, machine, is_quick))
    click.echo("\n" + format_points(points))
    with atomic_write(folder / DATA) as temporary:
        temporary.write_text(
            json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8"
        )
    figure = draw_growth(points)
    with atomic_write(folder / FIGURE) as temporary:
        figure.savefig(temporary, format="png")
    click.echo(f"Wrote {folder / FIGURE} and {folder / DATA}")
    return points


def plan_points(machine: Machine, is_quick: bool) -> list[tuple[Axis, int]]:
    """What to measure. On GPUs as many processes as there are GPUs."""
    most = torch.cuda.device_count() if machine.device == "cuda" else max(PROCESSES)
    values = {"batch": BATCHES, "resolution": RESOLUTIONS, "classes": CLASSES, "processes": PROCESSES}
    values = QUICK if is_quick else values
    return [(axis, v) for axis, row in values.items() for v in row if axis != "processes" or v <= most]


def growth_config(axis: Axis, value: int, is_tiny: bool = False) -> TrainConfig:
    """The recipe of a point, for the batch of one process."""
    resolution = value if axis == "resolution" else 16
    batch_size = {"batch": value, "resolution": RESOLUTION_BATCH, "processes": RANK_BATCH}.get(axis, BATCH)
    config = benchmark_config(f"imagenet-{resolution}", batch_size, 1.0 if is_tiny else WIDTH, is_tiny)
    generator, discriminator = config.generator, config.discriminator
    c_dim = value if axis == "classes" else generator.c_dim
    rows = max(c_dim, generator.mapping.num_embeddings)
    generator = replace(generator, mapping=replace(generator.mapping, c_dim=c_dim, num_embeddings=rows))
    discriminator = replace(
        discriminator,
        c_dim=c_dim,
        num_class_embeddings=rows,
        backbones=("tf_efficientnet_lite0",),
        feature_resolution=None if generator.img_resolution > FEATURE_RESOLUTION else FEATURE_RESOLUTION,
    )
    if not is_tiny:  # as many levels and blocks as for large images, whose nominal size they have
        discriminator = replace(discriminator, head_resolution=16)
    terms = replace(config.loss_terms, cls_weight=0.0, pl_weight=0.0)
    return replace(config, generator=generator, discriminator=discriminator, loss_terms=terms)


def measure_point(axis: Axis, value: int, machine: Machine, is_tiny: bool = False) -> Point:
    """Start as many processes as it takes; the seconds are rank 0's, the memory that of whoever had most."""
    config = growth_config(axis, value, is_tiny)
    num_processes = value if axis == "processes" else 1
    port = free_port()
    processes = [start_process() for _ in range(num_processes)]
    try:
        futures = [
            process.submit(time_iteration, config, machine, rank_environment(rank, num_processes, port))
            for rank, process in enumerate(processes)
        ]
        results = [future.result() for future in futures]
    except BrokenProcessPool:  # killed by the system
        return Point(axis, value, num_processes * config.batch_size, None, None)
    finally:
        stop(processes)
    return Point(
        axis, value, num_processes * config.batch_size, results[0][0], max(peak for _, peak in results)
    )


def stop(processes: Sequence[ProcessPoolExecutor]) -> None:
    """End the processes."""
    for process in processes:
        process.shutdown(cancel_futures=True)


def rank_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """torchrun's variables; none for a single process."""
    if num_processes == 1:
        return {}
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_processes,
        "LOCAL_WORLD_SIZE": num_processes,
    }
    return {name: str(n) for name, n in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def time_iteration(config: TrainConfig, machine: Machine, environment: dict[str, str]) -> tuple[float, int]:
    """Median seconds of an iteration, and the peak of memory; in a process of its own, the rank that it is told."""
    os.environ.update(environment)
    device = set_up(machine, config, "ours")
    if environment:
        device = init_from_environment(machine.device)
        if not machine.threads:
            torch.set_num_threads(max(torch.get_num_threads() // int(environment["WORLD_SIZE"]), 1))
    trainer = OurTrainer(config, build_networks(config, device), None, device)
    images, seconds = draw_images(config, device), []
    reset_peak(device)
    for _ in range(WARMUP + REPEATS):
        barrier()
        synchronize()
        start = time.perf_counter()
        trainer.iterate(images)
        synchronize()
        seconds.append(time.perf_counter() - start)
    peak = read_peak()
    shut_down()
    return statistics.median(seconds[WARMUP:]), peak


def format_points(points: Sequence[Point]) -> str:
    """A line per point."""
    lines = [["what grows", "value", "images", "s/iteration", "ms/image", "images/s", "GiB"]]
    for point in points:
        cells = [point.axis, str(point.value), str(point.images)]
        if point.seconds is None or point.peak_bytes is None:
            cells += ["out of memory", "-", "-", "-"]
        else:
            cells += [f"{point.seconds:.3g}", f"{1000 * point.seconds / point.images:.3g}"]
            cells += [f"{point.images / point.seconds:.3g}", f"{point.peak_bytes / 2**30:.2f}"]
        lines.append(cells)
    return align_columns(lines)
