# SPDX-License-Identifier: MIT
"""FullyConnectedLayer against recorded values and gradients, its initialisation and its state names."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils.layers import FullyConnectedLayer

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "g_ops_modconv_fc.npz")
META = json.loads(str(GOLDEN["meta_json"]))
CASES = [case for case in META if case.startswith("fc")]


@pytest.mark.parametrize("case", CASES)
def test_golden_values_and_gradients(case, assert_near):
    data = {k.split("/")[1]: torch.tensor(GOLDEN[k]) for k in GOLDEN.files if k.startswith(case + "/")}
    known = inspect.signature(FullyConnectedLayer).parameters
    layer = FullyConnectedLayer(
        META[case]["I"], META[case]["O"], **{k: v for k, v in META[case].items() if k in known}
    )
    state = {k: data[k] for k in ("weight", "bias") if k in data}
    layer.load_state_dict(state)  # strict: the names are exactly these
    x = data["x"].requires_grad_()
    out = layer(x)
    assert_near(out, data["out"].numpy(), 1e-5)
    grads = torch.autograd.grad((out * data["r"]).sum(), [x, *layer.parameters()])
    for name, grad in zip(["x", *state], grads, strict=True):
        assert_near(grad, data["d" + name].numpy(), 3e-4)


def test_gradient_of_gradient():
    layer = FullyConnectedLayer(3, 4, activation="lrelu", lr_multiplier=0.5).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, x)
    torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("lr_multiplier", [1, 0.01])
def test_initial_output_does_not_depend_on_the_learning_rate(lr_multiplier):
    layer = FullyConnectedLayer(256, 512, lr_multiplier=lr_multiplier, bias_init=3)
    out = layer(torch.randn(64, 256)).detach()
    assert layer.weight.std().item() == pytest.approx(1 / lr_multiplier, rel=0.02)
    assert out.std().item() == pytest.approx(1, rel=0.05)
    assert out.mean().item() == pytest.approx(3, abs=0.05)


def test_initial_values_per_feature():
    layer = FullyConnectedLayer(8, 4, weight_init=0, bias_init=[1, 0, 0, 0])
    torch.testing.assert_close(layer(torch.randn(2, 8)), torch.tensor([[1.0, 0, 0, 0]]).expand(2, -1))


def test_without_bias():
    layer = FullyConnectedLayer(8, 4, bias=False)
    assert list(layer.state_dict()) == ["weight"]
    assert layer(torch.zeros(1, 8)).eq(0).all()


def test_unknown_activation_fails_at_construction():
    with pytest.raises(ValueError, match=r"'gelu'.*lrelu"):
        FullyConnectedLayer(2, 2, activation="gelu")
