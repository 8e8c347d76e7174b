# SPDX-License-Identifier: MIT
"""bias_act against recorded values and gradients of first and second order, and its argument checks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils.ops.bias_act import ACTIVATIONS, bias_act

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "g_ops_bias_act.npz")
CASES = json.loads(str(GOLDEN["meta_json"]))


@pytest.mark.parametrize("case", CASES)
def test_golden_values_and_gradients(case, assert_near):
    arguments = {k: v for k, v in CASES[case].items() if k in ("act", "dim", "alpha", "gain", "clamp")}
    data = {k.split("/")[1]: torch.tensor(GOLDEN[k]) for k in GOLDEN.files if k.startswith(case + "/")}
    inputs = {k: data[k].requires_grad_() for k in ("x", "b") if k in data}
    r = data["r"].requires_grad_()
    out = bias_act(inputs["x"], inputs.get("b"), **arguments)
    assert_near(out, data["out"].numpy(), 1e-5)
    grads = torch.autograd.grad((out * r).sum(), list(inputs.values()), create_graph=True)
    for name, grad in zip(inputs, grads, strict=True):
        assert_near(grad, data["d" + name].numpy(), 3e-4)
    second = torch.autograd.grad((grads[0] * data["q"]).sum(), [*inputs.values(), r], allow_unused=True)
    for name, grad in zip([*inputs, "r"], second, strict=True):
        assert_near(grad, data["gg_" + name].numpy(), 3e-4)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_numerical_gradients(act):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, b: bias_act(x, b, act=act), (x, b))
    torch.autograd.gradgradcheck(lambda x, b: bias_act(x, b, act=act), (x, b))


def test_gain_and_clamp_follow_the_activation():
    x = torch.tensor([[-10.0, -1.0, 0.0, 1.0, 10.0]])
    out = bias_act(x, act="lrelu", gain=2, clamp=3)
    torch.testing.assert_close(out, torch.tensor([[-3.0, -0.4, 0.0, 2.0, 3.0]]))
    assert bias_act(x, clamp=0).eq(0).all()


def test_negative_axis_and_dtype_of_the_input():
    x, b = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.randn(4)
    out = bias_act(x, b, dim=-1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, x + b.to(torch.bfloat16))


def test_unknown_activation_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"'gelu'.*linear, relu, lrelu"):
        bias_act(torch.zeros(1, 1), act="gelu")


@pytest.mark.parametrize(("b_shape", "dim"), [((4,), 1), ((3, 1), 1), ((3,), 2), ((), 1), ((3,), -1)])
def test_bias_that_does_not_fit(b_shape, dim):
    with pytest.raises(ValueError, match="bias of shape"):
        bias_act(torch.zeros(2, 3, 5, 7)[:, :, 0], torch.zeros(b_shape), dim=dim)


def test_negative_clamp():
    with pytest.raises(ValueError, match="clamp=-1"):
        bias_act(torch.zeros(1, 1), clamp=-1)
