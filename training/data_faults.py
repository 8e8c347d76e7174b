# SPDX-License-Identifier: MIT
"""Storage that fails for a moment, and images that stay damaged: what is tried again, replaced, and given up.

A run of days should not end with one bad sector, nor train on a set of which a part is gone without saying so.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from torch_utils.distributed import agree_max
from torch_utils.stats import StatsCollector
from training.dataset import ImageDataset
from training.dataset_labels import DatasetError
from training.storage_errors import StorageError

MAX_BAD_SHARE = 0.01  # of the images; more is a broken data set
MAX_WAIT_SHARE = 0.2  # of the time of training, spent waiting for images; more leads to advice
MAX_NEIGHBOURS = 12  # tried in the place of an image: the 1st, 2nd, 4th, ... after it
WORKER_PREFIX = (
    "in DataLoader worker process"  # how PyTorch marks an exception that a worker's own code raised
)
TIMEOUT_WORDS = "DataLoader timed out"  # and that a batch took too long
CONNECTION_ERRNOS = {errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOENT, errno.EPIPE}


class Fault(NamedTuple):
    """Something about reading that the user should hear of."""

    image: int  # index of the unmirrored item that cannot be read; -1 = none: it could in the end
    message: str  # one line


class Fetched(NamedTuple):
    """A batch with what went wrong while it was read."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # class ids, int64 (N,)
    faults: list[Fault]


class ForgivingItems(Dataset[tuple[Tensor, int, list[Fault]]]):
    """Items of a data set with their faults: one that cannot be read gives way, label included, to a neighbour.

    Which neighbour depends on the index alone, so that every process and every repetition of a run takes the same.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset
        self._num_images = len(dataset) // (1 + dataset.mirror)
        self._bad: dict[int, str] = {}  # by item; this process's, so that what is bad is not decoded again

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int, list[Fault]]:
        """Raises DatasetError when no neighbour can be read either, as when storage is gone."""
        faults: list[Fault] = []
        errors: list[DatasetError] = []
        for step in (0, *(2**k for k in range(MAX_NEIGHBOURS))):
            item = (index + step) % len(self._dataset)
            try:
                if item in self._bad:
                    raise DatasetError(self._bad[item])
                image, label = self._dataset[item]
            except DatasetError as error:
                errors.append(error)
                if len(errors) == 2 and isinstance(error, StorageError):
                    break
                self._bad[item] = str(error)
                faults.append(Fault(item % self._num_images, str(error)))
            else:
                return image, label, faults + [Fault(-1, note) for note in self._dataset.take_notes()]
        raise errors[0]

    def fetch(self, indices: list[int]) -> Fetched:
        """A batch of items."""
        return collate([self[i] for i in indices])


def collate(items: list[tuple[Tensor, int, list[Fault]]]) -> Fetched:
    """A batch of single items; into shared memory where a worker process calls it."""
    images, labels = default_collate([(image, label) for image, label, _ in items])
    return Fetched(images, labels, [fault for _, _, faults in items for fault in faults])


class FaultReport:
    """Tells of every fault once, and ends the run when too many images are bad."""

    def __init__(self, num_images: int, warn: Callable[[str], None]) -> None:
        self._num_images, self.warn = num_images, warn
        self.bad_images: set[int] = set()

    def add(self, faults: list[Fault]) -> None:
        """Raises DatasetError when more than MAX_BAD_SHARE of the images cannot be read."""
        for image, message in faults:
            if image < 0:
                self.warn(f"Warning: {message}")
            elif image not in self.bad_images:
                self.bad_images.add(image)
                if len(self.bad_images) > MAX_BAD_SHARE * self._num_images:
                    raise DatasetError(self._describe_end(message))
                self.warn(f"Warning: {message}; a neighbour in the data set is shown in its place")

    def _describe_end(self, message: str) -> str:
        bad, total = len(self.bad_images), self._num_images
        if bad == 1:
            return message
        return f"{message} -- as {bad - 1} others of {total} images: more than {MAX_BAD_SHARE:.0%} cannot be read"


class WaitReport:
    """How much of the time training waits for its images: Timing/data_wait in the log, with advice where it is much."""

    def __init__(self, num_workers: int, warn: Callable[[str], None]) -> None:
        self._num_workers, self._warn = num_workers, warn
        self._waited_s = 0.0  # since the last report
        self._has_warned = False
        self.has_started = False  # the first report after the loader was started takes its time

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around asking for a batch."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    def report(self, stats: StatsCollector, elapsed_s: float) -> None:
        """Report the share of the last `elapsed_s` seconds. All processes call it: advice goes by the slowest."""
        share = min(self._waited_s / max(elapsed_s, 1e-9), 1.0)
        stats.report("Timing/data_wait", share)
        percent = agree_max(round(100 * share))
        if self.has_started:
            is_slow = percent > 100 * MAX_WAIT_SHARE
            if is_slow and not self._has_warned:
                self._warn(self._advise(percent))
            self._has_warned = is_slow
        self._waited_s, self.has_started = 0.0, True

    def _advise(self, percent: int) -> str:
        more = f"more --workers (now {self._num_workers})" if self._num_workers else "--workers 3"
        return (
            f"Warning: {percent}% of the time goes by in waiting for training images; try {more}, or, if their "
            "storage is slow, --cache-data DIR with a local folder"
        )


def is_worker_loss(error: BaseException) -> bool:
    """Whether a data loader failed because a worker process died or hangs, not because its code raised.

    PyTorch says both with a RuntimeError. A worker that dies while it hands over a batch breaks a connection.
    """
    if WORKER_PREFIX in str(error):
        return False
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in ("DataLoader worker", TIMEOUT_WORDS, "Pin memory thread"))
    is_broken = isinstance(error, OSError) and error.errno in CONNECTION_ERRNOS
    return is_broken or isinstance(error, (EOFError, ConnectionError))


def is_loader_timeout(error: BaseException) -> bool:
    """Whether a batch took longer than the data loader's `timeout`; it can be asked for again."""
    return isinstance(error, RuntimeError) and str(error).startswith(TIMEOUT_WORDS)


def unwrap_message(error: Exception) -> str:
    """The message of an error that a worker process wrapped in its trace: what follows the class in the last line."""
    if WORKER_PREFIX not in str(error):
        return str(error)
    return str(error).strip().splitlines()[-1].partition("Error: ")[2]


def fetch_from_memory(dataset: ImageDataset) -> Callable[[list[int]], Fetched]:
    """Batches of a set that is decoded already, where nothing can go wrong."""
    return lambda indices: Fetched(*dataset.batch(indices), faults=[])
