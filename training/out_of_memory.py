# SPDX-License-Identifier: MIT
"""A run that does not fit into memory ends with what to do about it, not with a stack trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from torch_utils.distributed import describe_rank, world_size
from torch_utils.errors import RunError
from training.config import TrainConfig

OUT_OF_MEMORY = 71  # exit code
_GPU_WORDS = ("cuda out of memory", "cuda error: out of memory", "alloc_failed", "hip out of memory")
_HOST_WORDS = ("can't allocate memory", "not enough memory", "cannot allocate memory")


class LackOfMemoryError(RunError):
    """The run ends, because memory does not suffice; what was saved before is intact."""

    exit_code = OUT_OF_MEMORY
    is_common = False


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether a GPU had no memory left; libraries such as cuDNN say it in words only."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _GPU_WORDS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine itself had no memory left."""
    if isinstance(error, MemoryError) or is_out_of_gpu_memory(error):
        return True
    is_known = isinstance(
        error, RuntimeError | OSError
    )  # PyTorch's allocator; a process that cannot be started
    return is_known and any(word in str(error).lower() for word in _HOST_WORDS)


@contextlib.contextmanager
def advise_on_memory(
    config: TrainConfig, device: torch.device, describe_saved: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Around training: raises LackOfMemoryError, one line, in the place of what says that memory is short.

    describe_saved: how to go on, such as "the state at 120 kimg is saved: go on with --resume runs/1-..."; "" = not.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        is_gpu = is_out_of_gpu_memory(error)
        lines = [
            f"{describe_rank()} has no {'GPU ' if is_gpu else ''}memory left",
            advise(config, device, is_gpu),
        ]
        saved = describe_saved()
        raise LackOfMemoryError("; ".join([*lines, saved] if saved else lines)) from error


def advise(config: TrainConfig, device: torch.device, is_gpu: bool) -> str:
    """Which flag to lower, and to what."""
    if device.type == "cuda" and not is_gpu:
        workers = config.data.num_workers
        return f"it is the machine's own memory: lower --workers (now {workers}), or ask for more memory"
    current = config.microbatch_size
    smaller = [size for size in microbatch_sizes(config) if size < current]
    if not smaller:
        return (
            f"there is no smaller --batch-gpu than {current}: take a smaller network (--cbase, --cmax), or "
            + ("a GPU with more memory" if is_gpu else "a machine with more memory")
        )
    return f"lower --batch-gpu from {current} to {smaller[0]}, or give --batch-gpu auto; the gradient stays the same"


def microbatch_sizes(config: TrainConfig) -> list[int]:
    """Sizes into which a process's share of the batch can be divided, the largest first."""
    share = config.batch_size // world_size()
    return [size for size in range(share, 0, -1) if share % size == 0]
