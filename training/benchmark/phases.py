# SPDX-License-Identifier: MIT
"""Where the time of our training iteration goes: a clock that is told by hooks when one phase ends and the next begins.

It watches the very steps that train; nothing is taken apart for it. With a GPU it waits at every mark, so that the
phases add up to a little more than an undisturbed iteration.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from torch_utils.checkpoint import atomic_write
from training.benchmark.measure import Machine, set_up, synchronize
from training.benchmark.subjects import OurTrainer, build_guidance, build_networks
from training.config import TrainConfig
from training.data_loader import Batches, InfiniteSampler, make_loader
from training.dataset import open_dataset

PHASES = (
    "data", "G forward", "G through D", "G backward", "optimizer of G", "G for D", "D fake", "D real",
    "optimizer of D", "EMA", "path length",
)  # fmt: skip
MIN_IMAGES, BATCHES_ON_DISK, LOADED_BATCHES = (
    64,
    4,
    16,
)  # of the data set that is written, and read for its speed
WARMUP = 1  # iterations before those that count


@dataclass(frozen=True)
class PhaseReport:
    """Seconds of one iteration, in the order of PHASES."""

    seconds: dict[str, float]  # per iteration; path length by its share of the iterations
    batch_size: int  # images per iteration
    loader_images_per_s: float  # what the data loader delivers when nothing else runs


class PhaseClock:
    """Adds the time since the last mark to the phase that it ends."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self.now = dict.fromkeys(PHASES, 0.0), now
        self.last = 0.0

    def start(self) -> None:
        """Begin here."""
        synchronize()
        self.last = self.now()

    def mark(self, phase: str) -> None:
        """What ran until now was `phase`."""
        synchronize()
        now = self.now()
        self.seconds[phase] += now - self.last
        self.last = now


@contextmanager
def watch(trainer: OurTrainer, clock: PhaseClock) -> Iterator[None]:
    """Let the modules and optimizers of a trainer mark the phases of its iterations, which have one pass per step.

    In G's step images exist (forward), get their gradient from D (through D), and the optimizer begins (backward). In
    D's step they exist, and D is called twice: the second call ends what the fakes are about.
    """
    num_calls = 0

    def after_synthesis(module: torch.nn.Module, inputs: tuple[Any, ...], images: Tensor) -> None:
        nonlocal num_calls
        num_calls = 0
        clock.mark("G forward" if images.requires_grad else "G for D")
        if images.requires_grad:
            images.register_hook(lambda gradient: clock.mark("G through D"))

    def before_discriminator(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            clock.mark("D fake")

    handles = [
        trainer.G.synthesis.register_forward_hook(after_synthesis),
        trainer.D.register_forward_pre_hook(before_discriminator),
        trainer.G_optimizer.register_step_pre_hook(lambda *_: clock.mark("G backward")),
        trainer.G_optimizer.register_step_post_hook(lambda *_: clock.mark("optimizer of G")),
        trainer.D_optimizer.register_step_pre_hook(lambda *_: clock.mark("D real")),
        trainer.D_optimizer.register_step_post_hook(lambda *_: clock.mark("optimizer of D")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_phases(
    config: TrainConfig, machine: Machine, repeats: int, trace: Path | None = None
) -> PhaseReport:
    """Mean seconds of each phase over `repeats` iterations on images from the disk; in a process of its own.

    trace: where to write a trace of one more iteration, which Chrome and Perfetto show.
    """
    device = set_up(machine, config, "ours")
    networks = build_networks(config, device)
    trainer = OurTrainer(config, networks, build_guidance(config, device), device)
    with tempfile.TemporaryDirectory() as folder:
        loader = open_loader(Path(folder), config, device)
        try:
            speed = loader_speed(loader, config.batch_size)
            clock = time_iterations(trainer, loader, repeats)
            if trace is not None:
                write_trace(trace, trainer, loader, device)
        finally:
            loader.close()
    return PhaseReport({k: v / repeats for k, v in clock.seconds.items()}, config.batch_size, speed)


def time_iterations(trainer: OurTrainer, loader: Batches, repeats: int) -> PhaseClock:
    """The clock after `repeats` iterations and, where the recipe has it, as many steps for path length."""
    config, clock = trainer.config, PhaseClock()
    terms, interval = config.loss_terms, config.generator_optimizer.reg_interval
    for index in range(WARMUP + repeats):
        if index == WARMUP:
            clock = PhaseClock()
        clock.start()
        images = next_images(loader)
        clock.mark("data")
        with watch(trainer, clock):
            trainer.iterate(images)
            clock.mark("EMA")
        if terms.pl_weight > 0 and interval > 0:
            start = time.perf_counter()
            trainer.regularize(images)
            synchronize()
            clock.seconds["path length"] += (time.perf_counter() - start) / interval
    return clock


def next_images(loader: Batches) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1], as the trainer gets them."""
    return next(loader)[0].to(torch.float32) / 127.5 - 1


def loader_speed(loader: Batches, batch_size: int) -> float:
    """Images per second without training."""
    next(loader)  # starts the processes
    start = time.perf_counter()
    for _ in range(LOADED_BATCHES):
        next_images(loader)
    synchronize()
    return LOADED_BATCHES * batch_size / (time.perf_counter() - start)


def open_loader(folder: Path, config: TrainConfig, device: torch.device) -> Batches:
    """A loader of smooth random PNGs of the recipe's size, which are written to `folder`."""
    size, rng = config.generator.img_resolution, np.random.default_rng(0)
    count = max(MIN_IMAGES, BATCHES_ON_DISK * config.batch_size)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    dataset = open_dataset(folder)
    sampler = InfiniteSampler(len(dataset), config.seed)
    return make_loader(dataset, sampler, config.batch_size, config.data.num_workers, device)


def write_trace(path: Path, trainer: OurTrainer, loader: Batches, device: torch.device) -> None:
    """Profile one iteration with torch.profiler."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    images = next_images(loader)
    with profile(activities=activities) as profiler:
        trainer.iterate(images)
        synchronize()
    with atomic_write(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
