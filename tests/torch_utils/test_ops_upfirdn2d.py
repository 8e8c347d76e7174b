# SPDX-License-Identifier: MIT
"""Resampling against recorded values and against zero insertion + depthwise convolution, with gradients."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops import banded
from torch_utils.ops import upfirdn2d as ops

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "g_ops_upfirdn2d.npz")
META = json.loads(str(GOLDEN["meta_json"]))
CASES = [case for case in META if case.startswith("case")]
SETUPS = [case for case in META if case.startswith("setup")]


def naive_upfirdn2d(x, f, up, down, padding, flip_filter=False, gain=1):
    """Zero insertion, padding, depthwise convolution, decimation; factors are (x, y)."""
    N, C, H, W = x.shape
    x = F.pad(x.reshape(N, C, H, 1, W, 1), [0, up[0] - 1, 0, 0, 0, up[1] - 1]).reshape(
        N, C, H * up[1], W * up[0]
    )
    x = F.pad(x, padding)
    f = torch.ones(1, 1, dtype=x.dtype) if f is None else f
    f = torch.outer(f, f) if f.ndim == 1 else f
    f = f if flip_filter else f.flip([0, 1])
    x = F.conv2d(x, f.expand(C, 1, -1, -1) * gain, groups=C)
    return x[:, :, :: down[1], :: down[0]]


@pytest.mark.parametrize("case", CASES)
def test_golden_values_and_gradients(case, assert_near):
    function = getattr(ops, META[case]["fn"])
    arguments = {
        k: v for k, v in META[case].items() if k in inspect.signature(function).parameters and k != "f"
    }
    data = {k.split("/")[1]: torch.tensor(GOLDEN[k]) for k in GOLDEN.files if k.startswith(case + "/")}
    x, r = data["x"].requires_grad_(), data["r"].requires_grad_()
    out = function(x, data.get("f"), **arguments)
    assert_near(out, data["out"].numpy(), 1e-5)
    (dx,) = torch.autograd.grad((out * r).sum(), x, create_graph=True)
    assert_near(dx, data["dx"].numpy(), 3e-4)
    gg_x, gg_r = torch.autograd.grad((dx * data["q"]).sum(), [x, r], allow_unused=True)
    assert_near(gg_x, data["gg_x"].numpy(), 3e-4)
    assert_near(gg_r, data["gg_r"].numpy(), 3e-4)


@pytest.mark.parametrize("case", SETUPS)
def test_golden_setup_filter(case, assert_near):
    f = ops.setup_filter(**META[case])
    assert f.dtype == torch.float32
    assert_near(f, GOLDEN[case + "/f"], 1e-6)


FACTORS = [((1, 1), (1, 1)), ((2, 3), (1, 1)), ((1, 1), (3, 2)), ((2, 1), (1, 2)), ((3, 2), (2, 4))]
FILTERS = [None, (1,), (5,), (12,), (3, 4), (1, 6)]


@pytest.mark.parametrize(("factors", "filter_shape"), list(itertools.product(FACTORS, FILTERS)))
def test_equals_zero_insertion_on_odd_sizes(factors, filter_shape):
    up, down = factors
    f = None if filter_shape is None else torch.randn(filter_shape, dtype=torch.float64)
    x = torch.randn(2, 3, 13, 11, dtype=torch.float64, requires_grad=True)
    for padding, flip_filter, gain in (([3, 4, 5, 2], False, 1.0), ([-1, 4, 3, -2], True, 2.5)):
        actual = ops.upfirdn2d(x, f, up, down, padding, flip_filter, gain)
        expected = naive_upfirdn2d(x, f, up, down, padding, flip_filter, gain)
        torch.testing.assert_close(actual, expected)
        r = torch.randn_like(expected)
        actual_dx, expected_dx = (torch.autograd.grad((y * r).sum(), x)[0] for y in (actual, expected))
        torch.testing.assert_close(actual_dx, expected_dx)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (4, 2), (3, 5)])
@pytest.mark.parametrize("padding", [[7, 8, 6, 5], [-20, 3, 40, -31], [200, -90, 0, 0]])
def test_large_images_are_cut_into_blocks_without_a_trace(up, down, padding):
    x = torch.randn(1, 2, 150, 97, dtype=torch.float64, requires_grad=True)
    f = torch.randn(12, dtype=torch.float64)
    assert max(x.shape) > banded.MAX_DENSE_SIZE
    actual = ops.upfirdn2d(x, f, up, down, padding)
    expected = naive_upfirdn2d(x, f, (up, up), (down, down), padding)
    torch.testing.assert_close(actual, expected)
    r = torch.randn_like(expected)
    actual_dx, expected_dx = (torch.autograd.grad((y * r).sum(), x)[0] for y in (actual, expected))
    torch.testing.assert_close(actual_dx, expected_dx)


@pytest.mark.parametrize("filter_shape", [(5,), (3, 4)])
def test_numerical_gradients(filter_shape):
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    f = torch.randn(filter_shape, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: ops.upfirdn2d(x, f, up=2, down=3, padding=3), x)
    torch.autograd.gradgradcheck(lambda x: ops.upfirdn2d(x, f, up=2, down=3, padding=3), x)


@pytest.mark.parametrize("f", [None, torch.rand(9), torch.rand(4, 4)], ids=["none", "separable", "2d"])
def test_linear_and_independent_across_samples_and_channels(f):
    x, y = torch.randn(2, 3, 4, 9, 8)

    def run(x):
        return ops.upfirdn2d(x, f, up=2, down=3, padding=5)

    torch.testing.assert_close(run(2 * x - 3 * y), 2 * run(x) - 3 * run(y))
    torch.testing.assert_close(run(x)[1:, 2:3], run(x[1:, 2:3].contiguous()))


@pytest.mark.parametrize("taps", [1, 4, 7, 12])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_wrappers_scale_sizes_and_keep_brightness(taps, factor):
    f = ops.setup_filter(torch.ones(taps), separable=True)
    x = torch.ones(1, 1, 24, 32)
    up, down = ops.upsample2d(x, f, up=factor), ops.downsample2d(x, f, down=factor)
    assert up.shape[2:] == (24 * factor, 32 * factor)
    assert down.shape[2:] == (24 // factor, 32 // factor)
    torch.testing.assert_close(down[:, :, down.shape[2] // 2, down.shape[3] // 2], torch.ones(1, 1))
    torch.testing.assert_close(ops.filter2d(x, f)[:, :, 12, 16], torch.ones(1, 1))
    if taps % factor == 0:  # otherwise the box filter meets unequal numbers of samples
        torch.testing.assert_close(up[:, :, 12 * factor, 16 * factor], torch.ones(1, 1))


def test_a_filter_that_changes_its_values_is_followed():
    x, f = torch.randn(1, 1, 20, 20), torch.rand(12)
    before = ops.upfirdn2d(x, f)
    f.copy_(torch.rand(12))
    torch.testing.assert_close(ops.upfirdn2d(x, f), naive_upfirdn2d(x, f, (1, 1), (1, 1), [0] * 4))
    assert not torch.allclose(ops.upfirdn2d(x, f), before)


def test_training_after_inference_mode():
    x, f = torch.randn(1, 1, 19, 21), torch.rand(12)
    with torch.inference_mode():
        inferred = ops.upsample2d(x, f)
    trained = ops.upsample2d(x.requires_grad_(), f)
    trained.square().sum().backward()
    torch.testing.assert_close(trained, inferred)


def test_memory_layout_and_dtype_do_not_matter():
    x, f = torch.randn(2, 3, 10, 12), torch.rand(12)
    expected = ops.upsample2d(x, f)
    torch.testing.assert_close(ops.upsample2d(x.to(memory_format=torch.channels_last), f), expected)
    low = ops.upsample2d(x.bfloat16(), f)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_the_input_is_left_alone():
    x = torch.randn(1, 1, 8, 8)
    for f in (None, torch.rand(9), torch.rand(2, 2)):
        copy = x.clone()
        ops.upfirdn2d(x, f, padding=4)
        assert torch.equal(x, copy)


@pytest.mark.parametrize("f", [torch.ones(12), torch.ones(12, 1)], ids=["separable", "2d"])
def test_padding_too_small(f):
    with pytest.raises(ValueError, match=r"4 pixels x up 2 \+ padding 1 \+ 2 = 11 .* 12 taps: increase"):
        ops.upfirdn2d(torch.zeros(1, 1, 4, 40), f, up=2, padding=[0, 0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(1, 4, 4)}, r"\(1, 4, 4\): need \(N, C, H, W\)"),
        ({"f": torch.ones(1, 1, 1)}, r"filter of shape \(1, 1, 1\)"),
        ({"f": torch.ones(())}, r"filter of shape \(\)"),
        ({"up": 0}, "factor 0"),
        ({"down": [1, 0]}, r"factor \[1, 0\]"),
        ({"padding": [1, 2, 3]}, r"padding \[1, 2, 3\]"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.upfirdn2d(**({"x": torch.zeros(1, 1, 4, 4), "f": None} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"f": torch.ones(2, 2, 2)}, r"\(2, 2, 2\)"),
        ({"f": []}, r"\(0,\)"),
        ({"f": [[1, 2], [3, 4]], "separable": True}, "cannot be separable"),
    ],
)
def test_wrong_filters(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.setup_filter(**arguments)
