# SPDX-License-Identifier: MIT
"""SAN layers against plain layers: values, gradient routing, derivatives, precision, copying, errors.

python -m pytest tests/san/test_layers.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import san
from san.layers import SANLayer, split_norms


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


PAIRS = [
    (lambda: san.SANLinear(7, 3, input_bias=True), lambda: nn.Linear(7, 3, bias=False), (4, 7)),
    (lambda: san.SANConv1d(4, 3, 5, 2, 2), lambda: nn.Conv1d(4, 3, 5, 2, 2, bias=False), (2, 4, 9)),
    (
        lambda: san.SANConv1d(4, 3, 3, padding="same", dilation=2),
        lambda: nn.Conv1d(4, 3, 3, padding="same", dilation=2, bias=False),
        (2, 4, 9),
    ),
    (
        lambda: san.SANConv2d(4, 3, (3, 1), padding=(1, 0), input_bias=True),
        lambda: nn.Conv2d(4, 3, (3, 1), padding=(1, 0), bias=False),
        (2, 4, 5, 6),
    ),
]


@pytest.mark.parametrize(("make_san", "make_plain", "shape"), PAIRS)
def test_starts_as_the_plain_layer_without_bias(make_san, make_plain, shape) -> None:
    torch.manual_seed(0)
    layer = make_san()
    torch.manual_seed(0)
    plain = make_plain()
    x = torch.randn(shape)
    logits = layer(x)
    assert torch.equal(logits.fun, logits.dir)
    assert_close(logits.fun, plain(x))
    assert layer.scale.shape == (3,)
    if layer.bias is not None:
        assert layer.bias.shape == (shape[1],)
        assert not layer.bias.any()


def test_embedding_starts_as_the_plain_one_for_any_shape_of_labels() -> None:
    torch.manual_seed(0)
    layer = san.SANEmbedding(5, 6)
    torch.manual_seed(0)
    plain = nn.Embedding(5, 6)
    assert layer.scale.shape == (5, 1)
    for labels in (
        torch.tensor(3),
        torch.tensor([0, 4, 4]),
        torch.tensor([[1, 2], [3, 4]]),
        torch.tensor([]).long(),
    ):
        logits = layer(labels)
        assert torch.equal(logits.fun, logits.dir)
        assert_close(logits.fun, plain(labels))


def test_input_bias_is_added_before_zero_padding() -> None:
    layer = san.SANConv1d(1, 1, 3, padding=1, input_bias=True)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.scale.fill_(3**0.5)  # cancels the normalisation of a filter of three ones
        layer.bias.fill_(1.0)
    torch.testing.assert_close(layer(torch.zeros(1, 1, 4)).fun.flatten(), torch.tensor([2.0, 3.0, 3.0, 2.0]))


def layers_with_inputs() -> list[tuple[SANLayer, Tensor]]:
    torch.manual_seed(1)
    cases = [
        (san.SANLinear(6, 4, input_bias=True), torch.randn(5, 6)),
        (san.SANConv1d(3, 4, 3, padding=1, input_bias=True), torch.randn(2, 3, 8)),
        (san.SANConv2d(3, 4, 3, padding=1, input_bias=True), torch.randn(2, 3, 5, 6)),
        (san.SANEmbedding(7, 4), torch.tensor([2, 0, 2, 6])),
    ]
    for layer, _ in cases:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return cases


def grads_by_name(view: Tensor, layer: SANLayer, x: Tensor) -> set[str]:
    """Names of what gets a gradient from a random weighting of one view."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    (view * torch.randn_like(view)).sum().backward()
    names = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    return names | ({"x"} if x.grad is not None and x.grad.any() else set())


@pytest.mark.parametrize("case", range(4))
def test_gradient_routing_table(case: int) -> None:
    layer, x = layers_with_inputs()[case]
    inputs = set()
    if x.is_floating_point():
        x.requires_grad_()
        inputs = {"x", "bias"}
    logits = layer(x)
    assert torch.equal(logits.fun, logits.dir)
    assert grads_by_name(logits.fun, layer, x) == {"scale"} | inputs
    assert grads_by_name(logits.dir, layer, x) == {"weight"}


@pytest.mark.parametrize("case", range(4))
def test_direction_gradient_is_tangent_to_the_sphere(case: int) -> None:
    layer, x = layers_with_inputs()[case]
    dir_ = layer(x).dir
    (dir_ * torch.randn_like(dir_)).sum().backward()
    radial = (layer.weight.grad * layer.weight).flatten(1).sum(1)
    size = layer.weight.grad.flatten(1).norm(dim=1) * layer.weight.flatten(1).norm(dim=1)
    assert size.max() > 0.1
    assert (radial.abs() <= 1e-5 * size.clamp_min(1.0)).all()


@pytest.mark.parametrize("case", range(4))
def test_frozen_or_without_grad_both_views_share_one_computation(case: int) -> None:
    layer, x = layers_with_inputs()[case]
    expected = layer(x).fun.detach()
    with torch.no_grad():
        logits = layer(x)
    assert logits.fun.data_ptr() == logits.dir.data_ptr()
    assert torch.equal(logits.fun, expected)
    layer.requires_grad_(False)
    if x.is_floating_point():
        x.requires_grad_()
        logits = layer(x)
        assert logits.fun.data_ptr() == logits.dir.data_ptr()
        assert torch.equal(logits.fun, expected)
        assert logits.fun.requires_grad
        assert not logits.dir.requires_grad
        assert grads_by_name(logits.fun, layer, x) == {"x"}


