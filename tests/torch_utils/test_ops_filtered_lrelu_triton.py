# SPDX-License-Identifier: MIT
"""The Triton kernel against recorded values and the plain composition in float64, with gradients of three orders.

On a CPU, Triton's interpreter runs the kernel. It has to be switched on before triton is imported, so the tests
here that need it run in a child process; with `-m gpu` the same tests run compiled, on a GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops import filtered_lrelu_launch
from torch_utils.ops import filtered_lrelu_triton as module
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.filtered_lrelu_tiles import (
    MAX_BLOCK,
    SHARED_LIMIT,
    Axis,
    Resampling,
    fits,
    maps_per_program,
    plan_tiles,
)
from torch_utils.ops.filtered_lrelu_timing import time_filtered_lrelu
from torch_utils.ops.filtered_lrelu_triton import filtered_lrelu_triton, supports
from torch_utils.ops.filters import design_lowpass_filter
from torch_utils.ops.upfirdn2d import parse_padding

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "g_ops_filtered_lrelu.npz")
CASES = json.loads(str(GOLDEN["meta_json"]))
SQRT2 = 2**0.5
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def on_device(test):
    """Mark a test that runs the kernel."""
    return test if IS_INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes its time for each program: let one go through all maps."""
    if IS_INTERPRETED:
        monkeypatch.setattr(filtered_lrelu_launch, "maps_per_program", lambda num_maps, num_tiles: num_maps)


