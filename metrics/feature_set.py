# SPDX-License-Identifier: MIT
"""One pass over images, real or generated, that collects what all metrics of a call need of them.

Items are dealt out to the processes in turn (item i of the pass to rank i modulo their number) and put back into
their order, so that results depend neither on the number of processes nor on the batch size, but for rounding.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metrics.feature_stats import FeatureStats
from torch_utils.distributed import gather_to_main, is_main, rank, world_size

if TYPE_CHECKING:
    from metrics.features import Detector

BATCH_SIZE = 64  # items loaded, or asked of a generator, at a time
PREFETCHED = 4  # batches loaded ahead

LoadItems = Callable[[np.ndarray], Tensor]  # items, int64 (n,) -> one row each
Features = FeatureStats | Tensor  # moments, or rows float32 (n, D) on the CPU


@dataclass(frozen=True)
class Selection:
    """Some of the items of a set."""

    name: str  # tells it from other selections of the same set
    items: np.ndarray = field(compare=False, repr=False)  # int64, ascending

    def __len__(self) -> int:
        return len(self.items)

    def holds(self, items: np.ndarray) -> np.ndarray:
        """Which of `items` are selected, bool (n,). Costs n searches, however large the set."""
        if not len(self.items):
            return np.zeros(len(items), dtype=bool)
        places = np.searchsorted(self.items, items)
        return self.items[np.minimum(places, len(self.items) - 1)] == items


def first_items(count: int) -> Selection:
    """Items 0 ... count - 1."""
    return Selection(f"first-{count}", np.arange(count, dtype=np.int64))


def random_items(count: int, total: int, seed: int = 0) -> Selection:
    """`count` of `total` items, without replacement; all of them if there are no more."""
    if count >= total:
        return first_items(total)
    items = np.sort(np.random.RandomState(seed).permutation(total)[:count])
    return Selection(f"random-{count}-of-{total}-seed-{seed}", items.astype(np.int64))


@dataclass(frozen=True)
class Request:
    """What one metric needs of a set of images."""

    detector: str  # name in metrics.detectors
    tap: str  # "features", or another field of the detector's `outputs`
    keeps: Literal["moments", "rows"]  # mean and covariance, or every item's features
    selection: Selection  # of which items


def collect(
    requests: Iterable[Request],
    detectors: Mapping[str, Detector],
    load: LoadItems,
    title: str,
    is_threaded: bool = False,
    show_progress: bool = True,
) -> dict[Request, Features]:
    """What the requests ask for, on the main process; {} on the others. Every rank calls it with equal arguments.

    load: uint8 images (n, C, H, W) of the items; called with is_threaded in a thread of its own while the detectors
    work. title: what the progress bar counts. Every item is loaded once and seen by a detector at most once.
    """
    parts = [_Part(request) for request in dict.fromkeys(requests)]
    if not parts:
        return {}
    items = np.unique(np.concatenate([part.request.selection.items for part in parts]))
    for part in parts:
        part.expect(items)

    def take(batch: np.ndarray, images: Tensor) -> None:
        for name, detector in detectors.items():
            users = [part for part in parts if part.request.detector == name]
            is_needed = np.zeros(len(batch), dtype=bool)
            for part in users:
                is_needed |= part.request.selection.holds(batch)
            if not is_needed.any():
                continue
            needed = images if is_needed.all() else images[torch.from_numpy(is_needed).to(images.device)]
            outputs = _run(detector, needed, {part.request.tap for part in users})
            for part in users:
                part.take(batch[is_needed], outputs[part.request.tap])

    _visit(items, load, take, title, is_threaded, show_progress)
    gathered = {part.request: part.gather(items) for part in parts}
    return gathered if is_main() else {}


def collect_values(count: int, measure: LoadItems, title: str, show_progress: bool = True) -> Tensor | None:
    """Rows (count, K) that `measure` gives for items 0 ... count - 1, in order, on the main process; None elsewhere."""
    items, rows = np.arange(count, dtype=np.int64), []
    _visit(items, measure, lambda batch, values: rows.append(values.cpu()), title, False, show_progress)
    return gather_rows(torch.cat(rows) if rows else torch.zeros(0, 0), items, items)


def gather_rows(mine: Tensor, items: np.ndarray, wanted: np.ndarray) -> Tensor | None:
    """Rows of the wanted items, in order, on the main process. mine: those of this rank, of items[rank::ranks]."""
    parts = gather_to_main(mine)
    if not is_main():
        return None
    if len(parts) == 1:
        return parts[0]
    full = next(part for part in parts if len(part))
    rows = torch.empty(len(wanted), *full.shape[1:], dtype=full.dtype)
    for source, part in enumerate(parts):
        theirs = items[source :: len(parts)]
        rows[torch.from_numpy(np.flatnonzero(np.isin(wanted, theirs)))] = part if len(part) else rows[:0]
        parts[source] = full[:0]  # frees it
    return rows


class _Part:
    """What this process has of one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._stats = FeatureStats()
        self._rows: Tensor | None = None
        self._num_rows = self._num_expected = 0

    def expect(self, items: np.ndarray) -> None:
        """items: of the whole pass."""
        mine = items[rank() :: world_size()]
        self._num_expected = int(self.request.selection.holds(mine).sum())

    def take(self, batch: np.ndarray, outputs: Tensor) -> None:
        is_needed = self.request.selection.holds(batch)
        if not is_needed.any():
            return
        outputs = outputs if is_needed.all() else outputs[torch.from_numpy(is_needed).to(outputs.device)]
        if self.request.keeps == "moments":
            self._stats.append(outputs)
            return
        if self._rows is None:
            self._rows = torch.empty(self._num_expected, outputs.shape[1])
        self._rows[self._num_rows : self._num_rows + len(outputs)] = outputs.cpu()
        self._num_rows += len(outputs)

    def gather(self, items: np.ndarray) -> Features | None:
        if self.request.keeps == "rows":
            rows = torch.zeros(0, 0) if self._rows is None else self._rows
            return gather_rows(rows, items, self.request.selection.items)
        total, outer = self._stats.sums() if self._stats.num_items else (torch.zeros(0), torch.zeros(0, 0))
        totals, outers = gather_to_main(total.double()), gather_to_main(outer.double())
        if not is_main():
            return None
        total = torch.stack([x for x in totals if len(x)]).sum(dim=0)
        outer = sum((x for x in outers if len(x)), torch.zeros((), dtype=torch.float64))
        return FeatureStats.from_sums(len(self.request.selection), total, outer)


