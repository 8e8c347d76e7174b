# SPDX-License-Identifier: MIT
"""Time the ops against the textbook way: zero insertion and depthwise convolution, one weight per sample.

The heads' 4x4 convolutions of stride 2 are compared with torch's.

    python tests/benchmarks/ops.py --threads 1

Both are timed alternately in the same run; the table shows medians and their ratio (above 1: ours is faster).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.choice import BACKENDS, set_backend
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.filters import design_lowpass_filter
from torch_utils.ops.halving_conv import halving_conv2d
from torch_utils.ops.modulated_conv import modulated_conv2d
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upsample2d


def naive_upfirdn2d(
    x: Tensor, f: Tensor, up: int = 1, down: int = 1, padding=(0, 0), gain: float = 1
) -> Tensor:
    """Zero insertion and depthwise convolution, same padding on both axes."""
    N, C, H, W = x.shape
    x = F.pad(x.reshape(N, C, H, 1, W, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(N, C, H * up, W * up)
    x = F.pad(x, [*padding, *padding])
    f = f.flip(list(range(f.ndim))) * gain ** (f.ndim / 2)
    if f.ndim == 1:
        x = F.conv2d(x, f[None, None, None, :].expand(C, 1, -1, -1), groups=C)
        x = F.conv2d(x, f[None, None, :, None].expand(C, 1, -1, -1), groups=C)
    else:
        x = F.conv2d(x, f.expand(C, 1, -1, -1), groups=C)
    return x[:, :, ::down, ::down]


def naive_filtered_lrelu(x, fu, fd, b, up, down, padding, clamp):
    """Plain composition."""
    x = naive_upfirdn2d(x + b[:, None, None], fu, up=up, padding=padding, gain=up**2)
    x = (F.leaky_relu(x, 0.2) * 2**0.5).clamp(-clamp, clamp)
    return naive_upfirdn2d(x, fd, down=down)


def naive_modulated_conv2d(x, w, s, padding):
    """One weight per sample in a grouped convolution."""
    N, C, H, W = x.shape
    w = w * w.square().mean([1, 2, 3], keepdim=True).rsqrt()
    s = s * s.square().mean().rsqrt()
    w = w[None] * s[:, None, :, None, None]
    w = w * (w.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    x = F.conv2d(x.reshape(1, N * C, H, W), w.flatten(0, 1), padding=padding, groups=N)
    return x.unflatten(1, (N, -1)).squeeze(0)


def lrelu_case(batch: int, channels: int, size: int, radial: bool = False):
    """What follows a 3x3 convolution in the synthesis network: maps about as large as before, 12 taps."""
    fu = design_lowpass_filter(12, 2.0, 4.5, 32)
    fd = design_lowpass_filter(12, 3.0, 5.0, 32, radial=radial)
    x, b = torch.randn(batch, channels, size + 2, size + 2), torch.randn(channels)
    padding = (9, 8)  # (2 * (size + 2) + 9 + 8 - 22 + 1) // 2 = size
    arguments = {"up": 2, "down": 2, "clamp": 256}
    return (
        x,
        lambda x: filtered_lrelu(x, fu, fd, b, padding=list(padding) * 2, **arguments),
        lambda x: naive_filtered_lrelu(x, fu, fd, b, padding=padding, **arguments),
    )


def conv_case(batch: int, channels: int, size: int):
    """A modulated 3x3 convolution."""
    w, s = torch.randn(channels, channels, 3, 3, requires_grad=True), torch.randn(batch, channels)
    x = torch.randn(batch, channels, size, size)
    return x, lambda x: modulated_conv2d(x, w, s, padding=2), lambda x: naive_modulated_conv2d(x, w, s, 2)


def halving_case(batch: int, channels_in: int, channels_out: int, size: int):
    """A 4x4 convolution of stride 2, as in D's heads."""
    x = torch.randn(batch, channels_in, size, size).contiguous(memory_format=torch.channels_last)
    w = (torch.randn(channels_out, channels_in, 4, 4) / channels_in**0.5).requires_grad_()
    return x, lambda x: halving_conv2d(x, w), lambda x: F.conv2d(x, w, stride=2, padding=1)


