# SPDX-License-Identifier: MIT
"""Time and memory of the metrics beside torch-fidelity, clean-fid and the official formulas written out.

    python tests/benchmarks/metrics.py --threads 2

Every row is a process of its own. Seconds are those of the formula alone, the best of three where it takes less than
three; memory is what the process's peak (of the operating system) grows by meanwhile, its input left out. Packages that
are not installed are named and left out. `--quick` takes seconds and shows nothing but that all rows run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from metric_ways import QUICK, TASKS, Sizes, Task, Way

from torch_utils.cpu import peak_memory

MAX_REPEATED_S = 3.0  # shorter runs are repeated
REPEATS = 3
MIB = 2**20


def run_row(task: Task, way: Way, sizes: Sizes, inputs: Path) -> dict[str, float]:
    """In a process of its own: seconds, MiB and the value."""
    warnings.simplefilter("ignore")
    importlib.import_module(way.needs)
    x = dict(np.load(inputs))
    before = peak_memory() / MIB
    seconds = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        value = way.run(x, sizes)
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > MAX_REPEATED_S:
            break
    return {"seconds": seconds, "mib": peak_memory() / MIB - before, "value": float(value)} | (
        {"truth": float(x["truth"])} if "truth" in x else {}
    )


def run_child(arguments: list[str], threads: int) -> tuple[str, str | None]:
    """(standard output, None or the last line of an error) of this script with `arguments`."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict.fromkeys(variables, str(threads))
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True
    )
    return done.stdout, None if done.returncode == 0 else (
        done.stderr.strip().splitlines() or ["no message"]
    )[-1]


def print_task(index: int, args: argparse.Namespace) -> None:
    """The rows of a task, as they come."""
    task, shared = TASKS[index], ["--quick"] if args.quick else []
    with tempfile.TemporaryDirectory() as folder:
        _, error = run_child([*shared, "--task", str(index), "--folder", folder], args.threads)
        if error is not None:
            raise SystemExit(f"{task.title}: no inputs: {error}")
        reference = None
        for number, way in enumerate(task.ways):
            row = ["--task", str(index), "--row", str(number), "--folder", folder]
            output, error = run_child([*shared, *row], args.threads)
            if error is not None:
                print(f"| {task.title} | {way.who} | left out: {error} | | | |", flush=True)
                continue
            found = json.loads(output.splitlines()[-1])
            reference = reference or found["seconds"]
            value = f"{found['value']:.8g}"
            if "truth" in found:
                value += f" (off by {abs(found['value'] / found['truth'] - 1):.0e})"
            times = f"{found['seconds']:.3g} | {found['seconds'] / reference:.1f}"
            print(f"| {task.title} | {way.who} | {times} | {found['mib']:.0f} | {value} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of every row")
    parser.add_argument("--quick", action="store_true", help="tiny inputs: seconds, for a test of the script")
    parser.add_argument("--only", default="", help="run the tasks whose name contains this")
    for name, kind in (("--task", int), ("--row", int), ("--folder", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # of the processes it starts
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes()
    if args.task is None:
        print(f"torch {torch.__version__}, {args.threads} threads\n")
        print("| task | computed by | seconds | times ours | MiB | value |")
        print("|---|---|---:|---:|---:|---|", flush=True)
        for index, task in enumerate(TASKS):
            if args.only in task.title:
                print_task(index, args)
        return
    inputs, task = args.folder / "inputs.npz", TASKS[args.task]
    if args.row is None:
        np.savez(inputs, **task.make(sizes, args.folder))
    else:
        print(json.dumps(run_row(task, task.ways[args.row], sizes, inputs)))


if __name__ == "__main__":
    main()
