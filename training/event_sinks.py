# SPDX-License-Identifier: MIT
"""Where scalars of a run go beside its own files: TensorBoard events, and Weights & Biases if asked for."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError

WANDB_ID_FILE = "wandb_run.txt"  # in the run folder: what the run is called there


class TensorBoardEvents:
    """A TensorBoard writer that outlives a full disk; nothing, said once, where the tensorboard package is missing."""

    def __init__(self, run_dir: Path, last_nimg: int, warn: Callable[[str], None]) -> None:
        """last_nimg: events of later steps, from an earlier part of the run, are hidden."""
        self._run_dir, self._warn = run_dir, warn
        self._first_step = last_nimg + 1
        self._writer: Any = None
        self._is_failing = False
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print(
                "Note: no TensorBoard events, because tensorboard is not installed (pip install tensorboard)."
            )
            return
        self._make_writer = SummaryWriter
        silence_event_threads()
        try:
            self._open()
        except OSError as error:
            self._fail(error)

    def write(self, values: dict[str, float], step: int) -> None:
        """Add scalars at a step. A step that the disk refuses is missing."""
        if self._writer is None and not self._is_failing:
            return
        try:
            if self._writer is None:
                self._open()
            for name, value in values.items():
                self._writer.add_scalar(name, value, global_step=step)
            self._writer.flush()
        except OSError as error:
            self._fail(error)
        else:
            self._is_failing, self._first_step = False, step + 1

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._fail(error)

    def _open(self) -> None:
        has_events = any(self._run_dir.glob("events.out.tfevents.*"))
        first_step = self._first_step if has_events else None
        self._writer = self._make_writer(str(self._run_dir), purge_step=first_step)

    def _fail(self, error: OSError) -> None:
        if not self._is_failing:
            self._warn(f"TensorBoard events in {self._run_dir} cannot be written ({error.strerror})")
        self._writer, self._is_failing = None, True  # its thread has ended: the next write starts another


@functools.cache
def silence_event_threads() -> None:
    """TensorBoard's own thread hands what the disk refused to `write`, which says it in a line: no trace beside it."""
    previous = threading.excepthook

    def show(failure: threading.ExceptHookArgs) -> None:
        is_told = isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith(
            "tensorboard."
        )
        if not is_told:
            previous(failure)

    threading.excepthook = show


def import_wandb(project: str) -> Any:
    """The wandb package. UserError when it is missing."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"--wandb {project}: the wandb package is not installed; pip install wandb, or leave the flag out"
        ) from error
    return wandb


def open_wandb(project: str, run_dir: Path) -> Any:
    """The run of Weights & Biases that goes with a run folder: a new one, or the one that its parts before had.

    Its `log(values, step=)` and `finish()` are used. UserError when the package is missing or refuses.
    """
    wandb = import_wandb(project)
    path, options = run_dir / WANDB_ID_FILE, run_dir / "training_options.json"
    stored = path.read_text(encoding="utf-8").strip() if path.exists() else None
    config = json.loads(options.read_text(encoding="utf-8")) if options.exists() else None
    try:
        run = wandb.init(
            project=project, id=stored, resume="allow", name=run_dir.name, dir=str(run_dir), config=config
        )
    except wandb.Error as error:
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"--wandb {project}: {line}; run `wandb login`, or set WANDB_MODE=offline") from error
    with atomic_write(path) as temporary:
        temporary.write_text(run.id + "\n", encoding="utf-8")
    return run
