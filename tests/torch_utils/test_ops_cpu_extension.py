# SPDX-License-Identifier: MIT
"""The C++ operators against recorded values and the reference; how they are built, cached and done without."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils.errors import UserError
from torch_utils.ops import choice, cpu_extension, filtered_lrelu_cpu
from torch_utils.ops import filtered_lrelu as module
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.filters import design_lowpass_filter

ROOT = Path(__file__).parents[2]
GOLDEN = np.load(ROOT / "tests" / "data" / "g_ops_filtered_lrelu.npz")
CASES = json.loads(str(GOLDEN["meta_json"]))
RADIAL = design_lowpass_filter(12, 3.0, 5.0, 32, radial=True)


@pytest.fixture
def cpp(monkeypatch):
    """The C++ operators, and nothing else, serve this test."""
    reason = filtered_lrelu_cpu.reason_for_absence()
    if reason:
        pytest.skip(f"the C++ operators cannot be built here: {reason}")
    monkeypatch.setattr(choice, "_chosen", "cpp")


def both(monkeypatch, x, *arguments, **keywords):
    """Results and gradients of x and b: (C++, reference)."""
    found = []
    for name in ("cpp", "reference"):
        monkeypatch.setattr(choice, "_chosen", name)
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        bias = torch.linspace(-0.5, 0.5, x.shape[1], dtype=x.dtype).requires_grad_()
        out = filtered_lrelu(leaf, *arguments, b=bias, **keywords)
        r = torch.linspace(-1, 1, out.numel(), dtype=x.dtype).sin().view_as(out)
        found.append((out, *torch.autograd.grad((out * r).sum(), [leaf, bias])))
    return found


@pytest.mark.parametrize("case", CASES)
def test_golden_values_and_gradients(cpp, case, assert_near):
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
@pytest.mark.parametrize(("up", "down"), [(2, 2), (4, 2), (2, 4), (3, 1), (1, 1)])
@pytest.mark.parametrize("padding", [[11, 12, 14, 13], [-1, 14, 16, -2]])
def test_equals_the_reference_on_odd_sizes(cpp, monkeypatch, fu_shape, fd_shape, up, down, padding):
    fu, fd = (None if s is None else torch.randn(s, dtype=torch.float64) for s in (fu_shape, fd_shape))
    x = torch.randn(2, 11, 9, 13, dtype=torch.float64)
    keywords = {"up": up, "down": down, "padding": padding, "slope": 0.1, "clamp": 0.7}
    torch.testing.assert_close(*both(monkeypatch, x, fu, fd, **keywords))


@pytest.mark.parametrize("radial", [False, True])
@pytest.mark.parametrize(("up", "down"), [(2, 2), (4, 2), (2, 4), (4, 4)])
@pytest.mark.parametrize("size", [(6, 7), (36, 36), (20, 280)])
def test_unrolled_kernels_equal_the_reference(cpp, monkeypatch, radial, up, down, size):
    fu = design_lowpass_filter(6 * up, 2.0, 4.5, 16 * up)
    fd = design_lowpass_filter(6 * down, 2.0, 5.0, 16 * down, radial=radial)
    # In float32 a value near zero may fall on either side of the bend: slope 1 leaves the clamp and the filters.
    for slope, tolerance in ((1.0, 2e-5), (0.2, 2e-2)):
        keywords = {"up": up, "down": down, "padding": 3 * (up + down), "slope": slope}
        actual, expected = both(monkeypatch, torch.randn(1, 9, *size), fu, fd, **keywords)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=2e-6)
        for grad, expected_grad in zip(actual[1:], expected[1:], strict=True):
            assert (grad - expected_grad).abs().max() <= tolerance * expected_grad.abs().max()


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, 1.5])
@pytest.mark.parametrize("fd_shape", [(5,), (3, 3)])
def test_numerical_gradients(cpp, slope, fd_shape):
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)
    fu, fd = torch.rand(6, dtype=torch.float64), torch.rand(fd_shape, dtype=torch.float64)

    def run(x, b):
        return filtered_lrelu(x, fu, fd, b, up=2, down=2, padding=4, slope=slope, clamp=1.1)

    torch.autograd.gradcheck(run, (x, b))
    torch.autograd.gradgradcheck(run, (x, b))


@pytest.mark.parametrize("channels", [8, 11])
def test_memory_formats(cpp, monkeypatch, channels):
    f = torch.rand(12, dtype=torch.float64)
    x = torch.randn(2, channels, 10, 9, dtype=torch.float64)
    keywords = {"up": 2, "down": 2, "padding": 11}
    _, expected = both(monkeypatch, x, f, f, **keywords)
    last = x.to(memory_format=torch.channels_last)
    actual, _ = both(monkeypatch, last, f, f, **keywords)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected)
    wide = torch.randn(2, channels, 10, 18, dtype=torch.float64)[:, :, :, ::2]
    torch.testing.assert_close(*both(monkeypatch, wide, f, f, **keywords))


def test_number_of_threads_changes_nothing(cpp):
    f, x = torch.rand(12), torch.randn(1, 16, 70, 300, requires_grad=True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = filtered_lrelu(x, f, RADIAL, None, up=2, down=2, padding=11, clamp=3.0)
            found.append((out, *torch.autograd.grad(out.sum(), x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bfloat16_is_rounded_once(cpp):
    f, x = torch.rand(12) / 6, torch.randn(1, 9, 12, 17).bfloat16()
    low = filtered_lrelu(x, f, f, up=2, down=2, padding=11, b=torch.zeros(9))
    assert torch.equal(low, filtered_lrelu(x.float(), f, f, up=2, down=2, padding=11).bfloat16())


def test_not_a_number_stays_in_its_map_and_is_not_hidden(cpp):
    f, x = torch.rand(12), torch.randn(1, 9, 12, 12)
    clean = filtered_lrelu(x, f, f, up=2, down=2, padding=11, clamp=1.0)
    x[0, 3, 5, 5] = float("nan")
    out = filtered_lrelu(x, f, f, up=2, down=2, padding=11, clamp=1.0)
    assert out[0, 3, 5, 5].isnan()
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(out[0, others], clean[0, others])


def test_training_keeps_two_bits_per_upsampled_pixel_and_inference_nothing(cpp):
    f, x, kept = torch.rand(12), torch.randn(1, 16, 36, 36, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        filtered_lrelu(x, f, f, up=2, down=2, padding=[11, 10, 11, 10])
    num_bytes = sum(t.numel() * t.element_size() for t in kept)
    assert num_bytes <= 82 * 82 * 16 * 2 / 8 + 2 * f.numel() * 4
    _, mask = torch.ops.stylesan_cpu.filtered_lrelu(
        x.detach(), None, f, f, 2, 2, [11, 10, 11, 10], 1.0, 0.2, None, False, False
    )
    assert mask.numel() == 0


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
def test_no_images(cpp, shape):
    f, x = torch.rand(12), torch.zeros(shape, requires_grad=True)
    out = filtered_lrelu(x, f, f, up=2, down=2, padding=11)
    assert out.shape == (*shape[:2], 8, 8)
    assert torch.autograd.grad(out.sum(), x)[0].shape == shape


def operator_arguments():
    x = torch.randn(2, 9, 8, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(9, dtype=torch.float64, requires_grad=True)
    fu, fd = torch.rand(12, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    return x, b, fu, fd, 2, 2, [5, 6, 7, 4], 1.3, 0.2, 0.8, False, True


def test_operators_keep_the_rules_of_torch_library(cpp):
    arguments = operator_arguments()
    torch.library.opcheck(torch.ops.stylesan_cpu.filtered_lrelu.default, arguments)
    out, mask = torch.ops.stylesan_cpu.filtered_lrelu(*arguments)
    fu, fd = arguments[2:4]
    grad = out.detach().requires_grad_()
    reverse = (grad, mask, fd, fu, 2, 2, [3, 4], [6, 4], [8, 7], 5.2, 0.2, True)
    torch.library.opcheck(torch.ops.stylesan_cpu.masked_resampling.default, reverse)


def test_compiles_without_graph_breaks(cpp):
    f, x = torch.rand(12), torch.randn(1, 8, 12, 12, requires_grad=True)

    def run(x):
        return filtered_lrelu(x * 2, f, f, up=2, down=2, padding=11).square().sum()

    expected = run(x)
    actual = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x), torch.autograd.grad(expected, x))


def test_half_precision_is_left_to_the_reference(cpp):
    f, x = torch.rand(12) / 6, torch.randn(1, 2, 12, 12)
    assert not filtered_lrelu_cpu.supports(x.half())
    assert filtered_lrelu(x.half(), f, f, up=2, down=2, padding=11).dtype == torch.float16


def test_wrong_arguments_are_found_in_time(cpp):
    with pytest.raises(ValueError, match="20 taps: increase the padding"):
        filtered_lrelu(torch.zeros(1, 3, 8, 8), fu=torch.ones(20))


# Choosing, building, doing without.


def test_choice(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", "auto")
    choice.set_backend("reference")
    assert choice.backend() == "reference"
    with pytest.raises(UserError, match="--ops=fast is no implementation"):
        choice.set_backend("fast")
    monkeypatch.setattr(choice, "_chosen", "quick")
    with pytest.raises(UserError, match="STYLESAN_OPS=quick"):
        choice.backend()


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(filtered_lrelu_cpu, "reason_for_absence", lambda: "there is no ninja")
    module._say_what_is_missing.cache_clear()


def test_without_the_operators_the_reference_serves_and_says_so_once(absent, monkeypatch, capsys):
    monkeypatch.setattr(choice, "_chosen", "auto")
    x, f = torch.randn(1, 2, 12, 12), torch.rand(12)
    outs = [filtered_lrelu(x, f, f, up=2, down=2, padding=11) for _ in range(2)]
    assert torch.equal(*outs)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "there is no ninja" in lines[0]


def test_operators_that_were_asked_for_but_are_absent(absent, monkeypatch):
    monkeypatch.setattr(choice, "_chosen", "cpp")
    with pytest.raises(UserError, match=r"--ops=cpp: .*there is no ninja"):
        filtered_lrelu(torch.randn(1, 2, 12, 12), torch.rand(12), up=2, padding=11)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """An empty folder of sources and an empty cache."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    monkeypatch.setattr(cpu_extension, "SOURCE_FOLDER", folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return folder


