# SPDX-License-Identifier: MIT
"""What is reported at a tick: speed, memory and the collected statistics, to the logs and as one line for people."""

from __future__ import annotations

import time

import psutil
import torch

from torch_utils.stats import StatsCollector
from training.data_loader import Batches
from training.durations import format_duration
from training.run_log import RunLog
from training.run_state import TrainState
from training.watchdog import find_slow_rank

SHOWN = ("Loss/G/loss", "Loss/D/loss", "Loss/signs/real", "Loss/signs/fake")


class TickReport:
    """Writes the statistics since the last tick."""

    def __init__(self, stats: StatsCollector, log: RunLog) -> None:
        self.stats, self.log = stats, log
        self.start_time = time.time()

    def restart(self) -> None:
        """From here on time counts for the next tick."""
        self.start_time = time.time()

    def write(self, clock: TrainState, loader: Batches) -> dict[str, dict[str, float]]:
        """Flush the statistics into the logs, print a status line, and return them. All processes call it."""
        tick_seconds, elapsed = time.time() - self.start_time, self.log.total_seconds()
        sec_per_kimg = tick_seconds / (max(clock.cur_nimg - clock.tick_start_nimg, 1) / 1000)
        if (slow_rank := find_slow_rank(tick_seconds)) is not None:
            self.log.print(f"Warning: {slow_rank}")
        loader.report_wait(self.stats, tick_seconds)
        progress = {
            "Progress/tick": clock.cur_tick,
            "Progress/kimg": clock.cur_nimg / 1000,
            "Timing/total_sec": elapsed,
            "Timing/sec_per_tick": tick_seconds,
            "Timing/sec_per_kimg": sec_per_kimg,
            "Resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
        }
        if torch.cuda.is_initialized():
            progress["Resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        for name, value in progress.items():
            self.stats.report(name, value)
        stats = self.stats.flush()
        self.log.write_stats(stats, clock.cur_nimg)
        G_loss, D_loss, real, fake = (
            stats[name]["mean"] if name in stats else float("nan") for name in SHOWN
        )
        self.log.print(
            f"tick {clock.cur_tick:<4d} kimg {clock.cur_nimg / 1000:<8.1f} time {format_duration(elapsed):<7} "
            f"left {self.log.time_left(clock.cur_nimg):<7} sec/kimg {sec_per_kimg:<7.2f} "
            f"G {G_loss:<7.2f} D {D_loss:<6.2f} signs real {real:<5.2f} fake {fake:<5.2f}"
        )
        return stats