def resample_case(name: str, batch: int, channels: int, size: int):
    """A 12-tap resampling of images, or the 25-tap blur of the discriminator's input."""
    x, f = torch.randn(batch, channels, size, size), setup_filter(torch.rand(25 if name == "blur" else 12))
    if name == "upsample2d":
        return x, lambda x: upsample2d(x, f), lambda x: naive_upfirdn2d(x, f, up=2, padding=(6, 5), gain=4)
    if name == "downsample2d":
        return x, lambda x: downsample2d(x, f), lambda x: naive_upfirdn2d(x, f, down=2, padding=(5, 5))
    return x, lambda x: filter2d(x, f), lambda x: naive_upfirdn2d(x, f, padding=(12, 12))


CASES = {
    "filtered_lrelu 32x32x14": lambda: lrelu_case(32, 32, 14),
    "filtered_lrelu 32x32x22": lambda: lrelu_case(32, 32, 22),
    "filtered_lrelu 32x32x36": lambda: lrelu_case(32, 32, 36),
    "filtered_lrelu 4x32x84": lambda: lrelu_case(4, 32, 84),
    "filtered_lrelu 1x32x148": lambda: lrelu_case(1, 32, 148),
    "filtered_lrelu 1x16x276": lambda: lrelu_case(1, 16, 276),
    "filtered_lrelu radial 32x32x22": lambda: lrelu_case(32, 32, 22, radial=True),
    "filtered_lrelu radial 1x1024x36": lambda: lrelu_case(1, 1024, 36, radial=True),
    "modulated_conv2d 32x32x22": lambda: conv_case(32, 32, 22),
    "modulated_conv2d 32x64x22": lambda: conv_case(32, 64, 22),
    "halving_conv2d 4x64x112 to 64": lambda: halving_case(4, 64, 64, 112),
    "halving_conv2d 4x64x56 to 128": lambda: halving_case(4, 64, 128, 56),
    "halving_conv2d 4x128x28 to 256": lambda: halving_case(4, 128, 256, 28),
    "halving_conv2d 4x256x14 to 512": lambda: halving_case(4, 256, 512, 14),
    "halving_conv2d 16x512x14 to 512": lambda: halving_case(16, 512, 512, 14),
    "halving_conv2d 32x64x8 to 128": lambda: halving_case(32, 64, 128, 8),
    "halving_conv2d 32x128x4 to 128": lambda: halving_case(32, 128, 128, 4),
    "upsample2d 32x32x22": lambda: resample_case("upsample2d", 32, 32, 22),
    "downsample2d 32x32x44": lambda: resample_case("downsample2d", 32, 32, 44),
    "filter2d (blur) 32x3x64": lambda: resample_case("blur", 32, 3, 64),
    "filter2d (blur) 4x3x256": lambda: resample_case("blur", 4, 3, 256),
}


def forward(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One inference pass."""
    with torch.no_grad():
        return fn(x)


def forward_backward(fn: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """One training pass."""
    y = fn(x.requires_grad_())
    y.backward(torch.ones_like(y))


def compare(run: Callable, ours: Callable, naive: Callable, x: Tensor, repeats: int) -> tuple[float, float]:
    """Median milliseconds of (ours, naive), alternating."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 2):  # two to warm up
        for fn, record in zip((ours, naive), times, strict=True):
            start = time.perf_counter()
            run(fn, x)
            if repeat >= 2:
                record.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each function")
    parser.add_argument("--ops", default="auto", choices=BACKENDS, help="which implementation is ours")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_backend(args.ops)
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.ops}; milliseconds ours / naive, and the ratio"
    )
    for name, make_case in CASES.items():
        if args.only not in name:
            continue
        x, ours, naive = make_case()
        torch.testing.assert_close(forward(ours, x), forward(naive, x), rtol=1e-4, atol=1e-4)
        columns = []
        for label, run in (("forward", forward), ("with backward", forward_backward)):
            ms_ours, ms_naive = compare(run, ours, naive, x.clone(), args.repeats)
            columns.append(f"{label} {ms_ours:7.1f} / {ms_naive:7.1f} = {ms_naive / ms_ours:4.1f}x")
        print(f"{name:32s} {'   '.join(columns)}", flush=True)


if __name__ == "__main__":
    main()
