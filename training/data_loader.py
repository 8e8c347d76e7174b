# SPDX-License-Identifier: MIT
"""Batches of training images: an endless random order of a data set, and what loads it.

The order for a seed is that of StyleGAN's data loader, on any number of processes.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import multiprocessing
import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from torch_utils.stats import StatsCollector
from torch_utils.transfer import send
from training.data_faults import (
    FaultReport,
    Fetched,
    ForgivingItems,
    WaitReport,
    collate,
    fetch_from_memory,
    is_loader_timeout,
    is_worker_loss,
    unwrap_message,
)
from training.dataset import ImageDataset
from training.dataset_labels import DatasetError
from training.stopping import ignore_stop_signals

SAMPLER_BLOCK = 4096  # random offsets drawn at a time; does not change the sequence
# A batch that takes longer counts as a lost process; retries of a failing read take 26.
WORKER_TIMEOUT_S = 300
WORKER_POLL_S = 5  # a lost process is noticed after so long
WORKER_TIMEOUT_S = 300  # a batch that takes longer counts as lost; retries of a failing read take 26 s each
MAX_RESTARTS, RESTART_WINDOW_BATCHES = 5, 1000  # of the loader's processes, before the run gives up


class InfiniteSampler(Sampler[int]):
    """Endless random order of a data set, dealt out to `num_replicas` processes in turn.

    Each step also swaps the index just used with one at most `window_size * dataset_size` places back, so the
    order keeps changing without reshuffling (StyleGAN2-ADA's sampler). Every process runs the same generator.

    position: how many indices of the common sequence, all processes together, lie behind; iteration starts
    there. With batches of equal size this is the number of images shown, so it restores the order after a
    restart.
    """

    def __init__(
        self,
        dataset_size: int,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        window_size: float = 0.5,
        position: int = 0,
    ) -> None:
        if dataset_size < 1 or not 0 <= rank < num_replicas or not 0 <= window_size <= 1 or position < 0:
            raise ValueError(
                f"InfiniteSampler: {dataset_size=}, {rank=}, {num_replicas=}, {window_size=}, {position=}"
            )
        self.dataset_size = dataset_size
        self.seed = seed
        self.rank = rank
        self.num_replicas = num_replicas
        self.shuffle = shuffle
        self.window_size = window_size
        self.position = position

    def at(self, position: int) -> InfiniteSampler:
        """The same order from another position."""
        copied = copy.copy(self)
        copied.position = position
        return copied

    def __iter__(self) -> Iterator[int]:
        random_state = np.random.RandomState(self.seed % 2**32)
        shuffled = np.arange(self.dataset_size, dtype=np.int32)
        window = 0
        if self.shuffle:
            random_state.shuffle(shuffled)
            window = int(np.rint(self.dataset_size * self.window_size))
        order = array("i", shuffled.tobytes())  # a list's integers fill the caches
        count = 0
        while count + SAMPLER_BLOCK <= self.position:  # 25 million images of ImageNet take some 5 s
            swap_(order, _draw_offsets(random_state, window), count % self.dataset_size)
            count += SAMPLER_BLOCK
        while True:
            for offset in _draw_offsets(random_state, window):
                i = count % self.dataset_size
                if count >= self.position and count % self.num_replicas == self.rank:
                    yield order[i]
                swap_(order, (offset,), i)
                count += 1


def _draw_offsets(random_state: np.random.RandomState, window: int) -> list[int]:
    return random_state.randint(window, size=SAMPLER_BLOCK).tolist() if window >= 2 else [0] * SAMPLER_BLOCK


def swap_(order: MutableSequence[int], offsets: Sequence[int], i: int) -> None:
    """Swap the entries from `i` on, around the ring, each with the one `offset` places back, in turn."""
    size = len(order)
    for offset in offsets:
        j = i - offset  # below 0 it counts from the end
        order[i], order[j] = order[j], order[i]
        i += 1
        if i == size:
            i = 0


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """Endless (images uint8 (N, C, H, W), class ids int64 (N,)) on one device.

    position: the sampler's position after the last batch; build a sampler with it to continue from there. Loader
    processes that die, as by the system's memory killer, are started again there, so that the batches stay the same.
    """

    def __init__(
        self,
        open_stream: Callable[[InfiniteSampler], Iterator[Fetched]],
        sampler: InfiniteSampler,
        batch_size: int,
        device: torch.device,
        faults: FaultReport,
        wait: WaitReport,
        workers: list[BaseProcess],
    ) -> None:
        """open_stream: batches from the sampler's position; keeps `workers`, the processes behind them, up to date."""
        self._open_stream, self._sampler = open_stream, sampler
        self._step = batch_size * sampler.num_replicas
        self._device = device
        self._faults = faults
        self._restarts: list[int] = []  # positions
        self._wait, self._workers = wait, workers
        self.position = sampler.position
        self._stream = open_stream(sampler)

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Raises DatasetError for images that cannot be read, and when the loader's processes keep dying."""
        try:
            with self._wait.timed():
                images, labels, faults = self._fetch()
            self._faults.add(faults)
        except BaseException:
            self.close()
            raise
        self.position += self._step
        return send(images, self._device), send(labels, self._device)

    def close(self) -> None:
        """End the loader's processes; there are no more batches then."""
        kill_processes(self._workers)

    def report_wait(self, stats: StatsCollector, elapsed_s: float) -> None:
        """Report the share of the last `elapsed_s` seconds that went by in waiting for data; all processes call it."""
        self._wait.report(stats, elapsed_s)

    def _fetch(self) -> Fetched:
        start = time.monotonic()
        while True:
            try:
                return next(self._stream)
            except DatasetError as error:
                raise DatasetError(unwrap_message(error)) from error
            except (RuntimeError, OSError, EOFError) as error:
                if is_loader_timeout(error) and time.monotonic() - start < WORKER_TIMEOUT_S:
                    continue  # all processes live, so the batch may still come
                if not is_worker_loss(error):
                    raise
                self._note_restart(str(error).partition("\n")[0] or type(error).__name__)
            self._wait.has_started, start = False, time.monotonic()
            self._stream = self._open_stream(self._sampler.at(self.position))

    def _note_restart(self, reason: str) -> None:
        recent = [p for p in self._restarts if self.position - p < RESTART_WINDOW_BATCHES * self._step]
        self._restarts = [*recent, self.position]
        if len(self._restarts) > MAX_RESTARTS:
            raise DatasetError(
                f"the data loader's processes died {len(self._restarts)} times within {RESTART_WINDOW_BATCHES} "
                f"batches ({reason}); memory is probably short: lower --workers, or ask for more memory"
            )
        self._faults.warn(
            f"Warning: a data loader process was lost at image {self.position} ({reason}); all were started again "
            "and no image is left out. If this repeats, memory is short: lower --workers"
        )


def make_loader(
    dataset: ImageDataset,
    sampler: InfiniteSampler,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    warn: Callable[[str], None] = print,
) -> Batches:
    """Batches of `batch_size` per process, in the sampler's order.

    num_workers: processes that decode; a set in memory is indexed directly and needs none. The batches do not
    depend on it, and torch's global generator is left alone. warn: hears of images that are replaced, of storage
    that fails for a moment and of processes that are started again.
    """
    device = torch.device(device)
    faults = FaultReport(len(dataset) // (1 + dataset.mirror), warn)
    fetch = fetch_from_memory(dataset) if dataset.is_in_memory else ForgivingItems(dataset).fetch

    workers: list[BaseProcess] = []

    def index_batches(sampler: InfiniteSampler) -> Iterator[Fetched]:
        indices = iter(sampler)
        while True:
            yield fetch([next(indices) for _ in range(batch_size)])

    def start_workers(sampler: InfiniteSampler) -> Iterator[Fetched]:
        kill_processes(workers)
        loader = DataLoader(
            ForgivingItems(dataset),
            sampler=sampler,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            collate_fn=collate,
            timeout=WORKER_POLL_S,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # else the workers' seeds are drawn from the global generator
        )
        before = multiprocessing.active_children()
        with keep_child_handler():
            stream = iter(loader)
        workers[:] = [p for p in multiprocessing.active_children() if p not in before]
        # They ignore the signal by which Python ends its children at exit, and waits for. What is registered last runs
        # first.
        atexit.register(kill_processes, workers)
        return stream

    has_workers = num_workers > 0 and not dataset.is_in_memory
    open_stream = start_workers if has_workers else index_batches
    return Batches(open_stream, sampler, batch_size, device, faults, WaitReport(num_workers, warn), workers)


def kill_processes(processes: list[BaseProcess]) -> None:
    """End loader processes of which one was lost: the others may wait for it, and would be waited for."""
    for process in processes:
        process.kill()
    processes.clear()


@contextlib.contextmanager
def keep_child_handler() -> Iterator[None]:
    """PyTorch's handler of a dying worker raises in the midst of whatever the main thread does: not here.

    Without it the loss is noticed when the next batch is asked for, where it can be dealt with.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
