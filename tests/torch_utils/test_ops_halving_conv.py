# SPDX-License-Identifier: MIT
"""The halving convolution against `F.conv2d`: values, derivatives of two orders, rounding, batches, when it serves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops import choice, halving_conv
from torch_utils.ops.halving_conv import halving_conv2d


@pytest.fixture
def cpp(monkeypatch):
    """The C++ operators are there and wanted."""
    reason = halving_conv.reason_for_absence()
    if reason:
        pytest.skip(f"the C++ operators cannot be built here: {reason}")
    monkeypatch.setattr(choice, "_chosen", "cpp")


def direct(x, w, b, padding):
    return F.conv2d(x, w, b, stride=2, padding=padding)


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def derivatives(run, x, w, b, padding, is_twice=False):
    """Output and gradients; `is_twice`: also the gradients of a function of the gradients."""
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (x, w, b)
        if t is not None
    ]
    out = run(*leaves[:2], None if b is None else leaves[2], padding)
    r = torch.linspace(-1, 3, out.numel(), dtype=x.dtype).sin().view_as(out).requires_grad_()
    grads = torch.autograd.grad(out, leaves, r, create_graph=is_twice)
    if not is_twice:
        return [out, *grads]
    energy = sum((grad * torch.linspace(0, 5, grad.numel()).cos().view_as(grad)).sum() for grad in grads)
    return [out, *grads, *torch.autograd.grad(energy, [leaves[0], leaves[1], r])]


# One tile, odd sizes, several images in a group, an image larger than a group, more than one group. The first two, and
# the third with many channels, have fewer tiles than it takes for groups: kernels are transformed in parts.
SHAPES = [(1, 4, 4), (3, 5, 9), (7, 8, 8), (2, 40, 37), (40, 8, 6)]


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [(16, 16), (32, 48)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_equals_the_direct_convolution(cpp, shape, padding, channels, memory_format):
    channels_in, channels_out = channels
    x = torch.randn(shape[0], channels_in, *shape[1:]).to(memory_format=memory_format)
    w = torch.randn(channels_out, channels_in, 4, 4).to(memory_format=memory_format)
    b = torch.randn(channels_out) if padding else None
    expected = derivatives(direct, x.double(), w.double(), None if b is None else b.double(), padding)
    for actual, exact in zip(derivatives(halving_conv2d, x, w, b, padding), expected, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, exact) < 5e-6


def test_second_derivatives(cpp):
    x, w, b = torch.randn(5, 16, 8, 8), torch.randn(16, 16, 4, 4), torch.randn(16)
    expected = derivatives(direct, x.double(), w.double(), b.double(), 1, is_twice=True)
    for actual, exact in zip(derivatives(halving_conv2d, x, w, b, 1, is_twice=True), expected, strict=True):
        assert relative_error(actual, exact) < 1e-5


def test_rounding_is_that_of_the_direct_convolution(cpp):
    x, w = torch.randn(32, 128, 8, 8), torch.randn(128, 128, 4, 4)
    exact = derivatives(direct, x.double(), w.double(), None, 1)
    ours, plain = (derivatives(run, x, w, None, 1) for run in (halving_conv2d, direct))
    for actual, usual, expected in zip(ours, plain, exact, strict=True):
        assert relative_error(actual, expected) < max(3 * relative_error(usual, expected), 3e-6)


def test_an_image_does_not_depend_on_its_batch(cpp):
    x, w = torch.randn(37, 32, 8, 8), torch.randn(32, 32, 4, 4)
    together = halving_conv2d(x, w)
    assert torch.equal(torch.cat([halving_conv2d(image[None], w) for image in x]), together)


@pytest.mark.parametrize("images", [3, 40])  # kernels larger than the images' tiles, and smaller
def test_threads_share_the_work(cpp, images):
    x, w, b = torch.randn(images, 32, 16, 16), torch.randn(64, 32, 4, 4), torch.randn(64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = derivatives(halving_conv2d, x, w, b, 1)
        torch.set_num_threads(3)
        shared = derivatives(halving_conv2d, x, w, b, 1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(shared[0], alone[0]) and torch.equal(shared[1], alone[1])
    torch.testing.assert_close(shared[2], alone[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("chosen", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("case", ["channels", "double", "kernel", "empty batch"])
def test_what_it_does_not_serve_is_left_to_torch(monkeypatch, chosen, case):
    monkeypatch.setattr(choice, "_chosen", chosen)
    x, w = torch.randn(40, 16, 8, 8), torch.randn(16, 16, 4, 4)
    if case == "channels":
        x, w = x[:, :3], w[:, :3]
    elif case == "double":
        x, w = x.double(), w.double()
    elif case == "kernel":
        w = w[..., :3, :3]
    else:
        x = x[:0]
    assert not halving_conv.supports(x, w, 1)
    assert torch.equal(halving_conv2d(x, w), F.conv2d(x, w, stride=2, padding=1))


def test_few_positions_and_other_processors_are_left_to_torch(cpp, monkeypatch):
    monkeypatch.setattr(choice, "_chosen", "auto")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    w, calls = torch.randn(16, 16, 4, 4), []
    monkeypatch.setattr(halving_conv, "reason_for_absence", lambda: calls.append(1) or "not wanted")
    halving_conv2d(torch.randn(7, 16, 8, 8), w)
    assert not calls
    halving_conv2d(torch.randn(8, 16, 8, 8), w)
    assert len(calls) == 1
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    halving_conv2d(torch.randn(8, 16, 8, 8), w)
    assert len(calls) == 1


def test_operator_checks(cpp):
    """Shapes, formats and derivatives that torch was told of are those of the operators."""
    x, w = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(16, 16, 4, 4, requires_grad=True)
    ops = torch.ops.stylesan_cpu
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(ops.halving_conv.default, (x, w, torch.randn(16), 1), test_utils=utils)
    x, w = x.detach(), w.detach()
    gradient = torch.randn(2, 16, 4, 4)
    torch.library.opcheck(
        ops.halving_conv_input_gradient.default, (gradient, w, [8, 8], 1), test_utils=utils[:2]
    )
    torch.library.opcheck(ops.halving_conv_kernel_gradient.default, (x, gradient, w, 1), test_utils=utils[:2])


def test_wrong_arguments_are_refused(cpp):
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.stylesan_cpu.halving_conv(
            torch.randn(1, 16, 8, 8).double(), torch.randn(16, 16, 4, 4), None, 1
        )
    with pytest.raises(RuntimeError, match="4x4"):
        torch.ops.stylesan_cpu.halving_conv(torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3), None, 1)
    with pytest.raises(RuntimeError, match="multiples of 16"):
        torch.ops.stylesan_cpu.halving_conv(torch.randn(1, 8, 8, 8), torch.randn(16, 8, 4, 4), None, 1)
