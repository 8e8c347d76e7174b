# SPDX-License-Identifier: MIT
"""No rank waits for ever for one that failed: a thread in each process that hears of the others and ends its own.

It speaks through the store that torchrun (or `train.py --gpus`) keeps, over a connection of its own, so it works while
the main thread is stuck in a collective operation. With one process there is none, and all functions do nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from torch_utils.distributed import gather_objects, world_size
from torch_utils.process_environment import ProcessEnvironment, host_name
from torch_utils.waiting import CLOCK
from training.mailbox import CONTACT_S, Failure, Mailbox
from training.peer_report import Beat, Limits, Listener, slow_rank_message
from training.stopping import PEER_FAILED

LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "STYLESAN_LAUNCHER")  # set = the parent process is the launcher
SPEED_VARIABLE = "STYLESAN_WATCHDOG_SPEED"  # divides all time limits: for tests
ORPHAN_GRACE_S = 120.0  # to save and stop once the launcher has gone
ACKNOWLEDGE_S = 3.0  # a failed rank waits so long for rank 0 to have shown its message
ROOT = Path(__file__).resolve().parents[1]


def limits_from_environment() -> Limits:
    """The usual limits, divided by STYLESAN_WATCHDOG_SPEED."""
    speed = float(os.environ.get(SPEED_VARIABLE, "1"))
    return Limits(**{name: value / speed for name, value in asdict(Limits()).items()})


class Watchdog:
    """The thread, and what the main thread tells it."""

    def __init__(self, environment: ProcessEnvironment, limits: Limits | None = None) -> None:
        self.environment, self.limits = environment, limits or limits_from_environment()
        self.rank = environment.rank
        self.beat = Beat(host=host_name(), pid=os.getpid())  # the last one sent; only the thread changes it
        self.iteration, self.activity = 0, "starting"  # only the main thread changes them
        self._parent = os.getppid()
        self._main_thread = threading.main_thread().ident
        self._stopped = threading.Event()
        self._orphaned_at: float | None = None
        self._last_contact = time.monotonic()
        self._mailbox = Mailbox(environment)
        first = environment.rank - environment.local_rank  # torchrun numbers machine by machine
        neighbours = range(first, min(first + environment.local_world_size, environment.world_size))
        heard = range(environment.world_size) if self.rank == 0 else {0, *neighbours}
        self._listener = Listener([r for r in sorted(heard) if r != self.rank], self.limits)
        self._neighbours = [r for r in neighbours if r != self.rank]
        self._mailbox.expect(self._listener.ranks)
        self._rounds = 0  # in which the store has answered
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._guard = threading.Thread(target=self._watch_store, name="watchdog of the store", daemon=True)

    def start(self) -> None:
        """Begin to send and to listen."""
        self._send()  # at once: a rank that dies before its first heartbeat could not be missed
        self._thread.start()
        self._guard.start()

    def stop(self) -> None:
        """An orderly end: the others must not miss this rank."""
        self._stopped.set()
        self._thread.join(timeout=2 * CONTACT_S)
        with contextlib.suppress(RuntimeError):  # the store may have gone first
            self._mailbox.send_beat(replace(self.beat, is_leaving=True))

    def fail(self, message: str, is_common: bool = False) -> bool:
        """Tell everybody that this rank fails. True if it was the first, so that its error is the one to show.

        Returns when rank 0 has shown the message, at the latest after a few seconds.
        """
        lines = message.strip().splitlines() or ["failed"]
        failure = Failure(self.rank, host_name(), lines[0][:500], self.rank, is_common)
        try:
            is_first = self._mailbox.publish(failure)
            deadline = time.monotonic() + ACKNOWLEDGE_S
            while self.rank != 0 and time.monotonic() < deadline and not self._mailbox.has_flag("shown"):
                time.sleep(0.1)
        except RuntimeError:
            return True
        return is_first

    def await_verdict(self) -> None:
        """A connection to another rank broke: give its death the time to be noticed, which ends this process."""
        with contextlib.suppress(RuntimeError):
            self._mailbox.raise_flag("suspicion")
        time.sleep(self.limits.suspect_silence_s + 4 * self.limits.interval_s)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self.limits.interval_s):
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * self.limits.interval_s), now
            try:
                self._one_round(elapsed)
                self._last_contact = time.monotonic()
                self._rounds += 1
            except RuntimeError as error:  # of the store; torch has no narrower class in all versions
                self._lose_contact(error)
            self._look_for_launcher()

    def _one_round(self, elapsed_s: float) -> None:
        self._send()
        if failure := self._mailbox.read_failure():
            self._end(failure)
        self._listener.hear(self._mailbox.read_beats(self._listener.ranks), elapsed_s)
        self._judge(self._mailbox.has_flag("suspicion"))

    def _judge(self, is_suspicious: bool) -> None:
        listener, limits = self._listener, self.limits
        for rank in self._neighbours:
            beat = listener.beats.get(rank)
            if beat is not None and not beat.is_leaving and process_state(beat) is None:
                time.sleep(limits.interval_s)  # its own words, if there are any, go before ours
                if not self._has_left(rank):
                    self._accuse(rank, f"process {beat.pid} died without a word (killed, or out of memory)")
        silence_s = limits.suspect_silence_s if is_suspicious else limits.fail_silence_s
        for rank in listener.silent_ranks(silence_s):
            line = listener.describe_silence(rank).partition(") ")[2]
            state = process_state(listener.beats[rank]) if rank in self._neighbours else None
            cause = f"its process is {state}" if state else "it, its machine or the network is down or paused"
            self._accuse(rank, f"{line}: {cause}")
        if self.rank == 0:
            for line in [*listener.new_warnings(), *filter(None, [listener.stall_warning()])]:
                write_line(f"Warning: {line}")

    def _has_left(self, rank: int) -> bool:
        beat = self._mailbox.read_beats([rank])[rank]
        return beat is not None and beat.is_leaving

    def _accuse(self, rank: int, message: str) -> None:
        self._mailbox.publish(Failure(rank, self._listener.beats[rank].host, message, self.rank))
        if found := self._mailbox.read_failure():  # somebody may have been faster
            self._end(found)

    def _send(self) -> None:
        self.beat = replace(
            self.beat,
            count=self.beat.count + 1,
            iteration=self.iteration,
            activity=self.activity,
            is_waiting=CLOCK.is_waiting,
            where=place_of_thread(self._main_thread),
        )
        self._mailbox.send_beat(self.beat)

    def mark_shown(self) -> None:
        """Rank 0 has shown why the run ends."""
        with contextlib.suppress(RuntimeError):
            self._mailbox.raise_flag("shown")

    def _end(self, failure: Failure) -> None:
        """End this process because of another one's failure; of an own one the main thread takes care."""
        if failure.rank == self.rank and failure.reporter == self.rank:
            return
        if failure.is_common:  # the main thread is about to say the same, and says it better
            time.sleep(2 * self.limits.interval_s)
        if self._stopped.is_set():
            return
        if self.rank in (0, failure.reporter, failure.rank):
            write_line(failure.describe())
        if self.rank == 0:
            self.mark_shown()
        if failure.rank == failure.reporter:
            # It ends first: torchrun takes the first end for the cause.
            time.sleep(2 * self.limits.interval_s)
        end_process(PEER_FAILED)

    def _lose_contact(self, error: Exception) -> None:
        try:
            self._mailbox.connect()
        except RuntimeError:
            if time.monotonic() - self._last_contact < CONTACT_S or self._stopped.is_set():
                return
            self._end_alone(str(error).strip().splitlines()[0][:200])

    def _watch_store(self) -> None:
        """The second thread. The first waits without end where the network is cut without a word (torch 2.15)."""
        rounds, silence_s, last = 0, 0.0, time.monotonic()
        while not self._stopped.wait(self.limits.interval_s):
            now = time.monotonic()
            # A pause of this process is no silence of the store.
            silence_s += min(now - last, 2 * self.limits.interval_s)
            last = now
            if self._rounds != rounds:
                rounds, silence_s = self._rounds, 0.0
            elif silence_s >= self.limits.fail_silence_s:
                self._end_alone(f"no answer for {silence_s:.0f} s")

    def _end_alone(self, reason: str) -> None:
        """End this process because the others are out of reach."""
        environment = self.environment
        write_line(
            f"Error: rank {self.rank} (host {self.beat.host}) has lost {environment.master_addr}:"
            f"{environment.master_port}: the launcher there, rank 0, its machine or the network is down ({reason})"
        )
        end_process(PEER_FAILED)

    def _look_for_launcher(self) -> None:
        if os.getppid() == self._parent or not any(name in os.environ for name in LAUNCHER_VARIABLES):
            return
        if self._orphaned_at is None:
            self._orphaned_at = time.monotonic()
            write_line(f"Warning: rank {self.rank} (host {self.beat.host}): the launcher has gone; stopping")
            os.kill(os.getpid(), signal.SIGTERM)  # as if it had asked to: save and stop
        elif time.monotonic() - self._orphaned_at > ORPHAN_GRACE_S:
            end_process(PEER_FAILED)


