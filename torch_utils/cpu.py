# SPDX-License-Identifier: MIT
"""Memory of this process: settings that make repeated training steps on a CPU faster, and the most it has had."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

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


def peak_memory() -> int:
    """Most bytes that this process has had in memory, as the operating system counts them.

    On Linux VmHWM, as getrusage's figure begins with the peak of the process that started this one.
    """
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
