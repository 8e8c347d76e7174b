# SPDX-License-Identifier: MIT
"""The peak of memory is this process's own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from torch_utils.cpu import peak_memory

ROOT = Path(__file__).parents[2]


def test_peak_grows_and_stays():
    block = np.ones(2**28, dtype=np.uint8)
    peak = peak_memory()
    assert peak > block.nbytes
    del block
    assert peak_memory() > 0.99 * peak  # the system counts in steps of some pages


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system counts for each process anyway")
def test_peak_of_a_process_is_not_that_of_its_parent():
    block = np.ones(3 * 2**29, dtype=np.uint8)
    code = "from torch_utils.cpu import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 2**24 < int(done.stdout) < block.nbytes
