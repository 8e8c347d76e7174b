# SPDX-License-Identifier: MIT
"""Small real runs of train.py for fault injection: start one, hurt it, start it again, compare what it leaves."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
# 2,600 images in 163 steps, some twenty states and five snapshots, on small networks: a start takes most of the time.
DCGAN = shlex.split("""--loss san --cfg dcgan --objective hinge --data digits --cond 1 --cbase 8 --cmax 16 --batch 16
    --kimg 2.6 --tick 0.12 --checkpoint 1 --snap 4 --metrics none --workers 0 --device cpu""")
# Two StyleGAN-XL layers on 8x8 digits with the real projected discriminator: 24 steps.
STYLEGAN_XL = shlex.split("""--loss san --preset digits-8 --batch 8 --kimg 0.192 --tick 0.032 --checkpoint 1 --snap 2
    --metrics none --workers 0 --device cpu --embedding random""")
TIMEOUT_S = 240.0  # a run that takes longer hangs
DOWN_S = 60.0  # all processes of a job must have ended so long after one of them failed
VARYING = ("Timing/", "Resources/", "timestamp")  # statistics that no two runs share


@dataclass
class Counts:
    """What a fault test found out; the sum over all tests is the table in docs/reliability.md."""

    faults: int = 0  # injected
    steps_lost: int = 0  # beyond the last state that was complete when the fault came
    files_lost: int = 0  # networks, states and log lines that had been there
    hangs: int = 0  # runs that did not end in time
    down_s: float = 0.0  # longest time from a fault to the end of all processes, where the job is to end


hung: list[str] = []  # the output of every run so far that did not end, or come as far as it must, in time


@dataclass
class Run:
    """A started train.py and its children."""

    process: subprocess.Popen[str]
    log: Path
    started_at: float = field(default_factory=time.time)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code. TimeoutError if it hangs; it is killed then."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.give_up(f"still there after {timeout_s:g} s")

    def give_up(self, reason: str) -> None:
        """Kill it and raise TimeoutError."""
        self.kill_all()
        hung.append(self.output)
        raise TimeoutError(f"{reason}:\n{self.output}")

    def children(self) -> list[psutil.Process]:
        """Its ranks, by rank, if it started any."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = [
                p for p in psutil.Process(self.process.pid).children() if "train.py" in " ".join(p.cmdline())
            ]
            return sorted(found, key=lambda p: int(p.environ().get("RANK", 0)))
        return []

    def kill_all(self) -> None:
        """SIGKILL for it and whatever it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [
                *psutil.Process(self.process.pid).children(recursive=True),
                psutil.Process(self.process.pid),
            ]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


def start(
    outdir: Path, *flags: str, recipe: Sequence[str] = DCGAN, command: Sequence[str] = (), **environment: str
) -> Run:
    """Start `train.py` with a recipe and further flags.

    command: what starts it instead of this Python (torchrun). environment: further variables.
    """
    outdir.mkdir(parents=True, exist_ok=True)
    log = outdir.parent / f"output-{time.time_ns()}.txt"
    # Bit for bit needs the same number of threads; every rank has one core at most anyway.
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **threads, **environment}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*(command or [sys.executable]), str(ROOT / "train.py"), *recipe, "--outdir", str(outdir), *flags],
            stdout=file, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
    return Run(process, log)


def run_to_end(outdir: Path, *flags: str, recipe: Sequence[str] = DCGAN) -> Path:
    """Train without a fault; returns the run folder."""
    run = start(outdir, *flags, recipe=recipe)
    code = run.wait()
    assert code == 0, run.output
    return only_run(outdir)


def only_run(outdir: Path) -> Path:
    """The run folder in `outdir`; there must be one."""
    (run_dir,) = [path for path in outdir.iterdir() if path.is_dir() and re.match(r"\d{5}-", path.name)]
    return run_dir


def wait_until(condition: Callable[[], Any], run: Run, timeout_s: float = TIMEOUT_S) -> bool:
    """Poll until the condition holds (True) or the run has ended (False). TimeoutError if neither happens."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        if run.process.poll() is not None:
            return bool(condition())
        time.sleep(0.002)
    return run.give_up(f"nothing happened within {timeout_s:g} s")


