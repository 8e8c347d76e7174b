# SPDX-License-Identifier: MIT
"""A row of the table: ours and the naive form in a process each, running in turn, so that both meet the same machine.

Each process has its own allocator and its own peak of memory, as the operating system or CUDA counts it.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from torch_utils.cpu import peak_memory
from torch_utils.ops import choice
from training.benchmark.agreement import ROUNDING, find_differences, find_tolerance
from training.benchmark.subjects import Row, Side, Subject, make_subject
from training.config import TrainConfig
from training.generator.network_plan import plan_network
from training.training_loop import configure_backends


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how everything is run."""

    device: str  # cpu or cuda
    threads: int  # of torch; 0 = as many as it takes by itself
    ops: str  # implementation of the fused ops, see torch_utils/ops/choice.py


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One side of a row."""

    seconds: list[float]  # of each repetition, per image
    peak_bytes: int  # most memory that the process had; on CUDA, most that tensors had

    @property
    def median(self) -> float:
        """Seconds per image."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row of the table."""

    recipe: str  # name of the preset
    row: Row  # what was run
    batch_size: int  # images in one pass
    width: float  # factor on G's channels
    timings: dict[Side, Timing] = field(default_factory=dict)  # a side that ran out of memory is missing
    differences: dict[str, float] = field(default_factory=dict)  # of ours from naive, by kind of result
    tolerances: dict[str, float] = field(default_factory=dict)  # largest that pass

    @property
    def agrees(self) -> bool:
        """Whether both gave the same results. False as well when one gave none."""
        return bool(self.differences) and all(d <= self.tolerances[k] for k, d in self.differences.items())


def compare(
    recipe: str, row: Row, config: TrainConfig, width: float, machine: Machine, repeats: int, num_samples: int
) -> Comparison:
    """Both sides of a row. A first run of each warms up and gives the results that are compared."""
    result = Comparison(recipe=recipe, row=row, batch_size=config.batch_size, width=width)
    processes = {side: start_process() for side in get_args(Side)}
    results: dict[Side, dict[str, np.ndarray]] = {}
    seconds: dict[Side, list[float]] = {}
    try:
        for side, process in list(processes.items()):
            try:
                results[side] = process.submit(prepare, config, row, side, machine, num_samples).result()
                seconds[side] = []
            except BrokenProcessPool:  # killed by the system, as when memory runs out
                processes.pop(side).shutdown()
        for _ in range(repeats):
            for side, process in processes.items():
                seconds[side].append(process.submit(run_once).result())
        peaks = {side: process.submit(read_peak).result() for side, process in processes.items()}
    finally:
        for process in processes.values():
            process.shutdown()
    for side, values in seconds.items():
        result.timings[side] = Timing(seconds=values, peak_bytes=peaks[side])
    if len(results) == len(get_args(Side)):
        result.differences.update(find_differences(results["ours"], results["naive"]))
        is_half = has_half_precision(config, machine.device)
        jumps = find_jumps(config, machine, results["ours"]) if row == "step" and not is_half else {}
        result.tolerances.update(
            {kind: find_tolerance(kind, is_half, jumps.get(kind, 0.0)) for kind in result.differences}
        )
    return result


def find_jumps(config: TrainConfig, machine: Machine, results: dict[str, np.ndarray]) -> dict[str, float]:
    """How far gradients of our iteration differ from `results` when each trained number moves by a rounding."""
    with start_process() as process:
        try:
            moved = process.submit(prepare, config, "step", "ours", machine, 0, ROUNDING).result()
        except BrokenProcessPool:
            return {}
    return find_differences(moved, results)


def has_half_precision(config: TrainConfig, device_type: str) -> bool:
    """Whether some of our networks run in half precision, or in TF32."""
    if config.feature_precision != "paper" or config.precision in ("bf16", "fp16"):
        return True
    layers = plan_network(config.generator).layers
    return device_type == "cuda" and config.precision == "paper" and any(layer.use_fp16 for layer in layers)


def start_process() -> ProcessPoolExecutor:
    """A fresh process that does one thing after the other, and ends with this one."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=end_with_parent)


# In the process.


def end_with_parent() -> None:
    """Watch the parent. Without it, a process of a pool waits forever, and keeps its gigabytes, if that is killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)  # in the middle of whatever is measured

    threading.Thread(target=watch, daemon=True).start()


_subject: Subject | None = None  # what `run_once` runs


def prepare(
    config: TrainConfig, row: Row, side: Side, machine: Machine, num_samples: int, move: float = 0.0
) -> dict[str, np.ndarray]:
    """Build a side of a row and run it once, with optimizers that do not move anything; the results.

    move: of what the optimizers train, each number is first multiplied by 1 + move * a normal one.
    """
    global _subject
    device = set_up(machine, config, side)
    _subject = make_subject(config, row, side, device, num_samples)
    gc.collect()
    reset_peak(device)
    groups = [group for optimizer in _subject.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
        if move:
            move_(group["params"], move)
    run_once()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    return {name: value.cpu().numpy() for name, value in _subject.results.items()}


@torch.no_grad()
def move_(parameters: Iterable[Tensor], share: float) -> None:
    """Multiply every number by 1 + share * a normal one, in place."""
    for parameter in parameters:
        parameter.mul_(1 + share * torch.randn_like(parameter))


def set_up(machine: Machine, config: TrainConfig, side: Side) -> torch.device:
    """Threads, implementations of ops and switches of this process. The naive side has torch's own settings."""
    if machine.threads:
        torch.set_num_threads(machine.threads)
    choice.set_backend(machine.ops)
    device = torch.device(machine.device)
    if side == "ours":
        configure_backends(config, device)
    else:
        torch.backends.cudnn.benchmark = config.benchmark
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return device


def run_once() -> float:
    """Seconds per image of one repetition."""
    assert _subject is not None
    total = 0.0
    for share, run in _subject.parts:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        total += share * (time.perf_counter() - start)
    return total / _subject.num_images


def synchronize() -> None:
    """Wait for a GPU, if this process has used one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far. Where the system cannot, what building the networks took counts too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # on Linux, 5 means: the peak becomes what is in use
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_peak() -> int:
    """Bytes: on CUDA the most that tensors had, elsewhere the most that the process had in memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return peak_memory()
