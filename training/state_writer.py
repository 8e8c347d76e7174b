# SPDX-License-Identifier: MIT
"""Writes a run's complete states while training goes on: a step waits for a copy in memory, not for the disk.

Whatever the file system answers, the run goes on and older states stay: they go only after a newer one has been read
back. Only the main process writes; on the others every method does nothing.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_utils.checkpoint import remove_temporary_files
from torch_utils.distributed import is_main
from training.state_file import list_states, state_path, write_state


class StateWriter:
    """Keeps the newest `keep_last` states of a run in a folder. One is written at a time.

    saved_nimg: images seen at the newest state that is known to be safe on the disk; None = there is none yet.
    """

    def __init__(
        self, folder: Path, keep_last: int, warn: Callable[[str], None] = print, saved_nimg: int | None = None
    ) -> None:
        """warn: gets lines about what failed, from the thread that calls `poll`. saved_nimg: of a run that goes on.

        Raises ValueError unless keep_last is at least 1.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least one state must be kept")
        self.folder, self.keep_last, self.saved_nimg = folder, keep_last, saved_nimg
        self._warn, self._is_main = warn, is_main()
        self._messages: list[str] = []
        self._buffers: dict[str, Tensor] = {}  # on the CPU, used again by every state
        self._thread: threading.Thread | None = None
        if self._is_main:
            remove_temporary_files(folder)

    def submit(self, nimg: int, state: dict[str, Any]) -> None:
        """Copy a state of `capture` and write it in the background. Waits first for the one before, if need be.

        Its tensors may change as soon as this returns.
        """
        if not self._is_main:
            return
        self.finish()
        if not self._has_space(nimg, state):
            return
        copy = self._copy(state, "")
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies from a GPU are in the background too
        # Not a daemon: a run that ends by an error still completes the state that it had begun to write.
        self._thread = threading.Thread(
            target=self._write, args=(nimg, copy), name="state writer", daemon=False
        )
        self._thread.start()

    def poll(self) -> None:
        """Tell what has failed since the last call."""
        while self._messages:
            self._warn(self._messages.pop(0))

    def finish(self) -> None:
        """Wait until the state that is being written, if any, is on the disk or has failed; then `poll`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def _write(self, nimg: int, state: dict[str, Any]) -> None:
        """The background thread. Nothing may escape from it."""
        path = state_path(self.folder, nimg)
        try:
            write_state(path, state)
        except Exception as error:  # a run must not die of its checkpoints, whatever the reason
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._messages.append(
                f"Warning: {path} could not be written ({reason}). {self._describe_last()} "
                "The run goes on and tries again at the next checkpoint."
            )
            return
        self.saved_nimg = nimg
        try:
            self._prune(nimg)
        except OSError as error:
            self._messages.append(f"Warning: an old state could not be removed ({error}).")

    def _prune(self, nimg: int) -> None:
        """Remove all but the last states up to this one.

        Those of later images are damaged, since the run went on from before them, or belong to steps since undone.
        """
        states = list_states(self.folder)
        for later in [other for other in states if other > nimg]:
            self._messages.append(
                f"Note: {states[later]} belongs to steps that are trained again; it was removed."
            )
            states.pop(later).unlink(missing_ok=True)
        for path in list(states.values())[self.keep_last :]:
            path.unlink(missing_ok=True)

    def _has_space(self, nimg: int, state: dict[str, Any]) -> bool:
        """False, with a warning, if the state surely does not fit; a folder that cannot be asked is tried."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError:
            return True  # write_state will say what is wrong
        needed = sum(tensor.nbytes for tensor in _tensors(state))
        if needed > free:
            self._warn(
                f"Warning: no state is saved at {nimg / 1000:g} kimg: it needs {needed / 2**20:.0f} MiB, and "
                f"{self.folder} has {free / 2**20:.0f} MiB left. {self._describe_last()}"
            )
        return needed <= free

    def _describe_last(self) -> str:
        if self.saved_nimg is None:
            return "There is no earlier one."
        return f"The last good one, at {self.saved_nimg / 1000:g} kimg, is intact."

    def _copy(self, value: Any, name: str) -> Any:
        """The same nest of dictionaries and lists, with tensors on the CPU that nobody else changes."""
        if isinstance(value, dict):
            return {key: self._copy(part, f"{name}/{key}") for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._copy(part, f"{name}/{index}") for index, part in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(value, non_blocking=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
