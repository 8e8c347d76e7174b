# SPDX-License-Identifier: MIT
"""Data under load: damaged images, storage that fails for a moment or is slow, one zip for several processes."""

import errno
import itertools
import multiprocessing
import os
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torch_utils.stats import StatsCollector
from training import data_faults, image_source
from training import dataset as dataset_module
from training.data_faults import (
    MAX_NEIGHBOURS,
    Fault,
    FaultReport,
    ForgivingItems,
    WaitReport,
)
from training.data_loader import InfiniteSampler, make_loader
from training.dataset import open_dataset
from training.dataset_labels import DatasetError
from training.image_source import ZipSource
from training.storage_errors import RETRY_DELAYS_S, StorageError


@pytest.fixture(autouse=True)
def large_sets(monkeypatch):
    """Every set counts as too large to decode when opened, or to read its headers."""
    monkeypatch.setattr(dataset_module, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(dataset_module, "MAX_HEADERS_CHECKED", 0)


@pytest.fixture
def make_set(write_dataset):
    """make_set(count, bad=(), name) -> path of a zip of `count` 8x8 images with a class each, some damaged."""

    def make(count: int, bad: tuple[int, ...] = (), name: str = "set.zip"):
        rng = np.random.default_rng(0)
        names = [f"{i:04d}.png" for i in range(count)]
        files = {n: rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for n in names}
        path = write_dataset(name, files, {n: i for i, n in enumerate(names)})
        for i in bad:
            damage_member(path, names[i])
        return path

    return make


def damage_member(path, name: str) -> None:
    """Change a byte inside a member's data: its CRC-32 no longer fits."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    content = bytearray(path.read_bytes())
    content[info.header_offset + 30 + len(name) + info.compress_size // 2] ^= 0xFF
    path.write_bytes(content)


def take(loader, count: int):
    return [next(loader) for _ in range(count)]


# Damaged images.


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_gives_way_to_its_neighbour(make_set, num_workers):
    path = make_set(150, bad=(7,))
    dataset = open_dataset(path, use_labels=True)
    warnings: list[str] = []
    loader = make_loader(dataset, InfiniteSampler(150, seed=1), 10, num_workers, warn=warnings.append)
    seen = [label for _, labels in take(loader, 45) for label in labels.tolist()]
    expected = list(itertools.islice(InfiniteSampler(150, seed=1), 450))
    assert 7 in expected and seen == [8 if i == 7 else i for i in expected]
    assert len(warnings) == 1  # once, however often it is met
    assert warnings[0].startswith(f"Warning: {path}/0007.png: not readable as an image (Bad CRC-32")
    assert "a neighbour in the data set is shown" in warnings[0]


def test_the_neighbour_brings_its_own_label_and_is_always_the_same(make_set):
    dataset = open_dataset(make_set(40, bad=(5, 6, 39)), use_labels=True)
    good = open_dataset(make_set(40, name="good.zip"), use_labels=True)
    items = ForgivingItems(dataset)
    for index, replacement in ((5, 7), (6, 7), (39, 0), (3, 3), (5, 7)):
        image, label, _ = items[index]
        assert label == replacement and torch.equal(image, good[replacement][0])


def test_mirrored_twins_count_as_one_image(make_set):
    dataset = open_dataset(make_set(40, bad=(5,)), mirror=True)
    faults = [fault for index in (5, 45) for fault in ForgivingItems(dataset)[index][2]]
    assert [fault.image for fault in faults] == [5, 5]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_damaged_images_end_the_run(make_set, num_workers):
    path = make_set(200, bad=(3, 50, 120))  # 1.5 %
    warnings: list[str] = []
    dataset = open_dataset(path)
    loader = make_loader(dataset, InfiniteSampler(200, shuffle=False), 10, num_workers, warn=warnings.append)
    with pytest.raises(
        DatasetError, match=r"0120\.png: .* as 2 others of 200 images: more than 1%"
    ) as caught:
        take(loader, 20)
    assert len(warnings) == 2 and "\n" not in str(caught.value)


def test_a_damaged_region_is_passed_over(make_set):
    dataset = open_dataset(make_set(300, bad=tuple(range(100, 130))), use_labels=True)
    assert ForgivingItems(dataset)[100][1] == 132  # 100 + 32: the steps double


def test_a_set_that_is_gone_says_so_with_the_first_image(make_set):
    dataset = open_dataset(make_set(30, bad=tuple(range(1, 30))))
    with pytest.raises(DatasetError, match=r"0009\.png"):
        ForgivingItems(dataset)[9]
    assert 2 ** (MAX_NEIGHBOURS - 1) > 1000


def test_faults_are_told_once():
    heard: list[str] = []
    report = FaultReport(1000, heard.append)
    report.add([Fault(3, "a is bad"), Fault(-1, "b was read at attempt 2")])
    report.add([Fault(3, "a is bad")])
    assert len(heard) == 2 and report.bad_images == {3}


# Storage that fails for a moment, or for good.


class FlakyStorage:
    """Opens zip members, after failing some times with an errno."""

    def __init__(self, monkeypatch, code: int, failures: int) -> None:
        self.code, self.left, self.handles = code, failures, []
        self.slept: list[float] = []
        plain = ZipSource._open

        def open_member(source, name):
            self.handles.append(source._zip)
            if self.left > 0:
                self.left -= 1
                raise OSError(self.code, os.strerror(self.code))
            return plain(source, name)

        monkeypatch.setattr(ZipSource, "_open", open_member)
        monkeypatch.setattr(image_source.time, "sleep", self.slept.append)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_storage_that_fails_for_a_moment_is_tried_again(code, make_set, monkeypatch):
    dataset = open_dataset(make_set(20))
    expected = dataset[4][0]
    storage = FlakyStorage(monkeypatch, code, failures=2)
    warnings: list[str] = []
    loader = make_loader(dataset, InfiniteSampler(20, shuffle=False), 5, warn=warnings.append)
    images, _ = next(loader)
    assert torch.equal(images[4], expected)
    assert storage.slept == list(RETRY_DELAYS_S[:2])
    assert storage.handles[1] is not storage.handles[0]  # a stale handle would stay stale
    (warning,) = warnings
    assert "0000.png: read at attempt 3 (" in warning and os.strerror(code) in warning


def test_one_image_that_storage_never_gives_is_replaced(make_set, monkeypatch):
    dataset = open_dataset(make_set(200), use_labels=True)
    FlakyStorage(monkeypatch, errno.EIO, failures=len(RETRY_DELAYS_S) + 1)
    image, label, faults = ForgivingItems(dataset)[9]
    assert label == 10 and torch.equal(image, dataset[10][0])
    assert faults[0].image == 9 and "still fails after 5 attempts" in faults[0].message


def test_storage_that_is_gone_ends_the_run_after_two_images(make_set, monkeypatch):
    """Not after a hundredth of the set, at half a minute each."""
    dataset = open_dataset(make_set(200))
    storage = FlakyStorage(monkeypatch, errno.EIO, failures=10**9)
    loader = make_loader(dataset, InfiniteSampler(200, shuffle=False), 5)
    with pytest.raises(StorageError.__base__, match=r"0000\.png: the storage still fails .*--cache-data"):
        next(loader)
    assert len(storage.slept) == 2 * len(RETRY_DELAYS_S)


def test_a_missing_file_is_not_waited_for(make_set, monkeypatch):
    dataset = open_dataset(make_set(20))
    storage = FlakyStorage(monkeypatch, errno.ENOENT, failures=1)
    with pytest.raises(DatasetError, match=r"0003\.png"):
        dataset[3]
    assert not storage.slept


# Several processes, one zip.


def read_own_image(dataset, index, results):
    for _ in range(50):
        image = dataset[index][0]
    results.put((index, image.numpy()))


def test_each_process_reads_one_zip_through_its_own_handle(make_set):
    """Processes that shared one would share its position, and read each other's bytes."""
    dataset = open_dataset(make_set(20))
    dataset[0]  # the parent's handle is open when the others begin
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=read_own_image, args=(dataset, i, results)) for i in range(4)]
    for process in processes:
        process.start()
    for _ in range(50):
        dataset[10]
    for index, image in [results.get(timeout=60) for _ in processes]:
        assert np.array_equal(image, dataset[index][0].numpy())
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


