# SPDX-License-Identifier: MIT
"""Where memory is short a run ends with one line of advice; everything else keeps its trace."""

import errno
from dataclasses import replace

import pytest
import torch

from torch_utils.errors import RunError
from training.out_of_memory import LackOfMemoryError, advise_on_memory, is_out_of_gpu_memory, microbatch_sizes
from training.presets import quickstart

CONFIG = replace(quickstart(), batch_size=24, microbatch_size=12)


def end_with(error: BaseException, config=CONFIG, device="cuda", saved="") -> str:
    """What the user reads."""
    with (
        pytest.raises(LackOfMemoryError) as caught,
        advise_on_memory(config, torch.device(device), lambda: saved),
    ):
        raise error
    assert isinstance(caught.value, RunError) and caught.value.exit_code == 71
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_real_allocation_that_fails_is_advised_on():
    with (
        pytest.raises(
            LackOfMemoryError, match="has no memory left; lower --batch-gpu from 12 to 8"
        ) as caught,
        advise_on_memory(CONFIG, torch.device("cpu")),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    assert caught.value.exit_code == 71


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_gpu_gets_a_smaller_micro_batch(error):
    text = end_with(error, saved="the state at 120 kimg is saved: go on with --resume runs/00001-a")
    assert (
        "rank 0 (host " in text and "has no GPU memory left; lower --batch-gpu from 12 to 8, or give" in text
    )
    assert text.endswith("; the state at 120 kimg is saved: go on with --resume runs/00001-a")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_the_machines_memory_is_told_from_the_gpus(error):
    assert not is_out_of_gpu_memory(error)
    assert "it is the machine's own memory: lower --workers (now 0)" in end_with(error)
    assert "lower --batch-gpu from 12 to 8" in end_with(error, device="cpu")


@pytest.mark.parametrize(
    ("device", "words"), [("cuda", "a GPU with more memory"), ("cpu", "a machine with more")]
)
def test_where_nothing_is_smaller_networks_must_be(device, words):
    error = torch.cuda.OutOfMemoryError("out") if device == "cuda" else MemoryError()
    text = end_with(error, config=replace(CONFIG, microbatch_size=1), device=device)
    assert "no smaller --batch-gpu than 1" in text and "--cbase" in text and words in text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        ValueError("x"),
        OSError(errno.ENOSPC, "No space left"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, advise_on_memory(CONFIG, torch.device("cuda")):
        raise error
    assert caught.value is error


def test_nothing_happens_without_an_error():
    with advise_on_memory(CONFIG, torch.device("cpu")):
        pass


def test_sizes_divide_the_share():
    assert microbatch_sizes(CONFIG) == [24, 12, 8, 6, 4, 3, 2, 1]