def _run(detector: Detector, images: Tensor, taps: set[str]) -> dict[str, Tensor]:
    if taps == {"features"}:
        return {"features": detector(images)}
    outputs = detector.outputs(images)  # type: ignore[attr-defined]
    return {tap: getattr(outputs, tap) for tap in taps}


def _visit(
    items: np.ndarray,
    load: LoadItems,
    take: Callable[[np.ndarray, Tensor], None],
    title: str,
    is_threaded: bool,
    show_progress: bool,
) -> None:
    """Load this rank's share of the items in batches, and hand them on."""
    mine = items[rank() :: world_size()]
    batches = [mine[start : start + BATCH_SIZE] for start in range(0, len(mine), BATCH_SIZE)]
    loaded = load_ahead(batches, load) if is_threaded else map(load, batches)
    is_hidden = not (show_progress and is_main() and sys.stderr.isatty())
    with tqdm(total=len(items), desc=title, unit="img", leave=False, disable=is_hidden) as bar:
        for batch, values in zip(batches, loaded, strict=True):
            if len(values) != len(batch):
                raise ValueError(f"asked for {len(batch)} {title}, got {len(values)}")
            take(batch, values)
            bar.update(min(len(batch) * world_size(), bar.total - bar.n))


def load_ahead(batches: list[np.ndarray], load: LoadItems) -> Iterator[Tensor]:
    """What `load` gives for each batch, a few ahead, by one thread."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="metric-images") as pool:
        waiting: deque[Future[Tensor]] = deque()
        rest = iter(batches)
        try:
            for batch in rest:
                waiting.append(pool.submit(load, batch))
                if len(waiting) > PREFETCHED:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