def naive_upfirdn2d(x, f, up=1, down=1, padding=(0, 0, 0, 0), gain=1, flip_filter=False):
    N, C, H, W = x.shape
    x = F.pad(x.reshape(N, C, H, 1, W, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(N, C, H * up, W * up)
    f = torch.ones(1, 1) if f is None else f
    f = (torch.outer(f, f) if f.ndim == 1 else f).to(x)
    weight = (f if flip_filter else f.flip([0, 1])).expand(C, 1, -1, -1) * gain
    return F.conv2d(F.pad(x, list(padding)), weight, groups=C)[:, :, ::down, ::down]


def naive_filtered_lrelu(
    x, fu, fd, b, up, down, padding, gain=SQRT2, slope=0.2, clamp=None, flip_filter=False
):
    x = x if b is None else x + b[:, None, None]
    x = naive_upfirdn2d(x, fu, up=up, padding=padding, gain=up**2, flip_filter=flip_filter)
    x = F.leaky_relu(x, slope) * gain
    x = x if clamp is None else x.clamp(-clamp, clamp)
    return naive_upfirdn2d(x, fd, down=down, flip_filter=flip_filter)


def gradients(out, x, b, r, q):
    """Of three orders: of <out, r> in x and b; of a function of these in r; of a function of that in q."""
    inputs = [x] if b is None else [x, b]
    first = torch.autograd.grad((out * r).sum(), inputs, create_graph=True)
    (second,) = torch.autograd.grad((first[0] * q).sum(), r, create_graph=True)
    (third,) = torch.autograd.grad(second.square().sum(), q)
    return [*first, second, third]


def relative_error(actual, expected):
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason="this is the child process")
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@on_device
@pytest.mark.parametrize("case", CASES)
def test_golden_values_and_gradients(case, assert_near):
    known = set(inspect.signature(filtered_lrelu).parameters) - {"fu", "fd", "b"}
    arguments = {k: v for k, v in CASES[case].items() if k in known}
    data = {
        k.split("/")[1]: torch.tensor(GOLDEN[k], device=DEVICE)
        for k in GOLDEN.files
        if k.startswith(case + "/")
    }
    inputs = {k: data[k].requires_grad_() for k in ("x", "b") if k in data}
    r, filters = data["r"].requires_grad_(), (data.get("fu"), data.get("fd"))
    sampling = [arguments.get("up", 1), arguments.get("down", 1)]
    is_served = supports(inputs["x"], *filters, *sampling, arguments.get("padding", 0))
    assert is_served == (filters != (None, None) or sampling != [1, 1])  # layers that resample
    function = filtered_lrelu_triton if is_served else filtered_lrelu
    out = function(inputs["x"], *filters, inputs.get("b"), **arguments)
    assert_near(out.cpu(), data["out"].cpu().numpy(), 1e-5)
    grads = torch.autograd.grad((out * r).sum(), list(inputs.values()), create_graph=True)
    for name, grad in zip(inputs, grads, strict=True):
        assert_near(grad.cpu(), data["d" + name].cpu().numpy(), 3e-4)
    second = torch.autograd.grad((grads[0] * data["q"]).sum(), [*inputs.values(), r], allow_unused=True)
    for name, grad in zip([*inputs, "r"], second, strict=True):
        assert_near(None if grad is None else grad.cpu(), data["gg_" + name].cpu().numpy(), 3e-4)


# fu, fd, up, down, padding, (height, width), further arguments. Sizes of several tiles with a remainder first.
PARITY = {
    "two tiles": ((12,), (12,), 2, 2, [9, 8, 9, 8], (23, 38), {"clamp": 0.7}),
    "cropped": ((24,), (12,), 4, 2, [-6, -9, -5, -8], (14, 17), {"slope": 0.1}),
    "asymmetric": ((7,), (5,), 2, 1, [5, 4, 6, 3], (9, 11), {"slope": 0.0, "gain": -1.5, "clamp": 0.4}),
    "down only": (None, (6,), 1, 2, 5, (13, 11), {"slope": 1.5, "clamp": 1.0}),
    "up only": ((6,), None, 4, 1, [3, 2], (9, 8), {"gain": 0.0, "clamp": 1.0}),
    "identities": (None, None, 2, 3, [1, 0, 0, 1], (9, 11), {}),
    "flipped": ((4, 3), (5,), 3, 1, [11, 12, 14, 13], (5, 6), {"flip_filter": True}),
    "many terms": ((5,), (11, 10), 2, 4, [7, 8, 9, 10], (9, 11), {}),
    "linear": ((8,), (8,), 2, 2, 7, (8, 9), {"slope": 1.0, "gain": 1.0}),
}


@on_device
@pytest.mark.parametrize("case", PARITY)
def test_equals_the_plain_composition(case):
    fu_shape, fd_shape, up, down, padding, size, further = PARITY[case]
    fu, fd = (None if s is None else torch.randn(s, device=DEVICE) for s in (fu_shape, fd_shape))
    x = torch.randn(1, 2, *size, device=DEVICE).requires_grad_()
    b = None if case == "linear" else torch.randn(2, device=DEVICE).requires_grad_()
    assert supports(x, fu, fd, up, down, padding)
    actual = filtered_lrelu_triton(x, fu, fd, b, up, down, padding, **further)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, b)]
    expected = naive_filtered_lrelu(exact[0], fu, fd, exact[1], up, down, parse_padding(padding), **further)
    if further.get("gain") == 0:
        assert actual.shape == expected.shape and actual.eq(0).all()
        return
    assert relative_error(actual, expected) <= 1e-5
    r, q = torch.randn_like(actual).requires_grad_(), torch.randn_like(x).requires_grad_()
    r64, q64 = (t.detach().double().requires_grad_() for t in (r, q))
    for grad, exact_grad in zip(
        gradients(actual, x, b, r, q), gradients(expected, *exact, r64, q64), strict=True
    ):
        assert relative_error(grad, exact_grad) <= 2e-5


# Rounding of pixels and taps to the dtype. The interpreter truncates to bfloat16 where a GPU rounds: a bias.
HALF = {torch.float16: (2e-3, 1e-2), torch.bfloat16: (0.05, 0.1) if IS_INTERPRETED else (0.015, 0.05)}


