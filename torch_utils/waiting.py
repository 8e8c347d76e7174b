# SPDX-License-Identifier: MIT
"""How long this process waits for the others in collective operations: whoever waits least is the slowest.

On CUDA the wait happens on the device: a pair of events around each operation measures it without a synchronisation.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

MAX_PENDING = 512  # pairs of events kept; finished ones are added up when there are more


class WaitClock:
    """Adds up the seconds spent inside collective operations."""

    def __init__(self) -> None:
        self.is_waiting = False  # whether this process is inside one now, as far as the host can see
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Around a collective operation on tensors of `device`."""
        self.is_waiting = True
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self.is_waiting = False
            if device.type == "cuda":
                end.record()
                self._pending.append((start, end))
                if len(self._pending) > MAX_PENDING:
                    self._add_finished()
            else:
                self._seconds += time.perf_counter() - started_at

    def take_seconds(self) -> float:
        """Seconds since the last call. On CUDA waits for the operations measured: call it where that does no harm."""
        if self._pending:
            self._pending[-1][1].synchronize()
            self._add_finished()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_finished(self) -> None:
        rest = []
        for start, end in self._pending:
            if end.query():
                self._seconds += start.elapsed_time(end) / 1000
            else:
                rest.append((start, end))
        self._pending = rest


CLOCK = WaitClock()  # one per process, as there is one default process group
