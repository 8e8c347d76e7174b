# SPDX-License-Identifier: MIT
"""When a run stops before its end: signals and the time limit, agreed on by all ranks. And what it exits with.

Exit codes of train.py:

    0    trained to the end
    1    a mistake of the user, told in one line; 2 for a flag that does not exist
    69   ended because another process failed, whose own error tells why
    70   aborted: the numbers were no longer finite (--on-nonfinite)
    71   memory did not suffice; the message says what to lower
    75   stopped early with everything saved, by SIGTERM, SIGUSR1 or --time-limit: start again with --resume
    130  the same by SIGINT (Ctrl-C); also a second Ctrl-C, which does not wait for saving
    else a crash; 128 + n: killed by signal n
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import psutil

from torch_utils.distributed import agree_max, is_main, rank

FINISHED = 0
USER_ERROR = 1
PEER_FAILED = 69  # sysexits.h: a service is not available
ABORTED = 70  # internal error
STOPPED = 75  # temporary failure: try again
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
ORDERLY_CODES = (FINISHED, STOPPED, INTERRUPTED)  # all ranks end together

DEBOUNCE_S = 0.5  # launchers and schedulers may deliver one Ctrl-C twice
SAFETY = 1.5  # the next iteration or save may take so many times the longest so far
RESERVE_S = 5.0  # for closing logs and ending processes
FIRST_SAVE_SHARE, FIRST_SAVE_S = (
    0.05,
    60.0,
)  # before the first save: that share of the limit, but at most so long
_RANKS = 1 << 20  # more than there are


class StopReason(enum.IntEnum):
    """Why to stop; of several on different ranks the last of this list counts."""

    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGTERM = 3
    SIGINT = 4

    @property
    def exit_code(self) -> int:
        """What the process exits with after saving."""
        return INTERRUPTED if self is StopReason.SIGINT else STOPPED


class StopRequest:
    """Whether the run has been asked to stop. `with StopRequest(...) as stop:` around the training loop."""

    def __init__(
        self,
        time_limit_s: float | None = None,
        started_at: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """time_limit_s: None = no limit. started_at: when its time began, in seconds since 1970; None = when this
        process was launched, see `launch_time`."""
        self.time_limit_s, self._clock = time_limit_s, clock
        self.started_at = launch_time() if started_at is None else started_at
        self.longest_s: dict[str, float] = {}  # longest so far of each kind of work
        self.cause = ""  # for the log, once `poll` has given a reason
        self._received: StopReason | None = None
        self._last_sigint = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Around an "iteration", a "save" or other work before which `poll(kind)` asks whether time is left for it."""
        start = self._clock()
        yield
        self.longest_s[kind] = max(self.longest_s.get(kind, 0.0), self._clock() - start)

    def poll(self, upcoming: str = "iteration") -> StopReason | None:
        """Why to save and stop now instead of doing `upcoming`, or None. The same on all ranks, which must all call it.

        After a reason `cause` says it in words.
        """
        reason = self._received
        if reason is None and self.is_time_over(upcoming):
            reason = StopReason.TIME_LIMIT
        agreed = agree_max(0 if reason is None else reason * _RANKS + rank())
        if agreed == 0:
            return None
        reason, origin = StopReason(agreed // _RANKS), agreed % _RANKS
        self.cause = (
            f"--time-limit {self.time_limit_s:g} s is nearly over"
            if reason is StopReason.TIME_LIMIT
            else f"{reason.name} received by rank {origin}"
        )
        return reason

    def is_time_over(self, upcoming: str) -> bool:
        """Whether the limit could pass before `upcoming` and a save after it are finished."""
        if self.time_limit_s is None:
            return False
        left = self.started_at + self.time_limit_s - self._clock()
        first_save = min(FIRST_SAVE_S, FIRST_SAVE_SHARE * self.time_limit_s)
        save = self.longest_s.get("save", first_save / SAFETY)
        reserve = min(RESERVE_S, FIRST_SAVE_SHARE * self.time_limit_s)
        return left < SAFETY * (self.longest_s.get(upcoming, 0.0) + save) + reserve

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        reason = StopReason[signal.Signals(number).name]
        now = time.monotonic()
        if reason is StopReason.SIGINT:
            is_again = self._received is StopReason.SIGINT and now - self._last_sigint > DEBOUNCE_S
            self._last_sigint = now
            if is_again:
                raise KeyboardInterrupt
        if is_main() and self._received is None:
            once_more = "; once more stops at once" if reason is StopReason.SIGINT else ""
            with contextlib.suppress(OSError):  # not print(), which may have been interrupted half-way
                os.write(2, f"\n{reason.name}: saving after this iteration{once_more}.\n".encode())
        self._received = max(reason, self._received or reason)


def launch_time() -> float:
    """When the command of this run was started, in seconds since 1970: torchrun's own start if it started us.

    After an elastic restart the time limit still counts from there.
    """
    process = psutil.Process()
    parent = process.parent() if os.environ.get("TORCHELASTIC_RUN_ID") else None
    return (parent or process).create_time()


def ignore_stop_signals(_worker_id: int = 0) -> None:
    """For helper processes (`worker_init_fn` of a DataLoader): schedulers signal whole process groups, and a loader
    that dies of it would turn an orderly stop into a crash. They end with the process that they work for."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