@on_device
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("is_radial", [False, True])
def test_half_precision(dtype, is_radial):
    fu = design_lowpass_filter(12, 2.0, 4.5, 32).to(DEVICE)
    fd = design_lowpass_filter(12, 3.0, 5.0, 32, radial=is_radial).to(DEVICE)
    x = torch.randn(1, 2, 20, 21, device=DEVICE).to(dtype).requires_grad_()
    b = torch.randn(2, device=DEVICE).requires_grad_()
    arguments = (2, 2, [11, 10, 11, 10])
    out = filtered_lrelu_triton(x, fu, fd, b.to(dtype), *arguments, clamp=1)
    assert out.dtype == dtype
    x64 = x.detach().double().requires_grad_()
    expected = naive_filtered_lrelu(x64, fu, fd, b.detach().to(dtype).double(), *arguments, clamp=1)
    value_limit, gradient_limit = HALF[dtype]
    assert relative_error(out, expected) <= value_limit
    r = torch.randn_like(out)
    grad_x, grad_b = torch.autograd.grad(out, [x, b], r)
    (exact,) = torch.autograd.grad(expected, x64, r.double())
    # In the mean square: pixels on the edge of the clamp may fall on either side.
    assert (grad_x.double() - exact).norm() <= gradient_limit * exact.norm()
    torch.testing.assert_close(grad_b.to(dtype), grad_x.sum(dim=[0, 2, 3]))


@on_device
def test_layouts_empty_batches_and_a_trained_bias_alone():
    f = torch.rand(6, device=DEVICE)
    x = torch.randn(2, 3, 7, 8, device=DEVICE)
    b = torch.zeros(3, device=DEVICE, requires_grad=True)
    out = filtered_lrelu_triton(x, f, f, b, 2, 2, 5)
    other = x.to(memory_format=torch.channels_last)
    assert torch.equal(filtered_lrelu_triton(other, f, f, None, 2, 2, 5), out)
    assert filtered_lrelu_triton(x[:0], f, f, b, 2, 2, 5).shape == (0, *out.shape[1:])
    (grad,) = torch.autograd.grad(out.sum(), b)
    expected = naive_filtered_lrelu(x, f, f, b, 2, 2, [5] * 4).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(expected, b)[0], rtol=1e-4, atol=1e-3)


@on_device
def test_too_little_padding_is_refused():
    f, x = torch.rand(12, device=DEVICE), torch.randn(1, 1, 4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="12 taps: increase the padding"):
        filtered_lrelu_triton(x, f, f, None, 2, 2, 1)


@on_device
def test_operators_pass_the_checks_of_torch():
    x, b = torch.randn(1, 2, 5, 6, device=DEVICE), torch.randn(2, device=DEVICE)
    fu, fd = torch.rand(4, device=DEVICE), torch.rand(3, 4, device=DEVICE)
    arguments = (fu, fd, 2, 2, [3, 4, 3, 3], 1.4, 0.2, 0.7, False)
    g = torch.randn_like(filtered_lrelu_triton(x, fu, fd, b, 2, 2, [3, 4, 3, 3]))
    for operator, tensors in (
        (module._forward, (x, b)),
        (module._tangent, (x.clone(), x, b)),
        (module._adjoint, (g, x, b)),
    ):
        trained = [t.detach().clone().requires_grad_() for t in tensors]
        torch.library.opcheck(operator, (*trained, *arguments))


@on_device
def test_compiles_without_a_graph_break():
    fu, fd = torch.rand(4, device=DEVICE), torch.rand(3, 4, device=DEVICE)
    x, b = torch.randn(1, 2, 5, 6, device=DEVICE), torch.randn(2, device=DEVICE)

    def run(x, b):
        assert supports(x, fu, fd, 2, 2, 4)
        return filtered_lrelu_triton(x, fu, fd, b, 2, 2, 4, clamp=0.5).square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    actual, expected = (
        torch.autograd.grad(function(*inputs), inputs)
        for function, inputs in ((f, [t.clone().requires_grad_() for t in (x, b)]) for f in (compiled, run))
    )
    torch.testing.assert_close(actual, expected)


