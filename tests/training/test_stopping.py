# SPDX-License-Identifier: MIT
"""Signals and the time limit in one process; agreement between processes is in test_launch.py."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from training import stopping
from training.stopping import StopReason, StopRequest, ignore_stop_signals, launch_time


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # until Python has called the handler


@pytest.mark.parametrize(
    ("number", "reason", "code"),
    [
        (signal.SIGTERM, StopReason.SIGTERM, 75),
        (signal.SIGUSR1, StopReason.SIGUSR1, 75),
        (signal.SIGINT, StopReason.SIGINT, 130),
    ],
)
def test_signals_ask_to_stop(number, reason, code, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.poll() is None
        send(number)
        assert stop.poll() is reason and reason.exit_code == code
        assert stop.cause == f"{reason.name} received by rank 0"
    assert signal.getsignal(number) is before
    assert f"{reason.name}: saving after this iteration" in capfd.readouterr().err


def test_second_interrupt_stops_at_once(monkeypatch):
    with StopRequest() as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)  # the same Ctrl-C by another way
        assert stop.poll() is StopReason.SIGINT
        monkeypatch.setattr(stopping, "DEBOUNCE_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_interrupt_after_a_scheduler_signal_gives_the_code_of_the_interrupt():
    with StopRequest() as stop:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop.poll() is StopReason.SIGINT


def test_time_limit_leaves_room_for_the_longest_iteration_and_save():
    clock = Clock()
    stop = StopRequest(time_limit_s=1000, started_at=clock.now, clock=clock)
    for kind, seconds in (("iteration", 10), ("iteration", 2), ("save", 40), ("snapshot", 300)):
        with stop.timed(kind):
            clock.now += seconds
    assert stop.longest_s == {"iteration": 10, "save": 40, "snapshot": 300}
    last_start = 1000 + 1000 - stopping.SAFETY * (10 + 40) - stopping.RESERVE_S
    clock.now = last_start
    assert stop.poll() is None
    assert stop.poll("snapshot") is StopReason.TIME_LIMIT  # a long evaluation would not end in time
    clock.now = last_start + 0.1
    assert stop.poll() is StopReason.TIME_LIMIT and "--time-limit 1000 s" in stop.cause
    assert StopReason.TIME_LIMIT.exit_code == 75


def test_short_limits_leave_room_before_the_first_save():
    clock = Clock()
    stop = StopRequest(time_limit_s=100, started_at=clock.now, clock=clock)
    clock.now += 89
    assert stop.poll() is None
    clock.now += 2
    assert stop.poll() is StopReason.TIME_LIMIT


def test_no_limit_never_ends():
    clock = Clock()
    stop = StopRequest(clock=clock)
    clock.now += 1e9
    assert stop.poll() is None


def test_time_counts_from_the_launch(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    process = psutil.Process()
    assert launch_time() == process.create_time()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun may have started this process anew
    assert launch_time() == process.parent().create_time()


def test_helper_processes_outlive_the_signals_of_their_group():
    program = (
        "import os, signal; from training.stopping import ignore_stop_signals; ignore_stop_signals(0);"
        "[os.kill(os.getpid(), n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]; print('alive')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout == "alive\n" and ignore_stop_signals.__doc__
