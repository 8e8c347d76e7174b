# SPDX-License-Identifier: MIT
"""What tests of whole commands share: the process as it was, and errors of one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click
import pytest
import torch
from click.testing import CliRunner


@pytest.fixture(scope="module")
def process_settings() -> Iterator[None]:
    """One thread, and the switches of the whole process that training changes back as they were afterwards."""
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: the same weights for the same seed
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def error_line() -> Callable[..., str]:
    """error_line(main, *arguments) -> all that the command prints: one line that starts with "Error: "."""

    def run(main: click.Command, *arguments: object) -> str:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 1
        assert result.output.startswith("Error: ") and result.output.count("\n") == 1
        return result.output

    return run