# Slow storage.


def test_waiting_for_data_is_measured_and_named(make_set, monkeypatch):
    dataset = open_dataset(make_set(40))
    clock_s, delay_s = [0.0], [0.02]
    monkeypatch.setattr(data_faults, "time", SimpleNamespace(perf_counter=lambda: clock_s[0]))
    plain = ZipSource._open

    def open_slowly(source, name):
        clock_s[0] += delay_s[0]
        return plain(source, name)

    monkeypatch.setattr(ZipSource, "_open", open_slowly)
    stats, warnings = StatsCollector(), []
    loader = make_loader(dataset, InfiniteSampler(40), 5, warn=warnings.append)

    def tick() -> float:
        start = clock_s[0]
        take(loader, 2)
        clock_s[0] += 0.1  # the training step
        loader.report_wait(stats, clock_s[0] - start)
        return stats.flush()["Timing/data_wait"]["mean"]

    assert tick() == pytest.approx(2 / 3) and not warnings  # the first: the loader has just started
    assert tick() == tick() == pytest.approx(2 / 3)
    (warning,) = warnings  # once
    assert "--workers 3" in warning and "--cache-data" in warning
    delay_s[0] = 0.0
    assert tick() == 0 and len(warnings) == 1
    delay_s[0] = 0.02
    tick()
    assert len(warnings) == 2  # again, as it was over in between


def test_advice_names_the_present_number_of_workers(monkeypatch):
    clock_s = itertools.count()
    monkeypatch.setattr(data_faults, "time", SimpleNamespace(perf_counter=lambda: next(clock_s)))
    warnings: list[str] = []
    wait = WaitReport(4, warnings.append)
    for _ in range(2):
        with wait.timed():
            pass
        wait.report(StatsCollector(), elapsed_s=4)
    assert warnings[0].startswith("Warning: 25% of the time") and "more --workers (now 4)" in warnings[0]