def states(outdir: Path) -> dict[int, Path]:
    """Complete states of the run in `outdir`, by images seen."""
    return {int(p.stem.rpartition("-")[2]): p for p in sorted(outdir.glob("*/checkpoints/state-*.pt"))}


def newest(outdir: Path) -> int:
    """Images seen at the newest complete state of the run in `outdir`; 0 = there is none."""
    return max(states(outdir), default=0)


def start_until_state(outdir: Path, *flags: str, **settings: Any) -> Run:
    """Start or go on, and return in the midst of training, as soon as there is a further complete state."""
    before = newest(outdir)
    run = start(outdir, "--resume", "auto", *flags, **settings)
    assert wait_until(lambda: newest(outdir) > before, run) and run.process.poll() is None, run.output
    return run


def go_on(outdir: Path, counts: Counts, *flags: str, **settings: Any) -> Run:
    """Start again after a fault, train to the end, and count what the fault has cost."""
    before = Left.by(outdir)
    run = start(outdir, "--resume", "auto", *flags, **settings)
    assert run.wait() == 0, run.output
    before.count_losses(counts, run)
    return run


@dataclass(frozen=True)
class Left:
    """What a run has left at a fault."""

    outdir: Path
    newest: int  # images seen at its newest complete state
    files: frozenset[str]  # names in its folder, apart from temporary files and states

    @classmethod
    def by(cls, outdir: Path) -> Left:
        """What is there now."""
        names = (path.name for path in outdir.glob("[0-9]*-*/*") if path.is_file())
        return cls(outdir, newest(outdir), frozenset(name for name in names if not name.startswith(".")))

    def count_losses(self, counts: Counts, run: Run) -> None:
        """Add what is missing once the run has gone on: steps before the newest state, and files."""
        batch = int(run.process.args[run.process.args.index("--batch") + 1])
        counts.steps_lost += math.ceil((self.newest - continued_at(run)) / batch)
        counts.files_lost += len(self.files - Left.by(self.outdir).files)


def continued_at(run: Run) -> int:
    """Images seen where a run says that it went on; 0 = it began."""
    found = re.findall(r"Continued at ([\d.]+) kimg", run.output)
    return round(float(found[-1]) * 1000) if found else 0


def is_writing_state(outdir: Path) -> bool:
    """Whether a state is half-way on the disk."""
    return any(outdir.glob("*/checkpoints/.state-*"))


def stats_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of stats.jsonl without what is different in every run. Every one must parse."""
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if not name.startswith(VARYING)} for line in lines]


def last_state(run_dir: Path) -> dict[str, Any]:
    """The newest complete state, without times."""
    path = max((run_dir / "checkpoints").glob("state-*.pt"))
    state = torch.load(path, weights_only=True)
    state["others"]["clock"].pop("total_seconds")
    return state


def differences(a: Any, b: Any, place: str = "", atol: float | None = None) -> Iterator[str]:
    """Where two states differ. atol: None = bit for bit."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            yield f"{place}: {sorted(map(str, a.keys() ^ b.keys()))}"
        for name in a.keys() & b.keys():
            yield from differences(a[name], b[name], f"{place}/{name}", atol)
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{place}: {len(a)} and {len(b)} entries"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{place}/{i}", atol)
    elif isinstance(a, torch.Tensor):
        is_same = (
            torch.equal(a, b) if atol is None else torch.allclose(a.double(), b.double(), rtol=0, atol=atol)
        )
        if not is_same:
            yield f"{place}: {(a.double() - b.double()).abs().max().item():.3g}"
    elif a != b:
        yield f"{place}: {str(a)[:80]} and {str(b)[:80]}"


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Networks, optimizers, counters and logs are equal bit for bit."""
    assert list(differences(last_state(run_dir), last_state(other))) == []
    assert stats_lines(run_dir) == stats_lines(other)
