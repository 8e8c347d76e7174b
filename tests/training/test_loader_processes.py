# SPDX-License-Identifier: MIT
"""Loader processes that are killed, hang or raise: the same batches all the same; and the start at a late position."""

import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from training import data_loader
from training import dataset as dataset_module
from training.data_faults import is_worker_loss
from training.data_loader import InfiniteSampler, make_loader
from training.dataset import open_dataset
from training.dataset_labels import DatasetError


@pytest.fixture(autouse=True)
def large_sets(monkeypatch):
    """Every set counts as too large to decode when opened, or to read its headers."""
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(dataset_module, "MAX_HEADERS_CHECKED", 0)


@pytest.fixture
def make_set(write_dataset):
    """make_set(count) -> path of a zip of `count` 8x8 images with a class each."""

    def make(count: int):
        rng = np.random.default_rng(0)
        names = [f"{i:04d}.png" for i in range(count)]
        files = {n: rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for n in names}
        return write_dataset("set.zip", files, {n: i for i, n in enumerate(names)})

    return make


def take(loader, count: int):
    return [next(loader) for _ in range(count)]


def assert_same(batches, expected) -> None:
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(batch, other, strict=True))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_worker_is_survived_with_the_same_batches(make_set, num_workers):
    dataset = open_dataset(make_set(40), use_labels=True)
    expected = take(make_loader(dataset, InfiniteSampler(40, seed=3), 4), 12)
    warnings: list[str] = []
    before = set(multiprocessing.active_children())
    loader = make_loader(dataset, InfiniteSampler(40, seed=3), 4, num_workers, warn=warnings.append)
    got = take(loader, 3)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == num_workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(10)
    sum(range(1_000_000))  # PyTorch's own handler would raise here, or in the midst of a training step
    got += take(loader, 9)
    assert_same(got, expected)
    assert loader.position == 48
    assert len(warnings) == 1 and "was lost at image " in warnings[0] and "exited unexpectedly" in warnings[0]


def test_a_process_that_dies_again_and_again_ends_the_run(make_set, monkeypatch):
    dataset = open_dataset(make_set(40))
    monkeypatch.setattr(data_loader, "MAX_RESTARTS", 1)
    monkeypatch.setattr(
        data_loader, "collate", lambda _items: os.kill(os.getpid(), signal.SIGKILL)
    )  # in the worker, which was forked
    warnings: list[str] = []
    loader = make_loader(dataset, InfiniteSampler(40), 4, num_workers=1, warn=warnings.append)
    with pytest.raises(DatasetError, match=r"died 2 times within 1000 batches .*lower --workers") as caught:
        next(loader)
    assert len(warnings) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("pause_s", "is_replaced"), [(1000, True), (2, False)])
def test_a_worker_that_hangs_is_replaced_but_a_slow_one_waited_for(
    make_set, monkeypatch, pause_s, is_replaced
):
    dataset = open_dataset(make_set(40))
    expected = take(make_loader(dataset, InfiniteSampler(40), 4), 4)
    monkeypatch.setattr(data_loader, "WORKER_POLL_S", 1)
    monkeypatch.setattr(data_loader, "WORKER_TIMEOUT_S", 4)
    flag = multiprocessing.get_context("fork").Event()
    plain = data_loader.collate

    def hang_once(items):
        if not flag.is_set():
            flag.set()
            time.sleep(pause_s)
        return plain(items)

    monkeypatch.setattr(data_loader, "collate", hang_once)
    warnings: list[str] = []
    before = set(multiprocessing.active_children())
    loader = make_loader(dataset, InfiniteSampler(40), 4, num_workers=1, warn=warnings.append)
    first = set(multiprocessing.active_children()) - before
    assert_same(take(loader, 4), expected)
    assert len(warnings) == is_replaced and all("timed out" in warning for warning in warnings)
    assert any(process.is_alive() for process in first) is not is_replaced


LEAVING = """
import sys
from training import dataset
from training.data_loader import InfiniteSampler, make_loader
dataset.IN_MEMORY_BYTES = 0
loader = make_loader(dataset.open_dataset(sys.argv[1]), InfiniteSampler(40), 4, num_workers=2)
next(loader)
sys.exit(75)
"""


def test_a_process_ends_though_its_loader_ignores_signals(make_set):
    """Python ends its children with SIGTERM and then waits for them; these do not listen."""
    command = [sys.executable, "-c", LEAVING, str(make_set(40))]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 75, done.stderr.decode()
    assert time.monotonic() - start < 30


def test_an_error_in_a_workers_own_code_is_no_loss(make_set, monkeypatch):
    monkeypatch.setattr(data_loader, "collate", lambda _items: [][1])
    loader = make_loader(open_dataset(make_set(40)), InfiniteSampler(40), 4, num_workers=1)
    with pytest.raises(IndexError, match="in DataLoader worker process"):
        next(loader)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), True),
        (RuntimeError("DataLoader timed out after 5 seconds"), True),
        (RuntimeError("Pin memory thread exited unexpectedly"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (EOFError(), True),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"), False),
        (RuntimeError("something else"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
    ],
)
def test_which_errors_mean_a_lost_process(error, expected):
    assert is_worker_loss(error) is expected


def test_workers_do_not_die_of_the_schedulers_signals(make_set):
    """Schedulers signal the whole process group; the training process alone decides."""
    dataset = open_dataset(make_set(40))
    before = set(multiprocessing.active_children())
    warnings: list[str] = []
    loader = make_loader(dataset, InfiniteSampler(40), 4, num_workers=1, warn=warnings.append)
    next(loader)
    for worker in set(multiprocessing.active_children()) - before:
        os.kill(worker.pid, signal.SIGTERM)
    take(loader, 4)
    assert not warnings


# The sampler's start at a late position.


@pytest.mark.parametrize(("size", "position"), [(7, 10_000), (5000, 12_345), (100_000, 4096), (1, 5000)])
def test_a_late_position_continues_the_same_order(size, position):
    whole = itertools.islice(InfiniteSampler(size, seed=2), position, position + 50)
    assert list(itertools.islice(InfiniteSampler(size, seed=2, position=position), 50)) == list(whole)


def test_a_late_position_is_reached_in_seconds():
    start = time.perf_counter()
    next(iter(InfiniteSampler(100_000, position=1_000_000)))
    assert time.perf_counter() - start < 10