def test_generator_gradient_is_that_of_the_plain_layer() -> None:
    torch.manual_seed(0)
    layer = san.SANConv2d(3, 2, 3, padding=1)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    r = torch.randn(2, 2, 4, 4)
    plain = F.conv2d(x, layer.weight.detach() * layer.scale.detach().view(-1, 1, 1, 1), padding=1)
    (expected,) = torch.autograd.grad((plain * r).sum(), x)
    (actual,) = torch.autograd.grad((layer(x).fun * r).sum(), x)
    assert_close(actual, expected)


@pytest.mark.parametrize("case", range(3))
def test_first_and_second_derivatives_match_finite_differences(case: int) -> None:
    layer, x = layers_with_inputs()[case]
    layer.double()
    x = x[:1].double().requires_grad_()

    def fun(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        parameters = {"weight": layer.weight.detach(), "scale": scale, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x,)).fun.square()

    def dir_(weight: Tensor) -> Tensor:
        parameters = {"weight": weight, "scale": layer.scale.detach(), "bias": layer.bias.detach()}
        return torch.func.functional_call(layer, parameters, (x.detach(),)).dir.square()

    assert torch.autograd.gradcheck(fun, (x, layer.scale, layer.bias))
    assert torch.autograd.gradgradcheck(fun, (x, layer.scale, layer.bias))
    assert torch.autograd.gradcheck(dir_, (layer.weight,))
    assert torch.autograd.gradgradcheck(dir_, (layer.weight,))


def test_gradient_penalty_through_fun_trains_scale_but_not_direction() -> None:
    layer = san.SANLinear(6, 1)
    x = torch.randn(4, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).fun.sum(), x, create_graph=True)
    penalty = grad.square().sum(1).mean()
    assert_close(penalty.detach(), layer.scale.detach().square().sum())
    penalty.backward()
    assert_close(layer.scale.grad, 2 * layer.scale.detach())
    assert layer.weight.grad is None


def test_normalize_directions_makes_unit_rows_everywhere_and_changes_no_output() -> None:
    layers = layers_with_inputs()
    module = nn.ModuleDict({str(i): layer for i, (layer, _) in enumerate(layers)})
    module["plain"] = nn.Linear(3, 3)
    module["nested"] = nn.Sequential(nn.Sequential(san.SANLinear(3, 2)))
    before = [layer(x).fun.detach() for layer, x in layers]
    assert san.normalize_directions_(module) == 5
    for (layer, x), expected in zip(layers, before, strict=True):
        norms = layer.weight.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
        assert_close(layer(x).fun.detach(), expected)
        assert layer.weight.requires_grad
    assert san.normalize_directions_(nn.Linear(2, 2)) == 0


def test_zero_weight_is_finite() -> None:
    layer = san.SANLinear(4, 2)
    nn.init.zeros_(layer.weight)
    logits = layer(torch.randn(3, 4))
    assert not logits.fun.any()
    assert san.normalize_directions_(layer) == 1
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_normalises_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = 1e-4 * torch.randn(3, 8)  # squares underflow in fp16
    directions, norms = split_norms(weight.to(dtype))
    torch.testing.assert_close(directions.float().norm(dim=1), torch.ones(3), rtol=1e-2, atol=0)
    torch.testing.assert_close(norms.float().flatten(), weight.norm(dim=1), rtol=2e-2, atol=0)
    assert not split_norms(torch.zeros(2, 8, dtype=dtype))[0].any()  # 0 / 1e-12; that bound is 0 in fp16
    for layer, x in layers_with_inputs():
        expected = layer(x).fun.detach()
        half = copy.deepcopy(layer).to(dtype)
        logits = half(x.to(dtype) if x.is_floating_point() else x)
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.fun.float(), expected, rtol=5e-2, atol=5e-2)
        assert torch.equal(logits.fun, logits.dir)
        (logits.fun.sum() + logits.dir.sum()).backward()
        assert all(p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("case", range(4))
def test_autocast_keeps_float32_logits_and_equal_views(case: int) -> None:
    layer, x = layers_with_inputs()[case]
    expected = layer(x).fun.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.fun, logits.dir)
    torch.testing.assert_close(logits.fun, expected, rtol=3e-2, atol=3e-2)
    (logits.fun.sum() + logits.dir.sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("case", range(4))
def test_deepcopy_and_state_dict_round_trip(case: int) -> None:
    layer, x = layers_with_inputs()[case]
    names = {"weight", "scale"} | ({"bias"} if layer.bias is not None else set())
    assert set(layer.state_dict()) == names
    twin, fresh = copy.deepcopy(layer), layers_with_inputs()[case][0]
    nn.init.ones_(fresh.scale)
    fresh.load_state_dict(layer.state_dict())
    for other in (twin, fresh):
        assert other.weight is not layer.weight
        assert torch.equal(other(x).fun, layer(x).fun)
    assert type(layer).__name__ in repr(layer)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="groups"):
        san.SANConv2d(4, 4, 3, groups=2)
    with pytest.raises(RuntimeError):
        san.SANLinear(4, 2)(torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="scale"):
        san.SANLinear(4, 2).load_state_dict(nn.Linear(4, 2, bias=False).state_dict())
