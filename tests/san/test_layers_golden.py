# SPDX-License-Identifier: MIT
"""SAN layers against recorded numbers of the official layers: values, gradients, normalisation, construction.

python -m pytest tests/san/test_layers_golden.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import san
from san.layers import SANLayer, split_norms

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "d_san_layers.npz")
RTOL, ATOL = 1e-5, 1e-6
TAGS = ["linear_b", "linear_nb", "conv1d_b", "conv1d_nb", "conv2d_b", "conv2d_nb", "embed"]


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key].copy())


def golden_layer(tag: str) -> SANLayer:
    """The layer of one recorded case, with its parameters. Strict loading also checks names and shapes."""
    kind, _, bias = tag.partition("_")
    if kind == "linear":
        layer = san.SANLinear(6, 5, input_bias=bias == "b")
    elif kind == "conv1d":
        layer = san.SANConv1d(3, 4, kernel_size=3, stride=2, padding=1, input_bias=bias == "b")
    elif kind == "conv2d":
        layer = san.SANConv2d(3, 4, kernel_size=3, stride=2, padding=1, input_bias=bias == "b")
    else:
        layer = san.SANEmbedding(9, 6)
    prefix = f"{tag}/param/"
    layer.load_state_dict({k.removeprefix(prefix): golden(k) for k in GOLDEN if k.startswith(prefix)})
    return layer


def golden_input(tag: str) -> Tensor:
    return golden("embed/idx") if tag == "embed" else golden(f"{tag}/x").requires_grad_()


def assert_close(actual: Tensor, expected: Tensor, rtol: float = RTOL, atol: float = ATOL) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_golden_gradients(layer: SANLayer, x: Tensor, prefix: str, names: set[str]) -> None:
    """Gradients of the named parameters (and x) match; every other parameter has none."""
    for name, parameter in layer.named_parameters():
        if name in names:
            assert_close(parameter.grad, golden(f"{prefix}/{name}"))
        else:
            assert parameter.grad is None, name
    if x.is_floating_point():
        assert_close(x.grad, golden(f"{prefix}/x"))


@pytest.mark.parametrize("tag", TAGS)
class TestGolden:
    def test_training_views_and_gradients(self, tag: str) -> None:
        layer, x = golden_layer(tag), golden_input(tag)
        logits = layer(x)
        assert_close(logits.fun, golden(f"{tag}/fun"))
        assert_close(logits.dir, golden(f"{tag}/dir"))
        ((logits.fun * golden(f"{tag}/r1")).sum() + (logits.dir * golden(f"{tag}/r2")).sum()).backward()
        assert_golden_gradients(layer, x, f"{tag}/grad_train", {"weight", "scale", "bias"})

    def test_fun_alone_is_the_evaluation_output(self, tag: str) -> None:
        """Gradients with respect to everything but the weight, whose route `dir` is."""
        layer, x = golden_layer(tag), golden_input(tag)
        fun = layer(x).fun
        assert_close(fun, golden(f"{tag}/out_eval"))
        (fun * golden(f"{tag}/r")).sum().backward()
        assert_golden_gradients(layer, x, f"{tag}/grad_eval", {"scale", "bias"})

    def test_both_views_together_have_all_gradients_of_the_evaluation_output(self, tag: str) -> None:
        layer, x = golden_layer(tag), golden_input(tag)
        logits = layer(x)
        ((logits.fun + logits.dir) * golden(f"{tag}/r")).sum().backward()
        assert_golden_gradients(layer, x, f"{tag}/grad_eval", {"weight", "scale", "bias"})

    def test_normalize_directions(self, tag: str) -> None:
        layer = golden_layer(tag)
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        assert san.normalize_directions_(layer) == 1
        assert_close(layer.weight.detach(), golden(f"{tag}/weight_after_normalize"))
        assert_close(layer(golden_input(tag)).fun.detach(), golden(f"{tag}/out_eval_after_normalize"))
        assert torch.equal(layer.scale, before["scale"])
        if layer.bias is not None:
            assert torch.equal(layer.bias, before["bias"])


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embed"])
def test_golden_construction_from_plain_weight(kind: str) -> None:
    directions, norms = split_norms(golden(f"{kind}/ctor_base_weight"))
    assert_close(directions, golden(f"{kind}/ctor_weight"))
    scale = golden(f"{kind}/ctor_scale")
    assert_close(norms.reshape(scale.shape), scale)