@on_device
def test_what_is_not_served_falls_back(monkeypatch):
    f, x = torch.rand(6, device=DEVICE), torch.randn(1, 2, 12, 12, device=DEVICE)
    assert supports(x, f, f, 2, 2, 5)
    assert not supports(x.double(), f, f, 2, 2, 5)
    assert not supports(x, torch.rand(70), f, 2, 2, 70)  # longer than a tile
    assert not supports(x, torch.rand(9, 9), f, 2, 2, 9)  # more terms than a launch takes
    assert not supports(x, None, None, 1, 1, 0)  # nothing to fuse
    assert not supports(x, f, f, 2, 2, 2**15)
    assert not supports(x[:, :, :0], f, f, 2, 2, 5)
    monkeypatch.setenv("STYLESAN_OPS", "triton")
    long = torch.rand(70, device=DEVICE) / 35
    for images, fu in ((x.double(), f.double()), (x, long)):
        arguments = (images, fu, f.to(images), None, 2, 2, [40, 40, 40, 40])
        torch.testing.assert_close(filtered_lrelu(*arguments), naive_filtered_lrelu(*arguments))


@on_device
def test_timing():
    f = torch.rand(6, device=DEVICE)
    x, b = torch.randn(1, 2, 6, 6, device=DEVICE), torch.zeros(2, device=DEVICE)
    timing = time_filtered_lrelu(filtered_lrelu_triton, x, f, f, b, 2, 2, [5, 4, 5, 4], min_run_time=1e-3)
    assert timing.forward_ms > 0 and timing.backward_ms > 0
    assert timing.forward_bytes == 2 * 288 and timing.backward_bytes == 3 * 288


@pytest.mark.skipif(torch.cuda.is_available() or IS_INTERPRETED, reason="the kernel runs here")
def test_not_served_without_a_gpu():
    assert not supports(torch.zeros(1, 1, 8, 8), torch.ones(4), None, 2, 1, 3)


def reach(first, count, size, up, down, before, taps_u, taps_d, is_adjoint):
    """Pixels of x and of the output that results `first` ... `first + count - 1` depend on, and those between."""
    links = [(i, i * up + before - t) for i in range(size) for t in range(taps_u)]
    outs = [(o, o * down + t) for o in range(3 * size * up) for t in range(taps_d)]
    mine = range(first, first + count)
    middle = {u for i, u in links if i in mine} if is_adjoint else {u for o, u in outs if o in mine}
    return middle, {i for i, u in links if u in middle}, {o for o, u in outs if u in middle}


SAMPLINGS = [(2, 2, 12, 12), (4, 2, 24, 12), (2, 4, 12, 24), (1, 2, 1, 6), (3, 1, 7, 1)]


@pytest.mark.parametrize(("up", "down", "taps_u", "taps_d"), SAMPLINGS)
@pytest.mark.parametrize("is_adjoint", [False, True])
def test_tiles_hold_what_they_need(up, down, taps_u, taps_d, is_adjoint):
    work = Resampling(up, down, 1, 1, 2, is_adjoint, has_other=is_adjoint)
    for size, vector in itertools.product((5, 36, 150), (1, 4)):
        axis = Axis(size, taps_u, taps_d, vector, vector)
        plan = plan_tiles(axis, axis, work)
        assert (plan.num_tiles_y - 1) * plan.y.tile < size <= plan.num_tiles_y * plan.y.tile
        assert plan.shared_bytes <= SHARED_LIMIT and plan.num_warps in (1, 2, 4, 8)
        blocks = plan.y[1:]
        assert all(16 <= block <= MAX_BLOCK and block & (block - 1) == 0 for block in blocks)
        for before in range(up):
            middle, ins, outs = reach(30, plan.y.tile, 150, up, down, before, taps_u, taps_d, is_adjoint)
            assert max(middle) - min(middle) < plan.y.up and plan.y.tile <= plan.y.result
            assert max(ins) - min(ins) // vector * vector < plan.y.source
            if is_adjoint:
                assert max(outs) - min(outs) // vector * vector < plan.y.other