_current: Watchdog | None = None


def start_watchdog(environment: ProcessEnvironment) -> None:
    """Start this process's watchdog. Once per process, as soon as the store answers."""
    global _current
    _current = Watchdog(environment)
    _current.start()


def current_watchdog() -> Watchdog | None:
    """This process's watchdog, None with one process."""
    return _current


def stop_watchdog() -> None:
    """An orderly end of this process is near."""
    global _current
    if _current is not None:
        _current.stop()
        _current = None


def note_iteration(iteration: int) -> None:
    """Tell the others how far this rank is: so many iterations are finished."""
    if _current is not None:
        _current.iteration, _current.activity = iteration, ""


@contextlib.contextmanager
def activity(name: str) -> Iterator[None]:
    """Around what may take long on some rank while the others wait ("evaluation"): no standstill is reported."""
    if _current is None:
        yield
        return
    watchdog, before = _current, _current.activity
    watchdog.activity = name
    try:
        yield
    finally:
        watchdog.activity = before


def find_slow_rank(elapsed_s: float) -> str | None:
    """A line that names a rank far slower than the others, or None. Every rank calls it at ticks.

    elapsed_s: this rank's seconds since the last call; what it spent in collective operations is taken off.
    """
    waiting_s = CLOCK.take_seconds()
    if world_size() == 1:
        return None
    everybody = gather_objects((max(elapsed_s - waiting_s, 0.0), host_name()))
    return slow_rank_message([busy for busy, _ in everybody], [host for _, host in everybody])


def process_state(beat: Beat) -> str | None:
    """What the process of a rank on this machine does ("running", "stopped"), None if it is no more."""
    try:
        state = psutil.Process(beat.pid).status()
    except psutil.NoSuchProcess:
        return None
    return None if state in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else state


def place_of_thread(ident: int | None) -> str:
    """Innermost line of this project that a thread of this process executes: "training/dataset.py:88 batch"."""
    frame = sys._current_frames().get(ident)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(f"{ROOT}{os.sep}") and Path(code.co_filename).name != "waiting.py":
            return f"{Path(code.co_filename).relative_to(ROOT)}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return ""


def write_line(text: str) -> None:
    """A line on stderr, past Python's buffers, whose locks another thread may hold."""
    with contextlib.suppress(OSError):
        end_of_bar = "\n" if os.isatty(2) else ""
        os.write(2, f"{end_of_bar}{text}\n".encode(errors="replace"))


def end_process(code: int) -> None:
    """End this process now, whatever its other threads are stuck in."""
    timer = threading.Timer(2.0, os._exit, [code])  # flushing may wait for ever
    timer.daemon = True
    timer.start()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
