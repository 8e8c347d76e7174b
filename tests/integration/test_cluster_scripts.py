# SPDX-License-Identifier: MIT
"""The scripts of docs/cluster, run by bash with stand-ins for SLURM's commands and for train.py; two gloo processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))

SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
echo "srun: $*"
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo "127.0.0.1"; else echo "scontrol $*" >> "$SCONTROL_LOG"; fi
"""
TRAIN = """
import sys, time
import click, torch
from torch_utils import distributed
from training.launch import launch, must_launch
from training.processes import join_processes, run_command
from training.stopping import StopRequest

@click.command()
@click.option("--gpus", type=int)
@click.option("--resume")
@click.option("--ladder")
@click.option("--seconds", type=float)
def main(gpus, resume, ladder, seconds):
    if must_launch(gpus):
        sys.exit(launch(gpus))
    join_processes("cpu")
    print(f"training on {distributed.world_size()}, resume {resume}, ladder {ladder}", flush=True)
    with StopRequest() as stop:
        while seconds > 0:
            time.sleep(0.1)
            seconds -= 0.1
            if reason := stop.poll():
                print(f"saved: {stop.cause}", flush=True)
                sys.exit(reason.exit_code)

run_command(main)
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """start(script, *arguments) -> the running script, on a SLURM of one machine and two processes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "train.py").write_text(TRAIN)
    variables = {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "TRAIN": str(tmp_path / "train.py"),
        "EXIT_FOLDER": str(tmp_path),
        "GPUS": "2",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1",
        "SLURM_ARRAY_JOB_ID": "40",
        "SLURM_ARRAY_TASK_ID": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    started = []

    def start(name: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["bash", str(FOLDER / name), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def requeued(tmp_path: Path) -> list[str]:
    log = tmp_path / "scontrol.log"
    return log.read_text().splitlines() if log.exists() else []


def read_until(process: subprocess.Popen[str], words: str) -> str:
    lines = ""
    for line in process.stdout:
        lines += line
        if words in line:
            return lines
    raise AssertionError(lines)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_bash_understands_the_script(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "#SBATCH --requeue" in text and "--signal=B:USR1@" in text


def test_all_scripts_are_tested():
    assert {script.name for script in SCRIPTS} == {
        "slurm_one_node.sbatch",
        "slurm_many_nodes.sbatch",
        "slurm_stages.sbatch",
    }


def test_one_node_is_requeued_after_the_warning(cluster, tmp_path):
    process = cluster("slurm_one_node.sbatch", "--seconds", "600")
    assert "training on 2, resume auto" in read_until(process, "training on")
    time.sleep(1)
    process.send_signal(signal.SIGUSR1)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "saved: SIGUSR1" in text
    assert requeued(tmp_path) == [f"scontrol requeue {os.getpid()}"]


@pytest.mark.slow
def test_one_node_that_finishes_or_fails_is_not_requeued(cluster, tmp_path):
    finished = cluster("slurm_one_node.sbatch", "--seconds", "0.2")
    assert "training on 2" in finished.communicate(timeout=120)[0] and finished.returncode == 0
    failed = cluster("slurm_one_node.sbatch", "--no-such-flag")
    assert "No such option" in failed.communicate(timeout=120)[0] and failed.returncode == 2
    assert requeued(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_many_nodes_are_requeued_after_the_warning(cluster, tmp_path, number):
    """torchrun says 1; the script finds 75 in the file."""
    process = cluster("slurm_many_nodes.sbatch", "--seconds", "600")
    assert "training on 2, resume auto" in read_until(process, "training on")
    time.sleep(1)
    process.send_signal(number)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "saved: SIGTERM" in text
    assert requeued(tmp_path) == [f"scontrol requeue {os.getpid()}"]


@pytest.mark.slow
def test_many_nodes_that_finish_are_not_requeued(cluster, tmp_path):
    process = cluster("slurm_many_nodes.sbatch", "--seconds", "0.2")
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and re.search(r"srun: torchrun --nnodes=1 --nproc-per-node=2", text)
    assert requeued(tmp_path) == []


@pytest.mark.slow
def test_array_trains_the_stage_of_its_task(cluster, tmp_path):
    process = cluster("slurm_stages.sbatch", "a-16", "a-32", "--", "--seconds", "600")
    assert "training on 2, resume None, ladder a-32" in read_until(process, "training on")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75 and requeued(tmp_path) == ["scontrol requeue 40_1"]


def test_array_larger_than_its_stages(cluster):
    process = cluster("slurm_stages.sbatch", "a-16", "--", "--seconds", "1")
    assert "task 1 of the array, but 1 stages: --array=0-0%1" in process.communicate(timeout=60)[0]
    assert process.returncode == 1
