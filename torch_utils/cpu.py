# SPDX-License-Identifier: MIT
"""Settings that make repeated training steps on a CPU faster without changing a result."""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and values of glibc's malloc.h
KEEP_BYTES = 1 << 30  # keep up to so much free memory at the top of the heap
LARGEST_BLOCKS = (
    1 << 30,
    32 << 20,
)  # blocks up to this size come from the heap; older glibc allows 32 MiB only


def tune_for_training() -> None:
    """Keep freed memory in the process and treat denormal floats as zero.

    By default glibc returns every block over 128 KiB to the system and faults fresh pages in for the next one; a
    training step frees and takes hundreds of such blocks. Does nothing to the allocator where libc is not glibc.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
            any(libc.mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_BLOCKS)  # 1 = accepted
        except (OSError, AttributeError):  # musl and others: slower, not wrong
            pass
