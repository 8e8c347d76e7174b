# SPDX-License-Identifier: MIT
"""Two real processes on gloo, started by train.py's launcher or by torchrun: every fault ends both, and is named.

This file is also the program that the processes run: a loop of gradient averages that one rank disturbs. What is
marked slow takes seconds each, most of it three imports of torch, so more on a busy machine.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
import pytest
import torch

from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.process_environment import ProcessEnvironment
from training import watchdog
from training.config import ConfigError
from training.launch import must_launch, rank_variables
from training.peer_report import Limits
from training.processes import code_for_agent, join_processes, run_command
from training.stopping import StopRequest

ROOT = Path(__file__).parents[2]
LAUNCHER = (
    "import sys; from training.launch import launch; sys.exit(launch(2, [sys.executable, *sys.argv[1:]]))"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
slow = pytest.mark.slow
READY = "rank 0 is in its loop"


@click.command()
@click.option("--fault", default="none")
@click.option("--iterations", default=100_000)
@click.option("--limit", type=float)
def main(fault: str, iterations: int, limit: float | None) -> None:
    """What a training run does between two steps, and nothing of the steps."""
    join_processes("cpu")
    rank = distributed.rank()
    print(f"rank {rank} has joined", flush=True)
    if fault == "everybody's mistake" or (fault == "mistake" and rank == 1):
        raise UserError("images.zip is missing; copy it")
    parameter = torch.nn.Parameter(torch.zeros(10))
    with StopRequest(limit, started_at=time.time()) as stop:
        for iteration in range(iterations):
            with stop.timed("iteration"):
                parameter.grad = torch.ones(10)
                distributed.average_gradients_([parameter])
                time.sleep(0.01)
            watchdog.note_iteration(iteration + 1)
            if iteration == 10:
                print(f"rank {rank} is in its loop", flush=True)
            if iteration == 20 and rank == 1:
                disturb(fault)
            if reason := stop.poll():
                agreed = distributed.gather_objects(iteration)
                print(f"stopped at {agreed}: {stop.cause}", flush=True)
                sys.exit(reason.exit_code)
    print("finished", flush=True)


def disturb(fault: str) -> None:
    if fault == "crash":
        raise ValueError("no such thing")
    if fault == "exit":
        sys.exit(70)
    if fault in ("SIGKILL", "SIGSTOP", "SIGTERM"):
        os.kill(os.getpid(), signal.Signals[fault])


@dataclass
class Result:
    """What a command came to."""

    code: int  # of the launcher
    text: str  # both streams
    seconds: float  # until its end


@contextlib.contextmanager
def started(*arguments: str, starter: list[str], speed: float = 1.0) -> Iterator[subprocess.Popen[str]]:
    """A launcher and its ranks; nothing of them is left afterwards."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STYLESAN_WATCHDOG_SPEED": str(speed)}
    process = subprocess.Popen(
        [*starter, __file__, *arguments],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family = []
    try:
        yield process
        family = [p for p in psutil.process_iter(["cmdline"]) if is_ours(p, arguments)]
        assert not family, "processes are left"
    finally:
        for left in [*family, process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                left.kill()


def is_ours(process: psutil.Process, arguments: tuple[str, ...]) -> bool:
    command = process.info["cmdline"] or []
    return command[-len(arguments) - 1 :] == [__file__, *arguments] and process.pid != os.getpid()


def run(*arguments: str, starter: list[str] | None = None, speed: float = 1.0) -> Result:
    start = time.monotonic()
    with started(*arguments, starter=starter or [sys.executable, "-c", LAUNCHER], speed=speed) as process:
        text = process.communicate(timeout=120)[0]
    return Result(process.returncode, text, time.monotonic() - start)


@slow
def test_orderly_end():
    result = run("--iterations", "30")
    assert result.code == 0
    assert result.text.splitlines() == ["rank 0 has joined", READY, "finished"]  # rank 1 prints nothing


def test_crash_of_a_rank_ends_all_and_shows_its_trace():
    result = run("--fault", "crash")
    assert result.code == 1
    assert re.search(r"^Error: rank 1 \(host \S+\): ValueError: no such thing$", result.text, re.MULTILINE)
    trace = result.text.partition(") failed: ValueError: no such thing")[2]
    assert "[rank 1] Traceback" in trace and "in disturb" in trace
    assert result.text.rstrip().endswith("rank 1 ended with exit code 1; its last lines are above")
    assert "Connection" not in result.text  # what the other one saw of it is of no interest


def test_mistake_of_a_user_is_one_line():
    result = run("--fault", "everybody's mistake")
    assert result.code == 1
    assert result.text.splitlines() == ["rank 0 has joined", "Error: images.zip is missing; copy it"]


@slow
def test_mistake_that_one_machine_finds_is_one_line_with_its_name():
    result = run("--fault", "mistake", speed=2)
    assert result.code == 1
    lines = [line for line in result.text.splitlines() if line not in ("rank 0 has joined", READY)]
    assert len(lines) == 1
    assert re.fullmatch(r"Error: rank 1 \(host \S+\): images.zip is missing; copy it", lines[0])


@slow
def test_unknown_flag_is_told_once():
    result = run("--nothing")
    assert result.code == 2 and result.text.count("No such option") == 1


def test_rank_killed_without_a_word_is_named_within_seconds():
    with started("--fault", "SIGKILL", starter=[sys.executable, "-c", LAUNCHER]) as process:
        while READY not in process.stdout.readline():
            pass
        start = time.monotonic()
        text = process.communicate(timeout=60)[0]
        assert time.monotonic() - start < 15
    assert process.returncode == 128 + signal.SIGKILL
    assert re.search(r"rank 1 \(host \S+\): process \d+ died without a word", text)
    assert re.search(r"rank 1 \(process \d+\) was killed by SIGKILL", text)


@slow
def test_paused_rank_is_named_and_the_run_ends():
    result = run("--fault", "SIGSTOP", speed=5)
    assert result.code == watchdog.PEER_FAILED
    assert re.search(r"Warning: rank 1 \(host \S+, process \d+\) has not been heard for 2 s", result.text)
    assert re.search(
        r"Error: rank 1 \(host \S+\): has not been heard for 12 s: its process is stopped", result.text
    )


@slow
def test_short_pause_is_survived():
    with started("--iterations", "700", starter=[sys.executable, "-c", LAUNCHER], speed=5) as process:
        while READY not in process.stdout.readline():
            pass
        (rank,) = [
            p for p in psutil.Process(process.pid).children() if p.environ()["RANK"] == "1"
        ]  # not a loader process: it has none
        rank.suspend()
        time.sleep(4)
        rank.resume()
        text = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "has not been heard" in text and "is heard again" in text and "finished" in text


@slow
def test_exit_code_of_one_rank_is_that_of_all():
    result = run("--fault", "exit", speed=2)
    assert result.code == 70 and "rank 1" in result.text and "exit code 70" in result.text


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGUSR1, 75, marks=slow),
        pytest.param(signal.SIGINT, 130, marks=slow),
        pytest.param(signal.SIGHUP, 75, marks=slow),
    ],
)
def test_signals_reach_every_rank_once(number, code):
    with started(starter=[sys.executable, "-c", LAUNCHER]) as process:
        while READY not in process.stdout.readline():
            pass
        process.send_signal(number)
        text = process.communicate(timeout=60)[0]
    assert process.returncode == code
    name = "SIGTERM" if number == signal.SIGHUP else number.name
    first, second = re.search(rf"stopped at \[(\d+), (\d+)\]: {name} received by rank", text).groups()
    assert first == second
    assert text.count("saving after this iteration") == 1


