# SPDX-License-Identifier: MIT
"""--batch-gpu auto: the most images per forward pass that fit into memory, found by steps that are thrown away.

They run in a process of their own, which does not talk to other ranks, and which the system may kill.
"""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import numpy as np
import torch

from torch_utils import cpu
from torch_utils.distributed import gather_objects, world_size
from torch_utils.errors import UserError
from torch_utils.process_environment import read_environment
from torch_utils.stats import StatsCollector
from training.available_memory import available_memory
from training.batch import Batch
from training.config import TrainConfig
from training.draws import Draws
from training.initialization import Networks, build_loss, new_networks
from training.optimizers import make_optimizer
from training.out_of_memory import is_out_of_gpu_memory, microbatch_sizes
from training.train_step import StepContext, discriminator_step, generator_step, path_length_step

GPU_SHARE = 0.92  # of a GPU's free memory may be used: the allocator's waste grows with time
HOST_SHARE = 0.8  # of the machine's, which data and logs need too, and where there is no second try
GROWTH_SAFETY = 1.1  # on what an image is estimated to take
FIRST_SIZE, SECOND_SIZE = 1, 4  # images for which memory is measured on a CPU
GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """How many images one process passes at once, and why."""

    size: int  # images; 0 = not even one fits
    reason: str  # for people


def choose_microbatch(config: TrainConfig, device: torch.device) -> tuple[int, str]:
    """The largest micro-batch that fits, and a sentence about it. All ranks call it, and get the same.

    It divides the process's share of the batch and is at most config.microbatch_size. Raises UserError when not even
    one image fits. Takes some ten seconds, more for large networks.
    """
    sizes = [size for size in microbatch_sizes(config) if size <= config.microbatch_size]
    share = config.batch_size // world_size()
    alone = replace(
        config, batch_size=share, sync_batchnorm=False
    )  # what this process does, without the others
    try:
        own = choose_on_gpu(alone, device, sizes) if device.type == "cuda" else choose_on_host(alone, sizes)
    except BrokenProcessPool:
        own = Choice(
            0, f"a step was killed, with {available_memory() / GIB:.1f} GiB of the machine's memory free"
        )
    choices = gather_objects(own)
    tightest = min(range(len(choices)), key=lambda r: choices[r].size)
    size, reason = choices[tightest].size, choices[tightest].reason
    if len(choices) > 1 and len({choice.size for choice in choices}) > 1:
        reason += f"; rank {tightest} has the least memory"
    if size == 0:
        raise UserError(
            f"--batch-gpu auto: not even one image per pass fits ({reason}); use smaller networks"
        )
    return size, describe(config, size, reason)


def describe(config: TrainConfig, size: int, reason: str) -> str:
    """What was chosen, why, and what depends on it."""
    share = microbatch_sizes(config)[0]
    parts = f"{share // size} passes per step" if size < share else "one pass per step"
    text = f"--batch-gpu auto: {size} images per pass, {parts} ({reason})."
    if size == config.microbatch_size < share:
        text += f" The recipe has no more; --batch-gpu {share} would try all."
    return (
        f"{text} BatchNorm in D normalises over these {size} images, so the result depends on it a little: to repeat "
        f"this run elsewhere, give --batch-gpu {size}."
    )


def choose_on_gpu(config: TrainConfig, device: torch.device, sizes: list[int]) -> Choice:
    """Try sizes from large to small."""
    with start_process() as process:
        for size in sizes:
            used, free = process.submit(try_on_gpu, config, str(device), size).result()
            if used is not None and used <= GPU_SHARE * free:
                return Choice(size, f"{used / GIB:.1f} of {free / GIB:.1f} GiB")
    return Choice(0, f"{free / GIB:.1f} GiB are free")


def choose_on_host(config: TrainConfig, sizes: list[int]) -> Choice:
    """Measure two small sizes and count on from them: too large a step would make the system kill something."""
    environment = read_environment()
    num_local = 1 if environment is None else environment.local_world_size
    usable = HOST_SHARE * available_memory() / num_local
    gather_objects(None)  # all have looked before anybody measures
    first = min(sizes, key=lambda size: abs(size - FIRST_SIZE))
    second = min(
        (size for size in sizes if size > first), key=lambda size: abs(size - SECOND_SIZE), default=first
    )
    with start_process() as process:
        need = {s: process.submit(measure_on_host, config, s).result() for s in sorted({first, second})}
    growth = GROWTH_SAFETY * (need[second] - need[first]) / max(second - first, 1)  # bytes per image
    estimates = {size: need[first] + growth * (size - first) for size in sizes}
    fitting = [size for size in sizes if estimates[size] <= usable]
    if not fitting:
        return Choice(0, f"it takes {need[first] / GIB:.1f} of {usable / GIB:.1f} GiB")
    return Choice(fitting[0], f"about {estimates[fitting[0]] / GIB:.1f} of {usable / GIB:.1f} GiB")


def start_process() -> ProcessPoolExecutor:
    """A fresh process for steps: what they do to memory, and to PyTorch's state, ends with it."""
    return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))


def try_on_gpu(config: TrainConfig, device_name: str, size: int) -> tuple[int | None, int]:
    """Bytes that a training iteration takes on a GPU, None if it does not fit; and bytes that were free before."""
    device = torch.device(device_name)
    torch.cuda.set_device(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free = torch.cuda.mem_get_info(device)[0]
    used = None
    try:
        run_iteration(replace(config, microbatch_size=size), device)
        used = torch.cuda.max_memory_reserved(device)
    except Exception as error:
        if not is_out_of_gpu_memory(error):
            raise
    gc.collect()
    return used, free


def measure_on_host(config: TrainConfig, size: int) -> int:
    """Most bytes that this process has had, after a training iteration on the CPU. Call it with growing sizes."""
    cpu.tune_for_training()
    run_iteration(replace(config, microbatch_size=size), torch.device("cpu"))
    return cpu.peak_memory()


def run_iteration(config: TrainConfig, device: torch.device) -> None:
    """The steps of a training iteration on fresh networks and noise, of two passes each where the batch has so many."""
    torch.backends.cudnn.benchmark = config.benchmark  # its workspaces count
    networks = new_networks(config, device)
    loss = build_loss(config, device)
    context = StepContext(config, loss, StatsCollector(), warn=lambda _: None)
    trained = [p for p in networks.G.parameters() if p.requires_grad]
    G_optimizer = make_optimizer(trained, config.generator_optimizer)
    D_optimizer = make_optimizer(networks.D.trainable_parameters(), config.discriminator_optimizer)
    batch = draw_batch(config, networks, device)[: 2 * config.microbatch_size]
    generator_step(networks.G, networks.D, G_optimizer, batch, context)
    if config.loss_terms.pl_weight > 0:
        path_length_step(networks.G, G_optimizer, batch, torch.zeros((), device=device), context)
    discriminator_step(networks.G, networks.D, D_optimizer, batch, context)


def draw_batch(config: TrainConfig, networks: Networks, device: torch.device) -> Batch:
    """A whole batch: noise for images."""
    share, generator = config.batch_size, config.generator
    size = generator.img_resolution
    draws = Draws(config.seed, np.arange(share), device)
    labels = draws.integers("label", 0, generator.c_dim) if generator.c_dim else None
    images = torch.empty(share, 3, size, size, device=device).uniform_(-1, 1)
    return Batch(images, labels, draws.normal("z", networks.G.z_dim), labels, draws)
