# SPDX-License-Identifier: MIT
"""Filtered leaky ReLU against recorded values and the plain composition, with gradients of two orders.

The reference implementation; the others have files of their own.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops import choice
from torch_utils.ops import filtered_lrelu_reference as module
from torch_utils.ops.filtered_lrelu import filtered_lrelu

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "g_ops_filtered_lrelu.npz")
CASES = json.loads(str(GOLDEN["meta_json"]))
SQRT2 = 2**0.5


@pytest.fixture(autouse=True)
def reference_only(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", "reference")


def naive_upfirdn2d(x, f, up=1, down=1, padding=(0, 0, 0, 0), gain=1):
    N, C, H, W = x.shape
    x = F.pad(x.reshape(N, C, H, 1, W, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(N, C, H * up, W * up)
    f = torch.ones(1, 1, dtype=x.dtype) if f is None else f
    f = torch.outer(f, f) if f.ndim == 1 else f
    x = F.conv2d(F.pad(x, padding), f.flip([0, 1]).expand(C, 1, -1, -1) * gain, groups=C)
    return x[:, :, ::down, ::down]


def naive_filtered_lrelu(x, fu, fd, b, up, down, padding, gain=SQRT2, slope=0.2, clamp=None):
    x = x if b is None else x + b[:, None, None]
    x = F.leaky_relu(naive_upfirdn2d(x, fu, up=up, padding=padding, gain=up**2), slope) * gain
    x = x if clamp is None else x.clamp(-clamp, clamp)
    return naive_upfirdn2d(x, fd, down=down)


@pytest.mark.parametrize("case", CASES)
def test_golden_values_and_gradients(case, assert_near):
    known = set(inspect.signature(filtered_lrelu).parameters) - {"fu", "fd", "b"}
    arguments = {k: v for k, v in CASES[case].items() if k in known}
    data = {k.split("/")[1]: torch.tensor(GOLDEN[k]) for k in GOLDEN.files if k.startswith(case + "/")}
    inputs = {k: data[k].requires_grad_() for k in ("x", "b") if k in data}
    r = data["r"].requires_grad_()
    out = filtered_lrelu(inputs["x"], data.get("fu"), data.get("fd"), inputs.get("b"), **arguments)
    assert_near(out, data["out"].numpy(), 1e-5)
    plain = torch.autograd.grad((out * r).sum(), list(inputs.values()), retain_graph=True)
    grads = torch.autograd.grad((out * r).sum(), list(inputs.values()), create_graph=True)
    for name, grad, plain_grad in zip(inputs, grads, plain, strict=True):
        assert_near(grad, data["d" + name].numpy(), 3e-4)
        assert_near(plain_grad, data["d" + name].numpy(), 3e-4)
    second = torch.autograd.grad((grads[0] * data["q"]).sum(), [*inputs.values(), r], allow_unused=True)
    for name, grad in zip([*inputs, "r"], second, strict=True):
        assert_near(grad, data["gg_" + name].numpy(), 3e-4)


FILTER_SHAPES = [((12,), (12,)), ((7,), (5,)), (None, (6,)), ((6,), None), ((4, 3), (5,)), ((5,), (4, 6))]


@pytest.mark.parametrize(("fu_shape", "fd_shape"), FILTER_SHAPES)
@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize(("up", "down"), [(2, 2), (4, 2), (2, 4), (3, 1), (1, 1)])
def test_equals_the_plain_composition_on_odd_sizes(fu_shape, fd_shape, clamp, up, down):
    fu, fd = (None if s is None else torch.randn(s, dtype=torch.float64) for s in (fu_shape, fd_shape))
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    arguments = (fu, fd, b, up, down, [11, 12, 14, 13])
    actual = filtered_lrelu(x, *arguments, slope=0.1, clamp=clamp)
    expected = naive_filtered_lrelu(x, *arguments, slope=0.1, clamp=clamp)
    torch.testing.assert_close(actual, expected)
    r = torch.randn_like(expected)
    actual_grads, expected_grads = (torch.autograd.grad((y * r).sum(), [x, b]) for y in (actual, expected))
    torch.testing.assert_close(actual_grads, expected_grads)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, 1.5])
@pytest.mark.parametrize("fd_shape", [(5,), (3, 3)])
def test_numerical_gradients(slope, fd_shape):
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)
    fu, fd = torch.rand(6, dtype=torch.float64), torch.rand(fd_shape, dtype=torch.float64)

    def run(x, b):
        return filtered_lrelu(x, fu, fd, b, up=2, down=2, padding=4, slope=slope, clamp=1.1)

    torch.autograd.gradcheck(run, (x, b))
    torch.autograd.gradgradcheck(run, (x, b))


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 2**30])
def test_chunks_do_not_change_the_result(monkeypatch, chunk_bytes):
    x, b = torch.randn(3, 5, 10, 9, requires_grad=True), torch.randn(5, requires_grad=True)
    fu, fd = torch.rand(12), torch.rand(12)
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    actual = filtered_lrelu(x, fu, fd, b, up=2, down=2, padding=11, clamp=3)
    expected = naive_filtered_lrelu(x, fu, fd, b, 2, 2, [11] * 4, clamp=3)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual_grads, expected_grads = (torch.autograd.grad(y.sum(), [x, b]) for y in (actual, expected))
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-4, atol=1e-2)


def test_inference_equals_training_and_leaves_the_input_alone():
    x, f = torch.randn(2, 3, 10, 9), torch.rand(12)
    for fd in (f, torch.rand(3, 3), None):
        arguments = {"fu": None if fd is None else f, "fd": fd, "padding": 11, "clamp": 0.5}
        copy = x.clone()
        with torch.no_grad():
            inferred = filtered_lrelu(x, **arguments)
        assert torch.equal(x, copy)
        assert torch.equal(filtered_lrelu(x.clone().requires_grad_(), **arguments), inferred)


def test_only_the_bias_is_trained():
    x, f, b = torch.randn(2, 3, 10, 9), torch.rand(12), torch.zeros(3, requires_grad=True)
    (grad,) = torch.autograd.grad(filtered_lrelu(x, f, f, b, 2, 2, 11).sum(), b)
    expected = naive_filtered_lrelu(x, f, f, b, 2, 2, [11] * 4).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(expected, b)[0], rtol=1e-4, atol=1e-3)


def test_homogeneous_without_bias_and_clamp():
    x, f = torch.randn(1, 2, 12, 12), torch.rand(12)
    torch.testing.assert_close(
        filtered_lrelu(3 * x, f, f, up=2, down=2, padding=11),
        3 * filtered_lrelu(x, f, f, up=2, down=2, padding=11),
    )


def test_slope_one_is_linear_resampling():
    x, f = torch.randn(1, 2, 12, 12), torch.rand(12)
    out = filtered_lrelu(x, f, f, up=2, down=2, padding=11, gain=1, slope=1)
    expected = naive_upfirdn2d(naive_upfirdn2d(x, f, up=2, padding=[11] * 4, gain=4), f, down=2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("gain", [0.0, -1.5])
def test_unusual_gains(gain):
    x, f = torch.randn(1, 2, 12, 12), torch.rand(12)
    out = filtered_lrelu(x, f, f, up=2, down=2, padding=11, gain=gain, clamp=0.4)
    expected = naive_filtered_lrelu(x, f, f, None, 2, 2, [11] * 4, gain=gain, clamp=0.4)
    torch.testing.assert_close(out, expected)


def test_clamp_of_zero_silences_everything():
    f = torch.rand(12)
    assert filtered_lrelu(torch.randn(1, 2, 12, 12), f, f, up=2, down=2, padding=11, clamp=0).eq(0).all()


@pytest.mark.parametrize(
    ("in_size", "up", "down", "padding"), [(22, 2, 2, (9, 8)), (9, 4, 2, (14, 15)), (17, 2, 4, (30, 5))]
)
def test_output_size(in_size, up, down, padding):
    taps_u, taps_d = 6 * up, 6 * down
    out = filtered_lrelu(
        torch.randn(1, 1, in_size, in_size),
        torch.rand(taps_u),
        torch.rand(taps_d),
        None,
        up,
        down,
        [*padding, *padding],
    )
    expected = (in_size * up + sum(padding) - (taps_u - 1) - (taps_d - 1) + down - 1) // down
    assert out.shape == (1, 1, expected, expected)


def test_low_precision_keeps_its_dtype():
    x, f = torch.randn(1, 2, 12, 12), torch.rand(12) / 6
    low = filtered_lrelu(x.bfloat16(), f, f, up=2, down=2, padding=11, b=torch.zeros(2))
    assert low.dtype == torch.bfloat16
    expected = filtered_lrelu(x, f, f, up=2, down=2, padding=11)
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, "need"),
        ({"b": torch.zeros(4)}, r"bias of shape \(4,\)"),
        ({"slope": -0.1}, "slope=-0.1"),
        ({"clamp": -1}, "clamp=-1"),
        ({"fu": torch.ones(20)}, "20 taps: increase the padding"),
        ({"fd": torch.ones(20)}, "20 taps: increase the padding"),
        ({"fd": torch.ones(1, 1, 1)}, r"filter of shape \(1, 1, 1\)"),
        ({"down": 0}, "factor 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        filtered_lrelu(**({"x": torch.zeros(1, 3, 8, 8), "fu": torch.ones(2)} | arguments))
