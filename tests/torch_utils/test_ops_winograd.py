# SPDX-License-Identifier: MIT
"""Winograd convolutions against `F.conv2d`: values, derivatives of two orders, rounding, batches, when they serve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops import choice, winograd
from torch_utils.ops.modulated_conv import modulated_conv2d
from torch_utils.ops.winograd import conv3x3


@pytest.fixture
def cpp(monkeypatch):
    """The C++ operators are there and wanted."""
    reason = winograd.reason_for_absence()
    if reason:
        pytest.skip(f"the C++ operators cannot be built here: {reason}")
    monkeypatch.setattr(choice, "_chosen", "cpp")


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def direct(x, w, padding):
    x = x if padding >= 0 else x[:, :, -padding:padding, -padding:padding]
    return F.conv2d(x, w, padding=max(padding, 0))


def derivatives(run, x, w, padding):
    """Output, gradients, and gradients of a function of the gradients: with respect to x, w and what came in."""
    x, w = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w))
    out = run(x, w, padding)
    r = torch.linspace(-1, 3, out.numel(), dtype=x.dtype).sin().view_as(out).requires_grad_()
    grads = torch.autograd.grad(out, [x, w], r, create_graph=True)
    energy = sum((grad * torch.linspace(0, 5, grad.numel()).cos().view_as(grad)).sum() for grad in grads)
    return [out, *grads, *torch.autograd.grad(energy, [x, w, r])]


# One tile and less, one more than whole tiles, fewer and more than eight tiles in a row, several blocks of rows.
SIZES = [(3, 3), (5, 7), (4, 50), (33, 31), (38, 38), (86, 86)]


@pytest.mark.parametrize("padding", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("channels_in", "channels_out"), [(1, 1), (3, 5), (9, 17)])
def test_equals_the_direct_convolution(cpp, padding, size, channels_in, channels_out):
    if min(size) + 2 * padding < 3:
        pytest.skip("smaller than the kernel")
    x = torch.randn(3, channels_in, *size, dtype=torch.float64)
    w = torch.randn(channels_out, channels_in, 3, 3, dtype=torch.float64)
    for actual, expected in zip(
        derivatives(conv3x3, x, w, padding), derivatives(direct, x, w, padding), strict=True
    ):
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("padding", [0, 2])
def test_numerical_gradients(cpp, padding):
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: conv3x3(x, w, padding), (x, w))
    torch.autograd.gradgradcheck(lambda x, w: conv3x3(x, w, padding), (x, w))


@pytest.mark.parametrize("channels", [64, 1024])
def test_rounding_is_that_of_the_direct_convolution(cpp, channels):
    x, w = torch.randn(1, channels, 14, 14), torch.randn(64, channels, 3, 3)
    w = w / w.square().sum(dim=[1, 2, 3], keepdim=True).sqrt()
    truth = derivatives(direct, x.double(), w.double(), 2)
    limits = [3e-6, 3e-6, 3e-6, 1e-5, 1e-5, 1e-5]
    for actual, exact, limit in zip(derivatives(conv3x3, x, w, 2), truth, limits, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual.double(), exact) < limit


@pytest.mark.parametrize("size", [(10, 10), (38, 38), (90, 86)])
def test_an_image_does_not_depend_on_its_batch(cpp, size):
    x, w = torch.randn(5, 40, *size, requires_grad=True), torch.randn(48, 40, 3, 3)
    out = conv3x3(x, w, 2)
    r = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, r)
    for n in (0, 3):
        one = x[n : n + 1].detach().requires_grad_()
        alone = conv3x3(one, w, 2)
        assert torch.equal(alone[0], out[n])
        assert torch.equal(torch.autograd.grad(alone, one, r[n : n + 1])[0][0], grad[n])


@pytest.mark.parametrize("count", [1, 2])
def test_number_of_threads_changes_no_more_than_rounding(cpp, count):
    x, w = torch.randn(2, 40, 38, 38), torch.randn(48, 40, 3, 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        found = derivatives(conv3x3, x, w, 2)
    finally:
        torch.set_num_threads(threads)
    for actual, expected in zip(found, derivatives(direct, x.double(), w.double(), 2), strict=True):
        assert relative_error(actual.double(), expected) < 1e-5


def test_memory_formats(cpp):
    x, w = torch.randn(2, 9, 13, 11), torch.randn(8, 9, 3, 3)
    expected = derivatives(conv3x3, x, w, 1)
    views = [
        (x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)),
        (x.transpose(2, 3).contiguous().transpose(2, 3), w.transpose(0, 1).contiguous().transpose(0, 1)),
    ]
    for a, b in views:
        for actual, value in zip(derivatives(conv3x3, a, b, 1), expected, strict=True):
            assert torch.equal(actual, value)
    wide = torch.randn(2, 9, 13, 22)[:, :, :, ::2]
    assert torch.equal(conv3x3(wide, w, 1), conv3x3(wide.contiguous(), w, 1))


def test_no_images(cpp):
    x, w = torch.zeros(0, 3, 8, 8, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)
    out = conv3x3(x, w, 2)
    assert out.shape == (0, 5, 10, 10)
    grad_x, grad_w = torch.autograd.grad(out.sum(), [x, w])
    assert grad_x.shape == x.shape
    assert torch.equal(grad_w, torch.zeros_like(w))


def test_not_a_number_is_not_hidden(cpp):
    x, w = torch.randn(2, 3, 12, 12), torch.randn(5, 3, 3, 3)
    clean = conv3x3(x, w, 1)
    x[1, 2, 5, 5] = float("nan")
    out = conv3x3(x, w, 1)
    assert out[1, :, 4:7, 4:7].isnan().all()
    assert torch.equal(out[0], clean[0])


def test_keeps_only_what_gradients_need(cpp):
    x, w, kept = torch.randn(1, 8, 12, 12, requires_grad=True), torch.randn(8, 8, 3, 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conv3x3(x, w, 1)
    assert [t.shape for t in kept] == [w.shape]


def test_operators_keep_the_rules_of_torch_library(cpp):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    conv, weight_gradient = (
        torch.ops.stylesan_cpu.winograd_conv.default,
        torch.ops.stylesan_cpu.winograd_weight_gradient.default,
    )
    torch.library.opcheck(conv, (leaf(2, 3, 8, 7), leaf(4, 3, 3, 3), 2, False))
    torch.library.opcheck(conv, (leaf(2, 4, 8, 7), leaf(4, 3, 3, 3), 0, True))
    torch.library.opcheck(weight_gradient, (leaf(2, 3, 8, 7), leaf(2, 4, 10, 9), 2))


def test_compiles_without_graph_breaks(cpp):
    x, w = torch.randn(1, 64, 31, 31, requires_grad=True), torch.randn(64, 64, 3, 3) / 24
    s = torch.randn(1, 64)

    def run(x):
        return modulated_conv2d(x * 2, w, s, padding=2).square().sum()

    expected = run(x)
    actual = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize(
    ("x", "w", "padding", "message"),
    [
        (torch.zeros(1, 3, 8, 8), torch.zeros(4, 2, 3, 3), 1, "does not fit input"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 1, 1), 1, "does not fit input"),
        (torch.zeros(3, 8, 8), torch.zeros(4, 3, 3, 3), 1, "does not fit input"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3, dtype=torch.float64), 1, "need both in float32"),
        (torch.zeros(1, 3, 8, 8).half(), torch.zeros(4, 3, 3, 3).half(), 1, "need both in float32"),
        (torch.zeros(1, 3, 8, 2), torch.zeros(4, 3, 3, 3), 0, "smaller than 3x3: increase it"),
    ],
)
def test_wrong_arguments(cpp, x, w, padding, message):
    with pytest.raises(ValueError, match=message):
        conv3x3(x, w, padding)


# When it serves.


class Calls(list):
    def __call__(self, x, w, padding):
        self.append(padding)
        return F.conv2d(x, w, padding=padding)


@pytest.fixture
def calls(monkeypatch):
    """Paddings of the calls of `conv3x3` by modulated convolutions."""
    calls = Calls()
    monkeypatch.setattr(winograd, "conv3x3", calls)
    monkeypatch.setattr(winograd, "reason_for_absence", lambda: "")
    monkeypatch.setattr(choice, "_chosen", "auto")
    return calls


def modulated(channels=64, size=36, kernel=3, padding=2, dtype=torch.float32, device="cpu"):
    x = torch.ones(1, channels, size, size, dtype=dtype, device=device)
    w = torch.ones(channels, channels, kernel, kernel, device=device)
    return modulated_conv2d(x, w, torch.ones(1, channels, device=device), padding=padding)


def test_serves_modulated_convolutions(calls, monkeypatch):
    modulated()
    monkeypatch.setattr(choice, "_chosen", "cpp")
    modulated(padding=1)
    assert calls == [2, 1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"channels": 48},
        {"size": 16},
        {"kernel": 1, "padding": 0},
        {"padding": (2, 1)},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"device": "meta"},
    ],
)
def test_leaves_the_rest_to_torch(calls, arguments):
    modulated(**arguments)
    assert calls == []


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_backends_do_without(calls, monkeypatch, backend):
    monkeypatch.setattr(choice, "_chosen", backend)
    modulated()
    assert calls == []


def test_without_a_compiler_torch_convolves(calls, monkeypatch):
    monkeypatch.setattr(winograd, "reason_for_absence", lambda: "there is no ninja")
    modulated()
    assert calls == []


@pytest.mark.parametrize("batch", [1, 3])
def test_modulated_convolution_is_the_same_either_way(cpp, monkeypatch, batch):
    x, w, s = torch.randn(batch, 64, 36, 36), torch.randn(72, 64, 3, 3), torch.randn(batch, 64)
    found = []
    for backend in ("cpp", "reference"):
        monkeypatch.setattr(choice, "_chosen", backend)
        found.append(derivatives(lambda x, w, padding: modulated_conv2d(x, w, s, padding=padding), x, w, 2))
    for actual, expected in zip(*found, strict=True):
        assert not torch.equal(actual, expected)
        assert relative_error(actual, expected) < 1e-5
