# SPDX-License-Identifier: MIT
"""What a run writes for people and plots: log.txt, stats.jsonl, TensorBoard events, metric files, a progress bar.

Only the main process writes; on the others every method does nothing. A file that cannot be written never ends a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

from torch_utils.checkpoint import atomic_write, remove_temporary_files
from torch_utils.distributed import broadcast_object, is_main
from torch_utils.errors import UserError
from torch_utils.growing_file import GrowingFile
from training.durations import format_duration
from training.event_sinks import TensorBoardEvents, open_wandb
from training.metric_records import MetricRecord, metric_file
from training.relaunch import remember_run_folder
from training.run_options import RunOptions

LOCK = ".lock"  # in a run folder
LOCK_TIMEOUT_S = 10.0  # a run that was killed a moment ago may still be ending


def claim_run_dir(options: RunOptions, run_dir: Path | None) -> tuple[Path, FileLock]:
    """The folder to train in, made by the main process: the given one, or the next numbered one; and its lock.

    The main process holds the lock: two runs in one folder would overwrite each other. An attempt that torchrun starts
    again finds the folder by a note. Raises UserError when it cannot be written or another process trains in it.
    """
    if is_main():
        run_dir = (
            create_run_dir(options.outdir, options.description) if run_dir is None else open_run_dir(run_dir)
        )
    run_dir = broadcast_object(run_dir)
    lock = FileLock(run_dir / LOCK)
    if is_main():
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout as error:
            raise UserError(
                f"{run_dir}: another process trains in this folder; wait for its end, or start a new run"
            ) from error
        except (OSError, NotImplementedError):  # a file system without locks
            print(f"Note: {run_dir} cannot be locked; make sure that no other process trains in it.")
        remember_run_folder(options.outdir, run_dir)
        remove_temporary_files(run_dir)
    return run_dir, lock


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
    """Text, statistics and progress of one run, in its folder.

    Of a run that goes on, lines of steps that are trained again are cut; log.txt keeps everything.
    """

    def __init__(
        self,
        run_dir: Path,
        total_kimg: float,
        start_nimg: int = 0,
        earlier_seconds: float = 0.0,
        wandb_project: str | None = None,
    ) -> None:
        """start_nimg, earlier_seconds: images seen, and time taken, by the parts of the run before this one.

        Raises UserError for a project of Weights & Biases that cannot be logged to.
        """
        self.run_dir, self.total_nimg = run_dir, round(total_kimg * 1000)
        self.start_nimg, self.earlier_seconds = start_nimg, earlier_seconds
        self.start_time = time.time()
        self._is_main = is_main()
        if self._is_main:
            self._wandb = None if wandb_project is None else open_wandb(wandb_project, run_dir)
            last_nimg = start_nimg if start_nimg > 0 else -1  # a run that starts over has no line that counts
            cut_logs(run_dir, last_nimg)
            self._text = GrowingFile(run_dir / "log.txt", self._warn)
            self._stats = GrowingFile(run_dir / "stats.jsonl", self._warn)
            self._metrics: dict[str, GrowingFile] = {}
            self._events = TensorBoardEvents(run_dir, last_nimg, self._warn)
            self._bar = tqdm(
                total=self.total_nimg,
                initial=start_nimg,
                unit="img",
                unit_scale=True,
                smoothing=0.05,
                disable=not sys.stderr.isatty(),
            )

    def print(self, message: str) -> None:
        """Write a line to the terminal (above the progress bar) and to log.txt."""
        if self._is_main:
            self._bar.write(message)
            self._text.append(message)

    def advance(self, num_images: int) -> None:
        """Move the progress bar by so many images."""
        if self._is_main:
            self._bar.update(num_images)

    def total_seconds(self) -> float:
        """Time that the run has taken, in all its parts."""
        return self.earlier_seconds + time.time() - self.start_time

    def time_left(self, cur_nimg: int) -> str:
        """Time until the end at the mean speed of this part of the run, such as "3h05m"; "?" before its first step."""
        if cur_nimg <= self.start_nimg:
            return "?"
        seconds_per_image = (time.time() - self.start_time) / (cur_nimg - self.start_nimg)
        return format_duration(seconds_per_image * max(self.total_nimg - cur_nimg, 0))

    @contextlib.contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """Around the writing of files that a run can do without: if it fails, say so and go on."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            self.print(f"Warning: {what} could not be written ({reason}). The run goes on.")

    def write_stats(self, stats: dict[str, dict[str, float]], cur_nimg: int) -> None:
        """Append one line to stats.jsonl and the means to TensorBoard, at step `cur_nimg`."""
        if not self._is_main:
            return
        self._stats.append(json.dumps({"cur_nimg": cur_nimg, **stats, "timestamp": time.time()}))
        self._write_scalars({name: moments["mean"] for name, moments in stats.items()}, cur_nimg)

    def write_metric(self, record: MetricRecord, cur_nimg: int) -> None:
        """Append a line to metric-<name>.jsonl, and the values to TensorBoard at step `cur_nimg`."""
        if not self._is_main:
            return
        name = record.metric
        if name not in self._metrics:
            self._metrics[name] = GrowingFile(self.run_dir / metric_file(name), self._warn)
        self._metrics[name].append(record.to_json())
        self._write_scalars({f"Metrics/{key}": value for key, value in record.results.items()}, cur_nimg)

    def rewind(self, cur_nimg: int) -> None:
        """Forget the lines of steps beyond `cur_nimg` images, which are trained again."""
        if self._is_main:
            for file in (self._stats, *self._metrics.values()):
                file.flush()
            cut_logs(self.run_dir, cur_nimg)
            self._events.close()
            self._events = TensorBoardEvents(self.run_dir, cur_nimg, self._warn)
            self._bar.n = cur_nimg
            self._bar.refresh()

    def close(self) -> None:
        """Try once more to write what waits, and close everything."""
        if self._is_main:
            for file in (self._text, self._stats, *self._metrics.values()):
                file.flush()
            self._bar.close()
            self._events.close()
            if self._wandb is not None:
                self._wandb.finish()

    def _write_scalars(self, values: dict[str, float], cur_nimg: int) -> None:
        self._events.write(values, cur_nimg)
        if self._wandb is not None:
            # Steps that are trained again have the same numbers; it takes each step once, and drops these.
            self._wandb.log(values, step=cur_nimg)

    def _warn(self, problem: str) -> None:
        """On the terminal only: the log may be what cannot be written."""
        self._bar.write(f"Warning: {problem}. The run goes on; it is tried again with the next line.")


def cut_logs(run_dir: Path, last_nimg: int) -> None:
    """Remove what is not a line, and lines of more than `last_nimg` images, from stats.jsonl and metric-*.jsonl.

    Each file is replaced as a whole, or left alone. UserError when it cannot be rewritten.
    """
    for path in sorted([*run_dir.glob("stats.jsonl"), *run_dir.glob("metric-*.jsonl")]):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines() if 0 <= _nimg_of(line) <= last_nimg]
            if (wanted := "".join(f"{line}\n" for line in kept)) != text:
                with atomic_write(path) as temporary:
                    temporary.write_text(wanted, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path} holds lines of steps to be trained again, and cannot be rewritten ({error.strerror}); make "
                "room, or make the run folder writable"
            ) from error


def _nimg_of(line: str) -> int:
    """Images seen at a line of a log; -1 for what is not a whole line."""
    try:
        values = json.loads(line)
        if "cur_nimg" in values:
            return int(values["cur_nimg"])
        return round(
            values["Progress/kimg"]["mean"] * 1000
        )  # as lines were until the count had its own field
    except (ValueError, KeyError, TypeError):
        return -1