@slow
def test_signal_to_one_rank_stops_all_at_the_same_iteration():
    result = run("--fault", "SIGTERM")
    assert result.code == 75
    first, second = re.search(
        r"stopped at \[(\d+), (\d+)\]: SIGTERM received by rank 1", result.text
    ).groups()
    assert first == second


@slow
def test_time_limit():
    result = run("--limit", "4")
    assert result.code == 75 and "--time-limit 4 s is nearly over" in result.text


@slow
def test_ranks_stop_when_the_launcher_is_killed():
    with started(starter=[sys.executable, "-c", LAUNCHER], speed=5) as process:
        while READY not in process.stdout.readline():
            pass
        process.kill()
        text = process.communicate(timeout=60)[0]  # rank 0 has the pipe until it ends
        time.sleep(3)
    assert "lost" in text or "the launcher has gone" in text


@slow
@pytest.mark.parametrize("fault", ["crash", "mistake", "SIGKILL", "SIGTERM", "none"])
def test_torchrun(fault, tmp_path, monkeypatch):
    exit_file = tmp_path / "code"
    monkeypatch.setenv("STYLESAN_EXIT_FILE", str(exit_file))
    result = run("--fault", fault, "--iterations", "60", starter=TORCHRUN, speed=2)
    root_cause = result.text.partition("Root Cause")[2]
    code = int(exit_file.read_text()) if exit_file.exists() else None
    if fault == "none":
        assert (result.code, code) == (0, 0) and "finished" in result.text
    else:
        assert result.code == 1  # torchrun's, whatever ours is
    if fault == "crash":
        assert "rank      : 1 " in root_cause and "ValueError: no such thing" in root_cause
    if fault == "mistake":
        assert "traceback : images.zip is missing; copy it" in root_cause
    if fault == "SIGKILL":
        assert "rank      : 1 " in root_cause and "SIGKILL" in root_cause
    if fault == "SIGTERM":
        assert code == 75 and "start again with --resume" in root_cause


