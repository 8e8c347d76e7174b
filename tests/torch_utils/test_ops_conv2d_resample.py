# SPDX-License-Identifier: MIT
"""Convolution with resampling against recorded values and against the plain chain of operations."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import setup_filter

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "g_ops_conv2d_resample.npz")
CASES = json.loads(str(GOLDEN["meta_json"]))


@pytest.mark.parametrize("case", CASES)
def test_golden_values_and_gradients(case, assert_near):
    known = set(inspect.signature(conv2d_resample).parameters) - {"f"}
    arguments = {k: v for k, v in CASES[case].items() if k in known}
    data = {k.split("/")[1]: torch.tensor(GOLDEN[k]) for k in GOLDEN.files if k.startswith(case + "/")}
    x, w, r = (data[k].requires_grad_() for k in "xwr")
    out = conv2d_resample(x, w, data.get("f"), **arguments)
    assert_near(out, data["out"].numpy(), 1e-5)
    dx, dw = torch.autograd.grad((out * r).sum(), [x, w], create_graph=True)
    assert_near(dx, data["dx"].numpy(), 3e-4)
    assert_near(dw, data["dw"].numpy(), 3e-4)
    second = torch.autograd.grad((dx * data["q"]).sum(), [x, w, r], allow_unused=True)
    for name, grad in zip("xwr", second, strict=True):
        assert_near(grad, data["gg_" + name].numpy(), 3e-4)


def naive_conv2d_resample(x, w, f, up, down, padding, groups):
    """Insert zeros, pad, filter, convolve at the full rate, filter, drop, in this order."""
    N, C, H, W = x.shape
    taps = f.shape[0]
    extra = [0, 0]
    if up > 1:
        extra = [(taps + up - 1) // 2, (taps - up) // 2]
    if down > 1:
        extra = [extra[0] + (taps - down + 1) // 2, extra[1] + (taps - down) // 2]
    x = F.pad(x.reshape(N, C, H, 1, W, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(N, C, H * up, W * up)
    x = F.pad(x, [p + e for p, e in zip(padding, extra * 2, strict=True)])
    kernel = torch.outer(f, f).flip([0, 1])
    if up > 1:
        x = F.conv2d(x, (kernel * up**2).expand(C, 1, -1, -1), groups=C)
    x = F.conv2d(x, w, groups=groups)
    if down > 1:
        x = F.conv2d(x, kernel.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])
    return x[:, :, ::down, ::down]


@pytest.mark.parametrize(
    ("kernel", "up", "down", "groups"),
    list(itertools.product([(1, 1), (3, 3), (2, 5)], [1, 2, 3], [1, 2], [1, 2])),
)
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (2, 1, 0, 3), (-1, 2, 1, 1)])
def test_equals_the_plain_chain_on_odd_sizes(kernel, up, down, groups, padding):
    x = torch.randn(2, 4, 11, 13, dtype=torch.float64)
    w = torch.randn(6, 4 // groups, *kernel, dtype=torch.float64)
    f = torch.rand(5, dtype=torch.float64)
    actual = conv2d_resample(x, w, f, up=up, down=down, padding=padding, groups=groups)
    torch.testing.assert_close(actual, naive_conv2d_resample(x, w, f, up, down, padding, groups))


def test_flipped_weight_is_a_true_convolution():
    x, w, f = torch.randn(1, 2, 9, 9), torch.randn(3, 2, 3, 3), setup_filter([1, 3, 3, 1])
    expected = conv2d_resample(x, w.flip([2, 3]), f, up=2, padding=1)
    torch.testing.assert_close(conv2d_resample(x, w, f, up=2, padding=1, flip_weight=False), expected)


def test_constant_image_keeps_its_value_inside():
    f = setup_filter([1, 3, 3, 1])
    w = torch.full([1, 1, 3, 3], 1 / 9)
    for factors in ({"up": 2}, {"down": 2}):
        out = conv2d_resample(torch.ones(1, 1, 16, 16), w, f, padding=1, **factors)
        centre = out.shape[2] // 2
        torch.testing.assert_close(out[0, 0, centre, centre], torch.ones(()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"up": 0}, "up=0"),
        ({"down": 0}, "down=0"),
        ({"w": torch.zeros(2, 3, 3, 3)}, "does not fit 4 input channels"),
        ({"w": torch.zeros(3, 2, 3, 3), "groups": 2}, "2 groups"),
        ({"w": torch.zeros(2, 4, 3)}, "four dimensions"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv2d_resample(**({"x": torch.zeros(1, 4, 8, 8), "w": torch.zeros(2, 4, 3, 3)} | arguments))
