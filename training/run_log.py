# SPDX-License-Identifier: MIT
"""What a run writes for people and plots: log.txt, stats.jsonl, TensorBoard events, metric files, a progress bar.

Only the main process writes; on the others every method does nothing.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torch_utils.distributed import is_main
from torch_utils.errors import UserError


def create_run_dir(outdir: str, description: str) -> Path:
    """Make and return `outdir/<next number>-<description>`. Raises UserError when `outdir` cannot be written."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", description)
    try:
        Path(outdir).mkdir(parents=True, exist_ok=True)
        numbers = [int(m.group()) for m in (re.match(r"\d+", name) for name in os.listdir(outdir)) if m]
        run_dir = Path(outdir) / f"{max(numbers, default=-1) + 1:05d}-{safe}"
        run_dir.mkdir()
    except OSError as error:
        raise UserError(
            f"--outdir {outdir}: cannot create a run folder ({error.strerror}); choose another"
        ) from error
    return run_dir


def open_run_dir(run_dir: Path) -> Path:
    """Make a run folder of a given name unless it exists. Raises UserError when it cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outdir: cannot create {run_dir} ({error.strerror}); choose another") from error
    return run_dir


class RunLog:
    """Text, statistics and progress of one run, in its folder."""

    def __init__(self, run_dir: Path, total_kimg: float, start_nimg: int = 0) -> None:
        self.run_dir = run_dir
        self.start_time = time.time()
        self._is_main = is_main()
        if self._is_main:
            self._text = open(run_dir / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 -- closed by close()
            self._stats = open(run_dir / "stats.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            self._events = _open_tensorboard(run_dir)
            total = round(total_kimg * 1000)
            self._bar = tqdm(total=total, initial=start_nimg, unit="img", unit_scale=True, smoothing=0.05)

    def print(self, message: str) -> None:
        """Write a line to the terminal (above the progress bar) and to log.txt."""
        if self._is_main:
            self._bar.write(message)
            self._text.write(message + "\n")
            self._text.flush()

    def advance(self, num_images: int) -> None:
        """Move the progress bar by so many images."""
        if self._is_main:
            self._bar.update(num_images)

    def write_stats(self, stats: dict[str, dict[str, float]], cur_nimg: int) -> None:
        """Append one line to stats.jsonl and the means to TensorBoard, at step `cur_nimg`."""
        if not self._is_main:
            return
        self._stats.write(json.dumps({**stats, "timestamp": time.time()}) + "\n")
        self._stats.flush()
        if self._events is not None:
            for name, moments in stats.items():
                self._events.add_scalar(name, moments["mean"], global_step=cur_nimg)
            self._events.flush()

    def write_metric(
        self, name: str, results: dict[str, float], cur_nimg: int, snapshot: str, seconds: float
    ) -> None:
        """Append one line to metric-<name>.jsonl and the values to TensorBoard."""
        if not self._is_main:
            return
        line: dict[str, Any] = {
            "results": results,
            "metric": name,
            "cur_nimg": cur_nimg,
            "snapshot": snapshot,
            "total_time": seconds,
            "timestamp": time.time(),
        }
        with open(self.run_dir / f"metric-{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._events is not None:
            for key, value in results.items():
                self._events.add_scalar(f"Metrics/{key}", value, global_step=cur_nimg)

    def close(self) -> None:
        """Flush and close all files."""
        if self._is_main:
            self._bar.close()
            self._text.close()
            self._stats.close()
            if self._events is not None:
                self._events.close()


def _open_tensorboard(run_dir: Path) -> Any:
    """A TensorBoard writer, or None, said once, where the tensorboard package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("Note: no TensorBoard events, because tensorboard is not installed (pip install tensorboard).")
        return None
    return SummaryWriter(str(run_dir))
