# SPDX-License-Identifier: MIT
"""Work on many images in threads, results in order: Pillow lets other threads run while it decodes and resizes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
MAX_THREADS = 8  # more help little: one thread collects the results
QUEUE_PER_THREAD = 4  # results computed ahead; bounds the memory


def map_in_order(
    function: Callable[[int], T], count: int, num_threads: int | None = None
) -> Generator[T, None, None]:
    """function(0), function(1) ... function(count - 1), computed in threads a bounded number ahead.

    num_threads: None = one for each core, at most MAX_THREADS. Close it to stop before the end.
    """
    num_threads = num_threads or min(MAX_THREADS, os.cpu_count() or 1)
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for index in range(count):
                pending.append(pool.submit(function, index))
                if len(pending) > QUEUE_PER_THREAD * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
