# SPDX-License-Identifier: MIT
"""Time Winograd's 3x3 convolutions against torch's, forward and both gradients.

    python tests/benchmarks/winograd.py --threads 1 --batch 1 --channels 64,256 --sizes 36,84

Both run alternately in one process; medians, and ratios (above 1: Winograd's is faster). `pays` is measured against.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from torch_utils.cpu import tune_for_training
from torch_utils.ops import winograd

PADDING = 2  # that of the synthesis network


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def passes(batch: int, channels: int, size: int):
    """(torch's, ours) for output, gradient of the input, gradient of the weight; then torch's of both gradients."""
    x, w = torch.randn(batch, channels, size, size), torch.randn(channels, channels, 3, 3)
    grad = torch.randn(batch, channels, size + 2, size + 2)
    ops = torch.ops.stylesan_cpu

    def backward(*wanted: bool):
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, w, None, [1, 1], [PADDING] * 2, [1, 1], False, [0, 0], 1, [*wanted, False]
        )

    return [
        lambda: torch.conv2d(x, w, padding=PADDING),
        lambda: ops.winograd_conv(x, w, PADDING, False),
        backward(True, False),
        lambda: ops.winograd_conv(grad, w, 2 - PADDING, True),
        backward(False, True),
        lambda: ops.winograd_weight_gradient(x, grad, PADDING),
        backward(True, True),
    ]


def medians(functions, repeats: int) -> list[float]:
    """Milliseconds of each, in turn, after one round that warms up."""
    found = [[] for _ in functions]
    for round_number in range(repeats + 1):
        for times, function in zip(found, functions, strict=True):
            start = time.perf_counter()
            function()
            if round_number:
                times.append((time.perf_counter() - start) * 1000)
    return [statistics.median(times) for times in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=numbers, default=[64, 256, 1024])
    parser.add_argument("--sizes", type=numbers, default=[36, 84])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_for_training()
    if reason := winograd.reason_for_absence():
        sys.exit(f"the C++ operators cannot be used: {reason}")
    print("channels  size   torch ms   ours ms   ratio forward   input   weight   all")
    for channels in args.channels:
        for size in args.sizes:
            a, b, c, d, e, f, both = medians(passes(args.batch, channels, size), args.repeats)
            ratios = f"{a / b:13.2f} {c / d:7.2f} {e / f:8.2f} {(a + both) / (b + d + f):5.2f}"
            print(f"{channels:8} {size:5} {a + both:10.1f} {b + d + f:9.1f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
