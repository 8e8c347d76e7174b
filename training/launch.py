# SPDX-License-Identifier: MIT
"""`python train.py --gpus N`: the same command N times on this machine, with the environment that torchrun would set.

Rank 0 has the terminal. What the others print is kept back and shown if one of them is the first to fail. Signals go to
all; when one fails the others are stopped within seconds, and its exit code is the launcher's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO

import torch
import torch.distributed as dist

from torch_utils.process_environment import read_environment
from training.config import ConfigError
from training.stopping import ORDERLY_CODES, PEER_FAILED

ADDRESS = "127.0.0.1"
POLL_S = 0.1
OWN_WORDS_S = 4.0  # after a failure the others end by themselves, and say why, within this time
TERMINATE_S = 4.0  # then SIGTERM, and SIGKILL after so long
LAST_TO_LEAVE_S = 60.0  # ranks end together; one that stays behind so long hangs
KEPT_LINES = 200  # of the output of each rank but the first


def must_launch(num_processes: int | None, device: str = "cpu", is_dry_run: bool = False) -> bool:
    """Whether this process is to start others rather than train. num_processes: --gpus, None = absent.

    Raises ConfigError when --gpus contradicts torchrun, which has started this process, or there are fewer GPUs, unless
    device, --device, is cpu.
    """
    environment = read_environment()
    if environment is None:
        is_needed = (num_processes or 1) > 1 and not is_dry_run
        if is_needed and device != "cpu" and (found := torch.cuda.device_count()) < num_processes:
            raise ConfigError(
                f"--gpus {num_processes}, but PyTorch sees {found} GPUs on this machine; lower it, or add --device cpu"
            )
        return is_needed
    started = environment.local_world_size
    if num_processes not in (None, started):
        raise ConfigError(
            f"--gpus {num_processes}, but torchrun has started {started} processes on this machine; leave --gpus out"
        )
    return False


def launch(num_processes: int, command: Sequence[str] | None = None) -> int:
    """Run `command` (None = the one that started this process) as so many ranks; returns the exit code.

    It is 0 or that of the rank that failed first; 128 + n if signal n killed it.
    """
    command = [sys.executable, *sys.orig_argv[1:]] if command is None else list(command)
    store = dist.TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False)  # outlives any rank
    launcher = _Launcher()
    with launcher.forwarding_signals():
        try:
            for rank in range(num_processes):
                launcher.ranks.append(_Rank(rank, command, rank_variables(rank, num_processes, store.port)))
            return launcher.wait()
        finally:
            for rank in launcher.ranks:  # none is left but after a failure of the launcher itself
                _send(rank.process, signal.SIGKILL)


def rank_variables(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What a rank's environment has beside the launcher's own."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch: the launcher keeps the store, no rank starts one
        "TORCHELASTIC_RESTART_COUNT": "0",  # goes with it
        "STYLESAN_LAUNCHER": str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores // num_processes)),
    }


class _Rank:
    """One process, and what it printed last unless it has the terminal."""

    def __init__(self, rank: int, command: list[str], variables: Mapping[str, str]) -> None:
        self.rank = rank
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        pipe = {} if rank == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # A session of its own: Ctrl-C then reaches the launcher alone, which passes it on once.
        self.process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, start_new_session=True, **pipe
        )
        self._reader = threading.Thread(target=self._read, args=[self.process.stdout], daemon=True)
        if rank > 0:
            self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:  # a progress bar's returns to the beginning of the line are part of one
            self.lines.append(line.decode(errors="replace").rstrip("\n").rpartition("\r")[2])

    def output(self) -> list[str]:
        """The last lines it printed; complete once it has ended."""
        if self.rank > 0:
            self._reader.join(timeout=1.0)  # a child that it left behind may keep the pipe open
        return list(self.lines)


class _Launcher:
    """All ranks, until the last has ended."""

    def __init__(self) -> None:
        self.ranks: list[_Rank] = []
        self.ended: list[tuple[_Rank, int]] = []  # in the order of their ends
        self._has_sent_signals = False  # those that end from then on do so because of us

    def wait(self) -> int:
        """Until all have ended, by themselves or made to; shows what failed and returns the exit code."""
        deadlines = _Deadlines()
        running = list(self.ranks)
        while running:
            time.sleep(POLL_S)
            for rank in list(running):
                if (code := rank.process.poll()) is not None:
                    running.remove(rank)
                    self.ended.append((rank, PEER_FAILED if self._has_sent_signals and code < 0 else code))
                    deadlines.note_end(code)
            if (number := deadlines.due_signal()) is not None:
                self._has_sent_signals = True
                for rank in running:
                    _send(rank.process, number)
                    if number == signal.SIGKILL:
                        print(f"rank {rank.rank} did not end by itself and was killed", file=sys.stderr)
        return self._explain()

    def _explain(self) -> int:
        """Show the output of the rank whose fault it is, last; its exit code."""
        failures = [(rank, code) for rank, code in self.ended if code not in ORDERLY_CODES]
        causes = [(rank, code) for rank, code in failures if code != PEER_FAILED] or failures
        if not causes:
            return max((code for _, code in self.ended), default=0)
        rank, code = causes[0]
        sys.stdout.flush()
        for line in rank.output():
            print(f"[rank {rank.rank}] {line}", file=sys.stderr)
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; out of memory?" if name == "SIGKILL" else ""
            print(
                f"Error: rank {rank.rank} (process {rank.process.pid}) was killed by {name}{hint}",
                file=sys.stderr,
            )
        elif rank.rank > 0 and rank.lines:
            print(
                f"Error: rank {rank.rank} ended with exit code {code}; its last lines are above",
                file=sys.stderr,
            )
        return 128 - code if code < 0 else code

    @contextlib.contextmanager
    def forwarding_signals(self):
        """Pass each signal on, once per arrival, to every rank; a lost terminal asks them to stop, too."""

        def forward(number: int, _frame: FrameType | None) -> None:
            for rank in self.ranks:
                _send(rank.process, signal.SIGTERM if number == signal.SIGHUP else number)

        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
        previous = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Deadlines:
    """When the ranks that remain are sent which signal."""

    def __init__(self) -> None:
        self.next_at: float | None = None  # None = they may go on
        self.next_signal = signal.SIGTERM
        self._has_failed = False

    def note_end(self, code: int) -> None:
        """A rank has ended: soon after a failure, and some time after an orderly end, the others must have, too."""
        has_failed = code not in ORDERLY_CODES
        if self.next_at is None or (has_failed and not self._has_failed):
            self.next_at = time.monotonic() + (OWN_WORDS_S if has_failed else LAST_TO_LEAVE_S)
        self._has_failed |= has_failed

    def due_signal(self) -> signal.Signals | None:
        """The signal to send now, once."""
        if self.next_at is None or time.monotonic() < self.next_at:
            return None
        number = self.next_signal
        self.next_signal, self.next_at = signal.SIGKILL, time.monotonic() + TERMINATE_S
        return number


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