def test_interrupt_of_a_single_process_has_its_exit_code(monkeypatch, tmp_path, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("STYLESAN_EXIT_FILE", str(tmp_path / "code"))

    @click.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_command(interrupted)
    assert end.value.code == 130 and (tmp_path / "code").read_text() == "130\n"
    assert "Aborted!" in capsys.readouterr().err


def test_store_that_never_answers_ends_the_process(monkeypatch):
    """As when the network is cut without a word: torch's own time limit does not hold then."""
    is_over, ends, lines = threading.Event(), [], []

    class SilentMailbox:
        def __init__(self, _environment: ProcessEnvironment) -> None: ...
        def expect(self, _ranks: object) -> None: ...
        def send_beat(self, _beat: object) -> None: ...
        def read_beats(self, _ranks: object) -> dict:
            return {}

        def has_flag(self, _name: str) -> bool:
            return False

        def read_failure(self) -> None:
            is_over.wait()

    def end(code: int) -> None:
        ends.append(code)
        watched._stopped.set()
        is_over.set()

    monkeypatch.setattr(watchdog, "Mailbox", SilentMailbox)
    monkeypatch.setattr(watchdog, "end_process", end)
    monkeypatch.setattr(watchdog, "write_line", lines.append)
    limits = Limits(interval_s=0.01, fail_silence_s=0.2)
    watched = watchdog.Watchdog(ProcessEnvironment(1, 2, 0, 1, "10.0.0.1", 29500), limits)
    watched.start()
    assert is_over.wait(10)
    assert ends == [watchdog.PEER_FAILED]
    assert re.search(r"rank 1 \(host \S+\) has lost 10.0.0.1:29500: .*no answer for", lines[0])


def test_who_launches(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert [must_launch(n) for n in (None, 1, 2)] == [False, False, True]
    assert not must_launch(2, is_dry_run=True)
    for name, value in rank_variables(1, 4, 29500).items():
        monkeypatch.setenv(name, value)
    assert not must_launch(None) and not must_launch(4)
    with pytest.raises(ConfigError, match="--gpus 2, but torchrun has started 4 processes"):
        must_launch(2)


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(12)))
    assert rank_variables(0, 4, 1)["OMP_NUM_THREADS"] == "3"
    assert rank_variables(0, 99, 1)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rank_variables(0, 4, 1)["OMP_NUM_THREADS"] == "7"


def test_a_torchrun_that_restarts_is_not_told_of_a_requested_stop(monkeypatch):
    for name, value in rank_variables(0, 2, 29500).items():
        monkeypatch.setenv(name, value)
    plain = watchdog.ProcessEnvironment(0, 2, 0, 2, "a", 1)
    elastic = watchdog.ProcessEnvironment(0, 2, 0, 2, "a", 1, max_restarts=3)
    assert [code_for_agent(plain, code) for code in (0, 75, 130, 70)] == [0, 75, 130, 70]
    assert [code_for_agent(elastic, code) for code in (0, 75, 130, 70)] == [0, 0, 0, 70]


if __name__ == "__main__":
    run_command(main)
