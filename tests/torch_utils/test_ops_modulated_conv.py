# SPDX-License-Identifier: MIT
"""Modulated convolution against recorded values and one weight per sample, with gradients of two orders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops.modulated_conv import modulated_conv2d

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "g_ops_modconv_fc.npz")
META = json.loads(str(GOLDEN["meta_json"]))
CASES = [case for case in META if case.startswith("mod")]


@pytest.mark.parametrize("case", CASES)
def test_golden_values_and_gradients(case, assert_near):
    arguments = {k: META[case][k] for k in ("demodulate", "padding")}
    data = {k.split("/")[1]: torch.tensor(GOLDEN[k]) for k in GOLDEN.files if k.startswith(case + "/")}
    s, x, w, r = (data[k].requires_grad_() for k in "sxwr")
    out = modulated_conv2d(x, w, s, input_gain=data.get("input_gain"), **arguments)
    assert_near(out, data["out"].numpy(), 1e-5)
    grads = torch.autograd.grad((out * r).sum(), [s, x, w], create_graph=True)
    for name, grad in zip("sxw", grads, strict=True):
        assert_near(grad, data["d" + name].numpy(), 3e-4)
    second = torch.autograd.grad((grads[0] * data["q"]).sum(), [s, x, w, r], allow_unused=True)
    for name, grad in zip("sxwr", second, strict=True):
        assert_near(grad, data["gg_" + name].numpy(), 3e-4)


def naive_modulated_conv2d(x, w, s, demodulate, padding, input_gain):
    """One weight per sample, one convolution per sample."""
    if demodulate:
        w = w * w.square().mean(dim=[1, 2, 3], keepdim=True).rsqrt()
        s = s * s.square().mean().rsqrt()
    weights = w[None] * s[:, None, :, None, None]  # (N, O, I, kh, kw)
    if demodulate:
        weights = weights * (weights.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    weights = weights * input_gain.expand_as(s)[:, None, :, None, None]
    return torch.cat([F.conv2d(x[i : i + 1], weights[i], padding=padding) for i in range(len(x))])


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("kernel", "padding"), [((1, 1), 0), ((3, 3), 2), ((1, 3), (0, 1))])
@pytest.mark.parametrize("gain_shape", [(), (5,), (3, 5)])
def test_equals_one_weight_per_sample(demodulate, kernel, padding, gain_shape):
    x = torch.randn(3, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 5, *kernel, dtype=torch.float64, requires_grad=True)
    s = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(gain_shape, dtype=torch.float64, requires_grad=True)
    actual = modulated_conv2d(x, w, s, demodulate, padding, gain)
    expected = naive_modulated_conv2d(x, w, s, demodulate, padding, gain)
    torch.testing.assert_close(actual, expected)
    r = torch.randn_like(expected)
    actual_grads, expected_grads = (
        torch.autograd.grad((y * r).sum(), [x, w, s, gain]) for y in (actual, expected)
    )
    torch.testing.assert_close(actual_grads, expected_grads)


def test_the_added_epsilon_matters_for_vanishing_styles():
    x, w = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 1, 1, dtype=torch.float64)
    s = torch.tensor(
        [[1.0, 2.0, 3.0], [1e-4, 2e-4, 1e-4]], dtype=torch.float64
    )  # the mean is over both samples
    expected = naive_modulated_conv2d(x, w, s, True, 0, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(modulated_conv2d(x, w, s), expected)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_demodulation_undoes_the_scale_of_weight_and_style(factor):
    x, w, s = torch.randn(2, 5, 7, 6), torch.randn(4, 5, 3, 3), torch.randn(2, 5)
    expected = modulated_conv2d(x, w, s, padding=2)
    torch.testing.assert_close(modulated_conv2d(x, factor * w, s / factor, padding=2), expected)


def test_half_precision_does_not_overflow():
    x, w, s = torch.full([1, 64, 4, 4], 200.0), torch.ones(2, 64, 3, 3), torch.ones(1, 64)
    low = modulated_conv2d(x.half(), w, s, padding=2)
    assert low.dtype == torch.half
    torch.testing.assert_close(low.float(), modulated_conv2d(x, w, s, padding=2), rtol=1e-2, atol=1)


@pytest.mark.parametrize(
    ("w_shape", "s_shape"), [((4, 6, 3, 3), (2, 5)), ((4, 5, 3), (2, 5)), ((4, 5, 3, 3), (1, 5))]
)
def test_shapes_that_do_not_fit(w_shape, s_shape):
    with pytest.raises(ValueError, match=r"does not fit|must be"):
        modulated_conv2d(torch.zeros(2, 5, 4, 4), torch.zeros(w_shape), torch.zeros(s_shape))