def test_no_compiler(sources, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler (no-such-compiler)" in cpu_extension.load_operators.__wrapped__()


def test_a_failed_build_is_not_repeated(cpp, sources):
    (sources / "broken.cpp").write_text("int main( {")
    assert "the compiler failed" in cpu_extension.load_operators.__wrapped__()
    assert "an earlier attempt failed" in cpu_extension.load_operators.__wrapped__()
    (note,) = sources.parent.glob("cache/*.failed")
    assert "broken.cpp" in note.read_text()
    assert not list(sources.parent.glob("cache/*.so"))


def test_a_damaged_library_is_named(cpp, sources):
    library = cpu_extension.library_path()
    library.parent.mkdir()
    library.write_bytes(b"no library")
    assert str(library) in cpu_extension.load_operators.__wrapped__()


BUILD = """
import sys
from pathlib import Path
from torch_utils.ops import cpu_extension
cpu_extension.SOURCE_FOLDER = Path(sys.argv[1])
sys.exit(cpu_extension.load_operators() or 0)
"""


def test_two_processes_build_once(cpp, sources):
    (sources / "empty.cpp").write_text("int nothing() { return 0; }")
    command = [sys.executable, "-c", BUILD, str(sources)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [run.communicate(timeout=240)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("Compiling" in message for message in messages) == 1
    assert len(list(sources.parent.glob("cache/*.so"))) == 1
    assert not [path for path in sources.parent.glob("cache/*") if path.is_dir()]  # nothing left behind
