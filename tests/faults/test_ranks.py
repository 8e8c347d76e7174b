# SPDX-License-Identifier: MIT
"""Processes of a job that die, crash, stop or are cut off: the others end soon and say whose fault it is."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow
PEER_FAILED, OUT_OF_MEMORY = 69, 71
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SPEED = 4  # the watchdog's limits, divided by this: silence ends a job after 15 s instead of 60
PAUSE_S = 4.0


def check_down(harness, counts, run, *words: str) -> int:
    """All processes of the run end soon, and the output has the words; returns the exit code."""
    family = run.children()
    failed_at = time.monotonic()
    code = run.wait(harness.DOWN_S)
    for process in family:
        process.wait(max(failed_at + harness.DOWN_S - time.monotonic(), 0.1))
    counts.faults += 1
    counts.down_s = max(counts.down_s, time.monotonic() - failed_at)
    for word in words:
        assert re.search(word, run.output), (word, run.output)
    return code


def test_ranks_of_a_machine(harness, rows, straight_pair: Path, tmp_path: Path) -> None:
    """One run of two processes on one machine that is hurt four times."""
    outdir = tmp_path / "runs"

    counts = rows(f"A rank is paused for {PAUSE_S:g} s: the run survives")
    run = harness.start_until_state(outdir, "--gpus", "2")
    rank = run.children()[1]
    rank.suspend()
    time.sleep(PAUSE_S)
    rank.resume()
    before = harness.newest(outdir)
    assert harness.wait_until(lambda: harness.newest(outdir) > before, run) and run.process.poll() is None
    counts.faults += 1

    counts = rows("SIGKILL of a rank")
    rank.kill()
    words = (
        r"rank 1 \(host \S+\): process \d+ died without a word",
        r"rank 1 \(process \d+\) was killed by SIGKILL",
    )
    assert check_down(harness, counts, run, *words) == 128 + signal.SIGKILL

    left, out_of_memory = harness.Left.by(outdir), rows("A rank runs out of memory")
    run = harness.start_until_state(outdir, "--gpus", "2")
    left.count_losses(counts, run)
    rank = run.children()[1]
    rank.rlimit(resource.RLIMIT_AS, (rank.memory_info().rss // 2,) * 2)
    # Whichever request is refused first: not every library says that it is memory.
    words = r"rank 1 \(host \S+\)[^\n]*(memory|failed: )", r"\[rank 1\] "
    assert check_down(harness, out_of_memory, run, *words) in (1, OUT_OF_MEMORY)

    left, stopped = harness.Left.by(outdir), rows("SIGSTOP of a rank for good")
    run = harness.start_until_state(outdir, "--gpus", "2", STYLESAN_WATCHDOG_SPEED=str(SPEED))
    left.count_losses(out_of_memory, run)
    run.children()[1].suspend()
    words = (r"rank 1 \(host \S+\): has not been heard for \d+ s: its process is stopped",)
    assert check_down(harness, stopped, run, *words) == PEER_FAILED

    harness.go_on(outdir, stopped, "--gpus", "2")
    harness.assert_same_run(straight_pair, harness.only_run(outdir))


def test_torchrun_starts_again(harness, counts, straight_pair: Path, tmp_path: Path) -> None:
    """SIGKILL of a rank under torchrun --max-restarts, which starts all again."""
    outdir = tmp_path / "runs"
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    run = harness.start(outdir, command=command)  # without --resume
    for _ in range(2):
        before = harness.newest(outdir)
        assert harness.wait_until(lambda before=before: harness.newest(outdir) > before, run)
        left, victims = harness.Left.by(outdir), run.children()
        victims[-1].kill()
        counts.faults += 1
        assert harness.wait_until(
            lambda gone=victims: not any(p.is_running() for p in gone), run, harness.DOWN_S
        )
    assert run.wait() == 0, run.output
    left.count_losses(counts, run)
    assert run.output.count("Continued at") == 2
    harness.assert_same_run(straight_pair, harness.only_run(outdir))


def node(address: str, *more: str) -> list[str]:
    """torchrun on one of two machines; the first that comes keeps the store."""
    return [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={address}",
            "--rdzv-id=faults", *more]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_nodes(harness, outdir: Path) -> list:
    """Two launchers on this machine that are one job; returns when there is a further state."""
    before, address = harness.newest(outdir), f"127.0.0.1:{free_port()}"
    runs = [harness.start(outdir, "--resume", "auto", command=node(address, "--local-addr=127.0.0.1"))]
    assert harness.wait_until(lambda: is_open(address), runs[0])
    runs.append(harness.start(outdir, "--resume", "auto", command=node(address, "--local-addr=127.0.0.1")))
    assert harness.wait_until(lambda: harness.newest(outdir) > before, runs[0]), (
        runs[0].output + runs[1].output
    )
    return runs


def is_open(address: str) -> bool:
    host, _, port = address.partition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


def test_nodes(harness, rows, straight_pair: Path, tmp_path: Path) -> None:
    """Two torchrun launchers, each with one rank; all processes of one of them are killed, of each in turn."""
    outdir = tmp_path / "runs"
    earlier = None
    for victim, title in enumerate(("SIGKILL of the node that keeps the store", "SIGKILL of the other node")):
        left, counts = harness.Left.by(outdir), rows(title)
        runs = start_nodes(harness, outdir)
        if earlier is not None:
            left.count_losses(earlier, max(runs, key=harness.continued_at))
        runs[victim].kill_all()
        # The launcher that is left may be the first to notice: without the rendezvous it ends its rank itself.
        words = [r"rank \d.*(lost|heard|died)", "connection to the C10d store has failed"][: 2 - victim]
        assert check_down(harness, counts, runs[1 - victim], "|".join(words)) == 1
        earlier = counts
    harness.go_on(outdir, counts, "--gpus", "2")
    harness.assert_same_run(straight_pair, harness.only_run(outdir))


def has_ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.fixture
def two_networks() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces, connected by a cable: 10.77.0.1 and 10.77.0.2, both on device `cable`."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command")
    names = "stylesan-a", "stylesan-b"
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add cable netns {names[0]} type veth peer name cable netns {names[1]}",
        *(f"ip -n {name} addr add 10.77.0.{i}/24 dev cable" for i, name in enumerate(names, 1)),
        *(f"ip -n {name} link set {device} up" for name in names for device in ("lo", "cable")),
    ]
    try:
        for command in commands:
            if subprocess.run(command.split(), capture_output=True).returncode:
                pytest.skip(f"not permitted or not possible here: {command}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_network(harness, counts, two_networks, straight_pair: Path, tmp_path: Path) -> None:
    """The network between two nodes is cut, without a word to either."""
    outdir = tmp_path / "runs"
    settings = {"GLOO_SOCKET_IFNAME": "cable", "STYLESAN_WATCHDOG_SPEED": str(SPEED)}
    runs = []
    for number, name in enumerate(two_networks, 1):
        # Who keeps the store torch cannot find out here, where names are not resolved.
        torchrun = node(
            "10.77.0.1:29400", f"--local-addr=10.77.0.{number}", f"--rdzv-conf=is_host={number == 1}"
        )
        command = ["ip", "netns", "exec", name, *torchrun]
        runs.append(harness.start(outdir, "--resume", "auto", command=command, **settings))
    assert harness.wait_until(lambda: harness.newest(outdir) > 0, runs[0]), runs[0].output + runs[1].output
    subprocess.run(["ip", "-n", two_networks[0], "link", "set", "cable", "down"], check=True)
    cut_at = time.monotonic()
    ranks = [rank for run in runs for rank in run.children()]
    assert harness.wait_until(lambda: all(map(has_ended, ranks)), runs[1], harness.DOWN_S)
    counts.faults, counts.down_s = 1, time.monotonic() - cut_at
    for run in runs:
        run.kill_all()  # torchrun waits for its own store, on the side that has lost it for as long as TCP does
    assert re.search(r"rank 1 \(host \S+\): has not been heard for \d+ s", runs[0].output)
    assert re.search(r"rank 1 \(host \S+\) has lost 10.77.0.1:\d+: ", runs[1].output)
    harness.go_on(outdir, counts, "--gpus", "2")
    harness.assert_same_run(straight_pair, harness.only_run(outdir))