def test_no_tiles_for_long_filters():
    for taps_u, taps_d, fit in ((12, 12, True), (30, 30, True), (70, 4, False), (4, 70, False)):
        axis = Axis(100, taps_u, taps_d)
        for is_adjoint in (False, True):
            work = Resampling(1, 1, 1, 1, 2, is_adjoint, has_other=True)
            assert (plan_tiles(axis, axis, work) is not None) == fits(axis, axis, work)
        assert fits(axis, axis, work) == fit


def test_large_batches_share_the_matrices_of_a_program():
    assert maps_per_program(100, 4) == 1
    assert 1 < maps_per_program(16 * 1024, 4) <= maps_per_program(64 * 1024, 36) <= 16


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torch_utils.ops.filtered_lrelu_kernel import filtered_lrelu_kernel as kernel

def compile_for_hopper(dtype, plan, num_terms, sampling, is_adjoint, vector):
    constants = dict(
        ADJOINT=is_adjoint, UP=sampling[0], DOWN=sampling[1], FLIP=False, HAS_LIMIT=True, RANK_UP=1,
        RANK_DOWN=num_terms, IN_Y=plan.y.source, IN_X=plan.x.source, UP_Y=plan.y.up, UP_X=plan.x.up,
        OTHER_Y=plan.y.other, OTHER_X=plan.x.other, RESULT_Y=plan.y.result, RESULT_X=plan.x.result,
        IN_VECTOR=vector, OUT_VECTOR=vector, PRECISION="ieee",
    )
    if not is_adjoint:
        constants["other"] = None
    pointers = dict.fromkeys(["x", "bias", "other", "result"], "*" + dtype)
    pointers |= {name: "*fp32" for name in kernel.arg_names if "taps" in name and not name.startswith("num")}
    floats = dict.fromkeys(["gain", "slope", "limit"], "fp32")
    signature = {n: (pointers | floats).get(n, "i32") for n in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    index = kernel.arg_names.index
    aligned = {(index(n),): [["tt.divisibility", 16]] for n in pointers if n not in constants}
    source = ASTSource(kernel, signature, {(index(n),): value for n, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": plan.num_warps})

from torch_utils.ops.filtered_lrelu_tiles import Axis, Resampling, plan_tiles
for dtype, bytes_, (up, down, taps_u, taps_d), num_terms, is_adjoint in eval(sys.argv[1]):
    axis = Axis(36, taps_u, taps_d, 4, 4)
    plan = plan_tiles(axis, axis, Resampling(up, down, 1, num_terms, bytes_, is_adjoint, is_adjoint))
    compiled = compile_for_hopper(dtype, plan, num_terms, (up, down), is_adjoint, 4)
    assert compiled.asm["cubin"]
    print(compiled.metadata.shared, plan.shared_bytes, compiled.asm["ptx"].count("mma"))
"""


def compile_kernels(tmp_path, kernels):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", COMPILE, repr(kernels)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "ImportError" in done.stderr:
        pytest.skip("this version of triton compiles for absent GPUs in another way")
    assert done.returncode == 0, done.stderr
    return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason="compiles")
def test_compiles_for_hopper_within_the_estimated_memory(tmp_path):
    for shared, estimate, num_mma in compile_kernels(tmp_path, [("fp16", 2, (2, 2, 12, 12), 1, True)]):
        assert shared <= 1.25 * estimate
        assert num_mma > 0


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="compiles")
def test_every_kind_of_kernel_compiles_for_hopper(tmp_path):
    kernels = [
        (dtype, size, sampling, num_terms, is_adjoint)
        for dtype, size in (("fp16", 2), ("bf16", 2), ("fp32", 4))
        for sampling, num_terms in (((2, 2, 12, 12), 1), ((2, 2, 12, 12), 4), ((4, 2, 24, 12), 1))
        for is_adjoint in (False, True)
    ]
    for shared, estimate, num_mma in compile_kernels(tmp_path, kernels):
        assert shared <= 1.25 * estimate <= 1.25 * SHARED_LIMIT
        assert num_mma >= 0
