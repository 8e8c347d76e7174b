# SPDX-License-Identifier: MIT
"""san.convert_layer: the twin of one layer computes the same, whatever norm, gain, bias or padding; or it says why not.

python -m pytest tests/san/test_twins.py
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import san
from san.twins import is_equalized, solve_input_bias

PADDED = {"kernel_size": 3, "padding": 1}
LAYERS = {
    "linear": (lambda: nn.Linear(7, 1, bias=False), (5, 7), "SANLinear"),
    "linear_bias": (lambda: nn.Linear(7, 3), (5, 7), "SANLinear"),
    "linear_square_zero_bias": (lambda: zero_bias(nn.Linear(7, 9)), (5, 7), "SANLinear"),
    "conv1d": (lambda: nn.Conv1d(4, 1, 5, 2, 2, bias=False), (2, 4, 11), "SANConv1d"),
    "conv1d_bias": (lambda: nn.Conv1d(4, 2, 5, 2), (2, 4, 11), "SANConv1d"),
    "conv1d_padded_bias": (lambda: nn.Conv1d(4, 2, **PADDED), (2, 4, 11), "Sequential"),
    "conv1d_same": (lambda: nn.Conv1d(4, 2, 4, padding="same", dilation=2), (2, 4, 11), "Sequential"),
    "conv1d_valid": (lambda: nn.Conv1d(4, 2, 4, padding="valid"), (2, 4, 11), "SANConv1d"),
    "conv2d": (lambda: nn.Conv2d(4, 1, (3, 1), padding=(1, 0), bias=False), (2, 4, 6, 5), "SANConv2d"),
    "conv2d_bias": (lambda: nn.Conv2d(4, 1, 4), (2, 4, 6, 5), "SANConv2d"),
    "conv2d_padded_bias": (lambda: nn.Conv2d(4, 2, (3, 5), 2, (2, 1), 2), (2, 4, 9, 10), "Sequential"),
    "conv2d_same": (lambda: nn.Conv2d(4, 2, (4, 3), padding="same"), (2, 4, 6, 5), "Sequential"),
    "reflect": (lambda: nn.Conv2d(4, 1, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 6, 5), "Sequential"),
    "replicate": (
        lambda: nn.Conv1d(4, 1, **PADDED, padding_mode="replicate", bias=False), (2, 4, 6), "Sequential",
    ),
    "circular": (lambda: nn.Conv2d(4, 1, **PADDED, padding_mode="circular"), (2, 4, 6, 5), "Sequential"),
    "embedding": (lambda: nn.Embedding(6, 3), None, "SANEmbedding"),
}  # fmt: skip
NORMS = {
    "none": lambda layer: layer,
    "spectral_hook": spectral_norm,
    "spectral_parametrization": parametrizations.spectral_norm,
    "weight_hook": weight_norm,
    "weight_parametrization": parametrizations.weight_norm,
}


def zero_bias(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.bias)
    return layer


def make_input(shape: tuple[int, ...] | None) -> Tensor:
    return torch.tensor([[0, 5], [2, 2]]) if shape is None else torch.randn(shape, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_twin_computes_the_same(kind: str, norm: str, is_training: bool) -> None:
    make, shape, twin_type = LAYERS[kind]
    layer = NORMS[norm](make().double()).train(is_training)
    if is_training:  # leaves a weight with a graph in the attributes of norms by hooks
        layer(make_input(shape))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    twin = san.convert_layer(layer)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert type(twin).__name__ == twin_type
    assert twin.training == is_training
    x = make_input(shape)
    expected, logits = layer(x), twin(x)
    assert logits.dtype == torch.float64
    for view in (logits.fun, logits.dir):
        torch.testing.assert_close(view, expected, rtol=1e-10, atol=1e-10)
    copy.deepcopy(twin)


class Equalized(nn.Module):
    """A learning-rate equalised layer, linear or convolutional."""

    def __init__(self, *shape: int, bias: bool = True, activation: str = "linear", down: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * 100)
        self.bias = nn.Parameter(torch.randn(shape[0])) if bias else None
        self.weight_gain, self.bias_gain = 0.01 / np.sqrt(math.prod(shape[1:])), 0.01
        self.activation, self.up, self.down, self.padding = activation, 1, down, shape[-1] // 2

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias * self.bias_gain
        if self.weight.ndim == 2:
            return F.linear(x, self.weight * self.weight_gain, bias)
        return F.conv2d(x, self.weight * self.weight_gain, bias, padding=self.padding)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Equalized(1, 6), (4, 6)),
        (Equalized(3, 6, bias=False), (4, 6)),
        (Equalized(2, 6, 3, 3), (4, 6, 5, 5)),
        (Equalized(1, 6, 1, 1, bias=False), (4, 6, 5, 5)),
    ],
)
def test_equalized_learning_rate(layer: Equalized, shape: tuple[int, ...]) -> None:
    assert is_equalized(layer)
    twin, x = san.convert_layer(layer), torch.randn(shape)
    torch.testing.assert_close(twin(x).fun, layer(x), rtol=1e-5, atol=1e-5)


def test_the_twin_in_low_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer = nn.Linear(64, 1).to(dtype)
        twin, x = san.convert_layer(layer), torch.randn(8, 64, dtype=dtype)
        assert twin.weight.dtype == dtype
        torch.testing.assert_close(twin(x).fun, layer(x), rtol=5e-2, atol=5e-2)


def test_frozen_and_trained_stay_so() -> None:
    assert not any(
        p.requires_grad for p in san.convert_layer(nn.Linear(3, 1).requires_grad_(False)).parameters()
    )
    assert all(p.requires_grad for p in san.convert_layer(spectral_norm(nn.Linear(3, 1))).parameters())


def test_no_random_number_is_drawn() -> None:
    layer, before = nn.Conv2d(4, 1, 3), torch.get_rng_state()
    san.convert_layer(layer)
    assert torch.equal(torch.get_rng_state(), before)


def test_input_bias_is_the_shortest_solution() -> None:
    weight, bias = torch.randn(2, 5, 3, 3), torch.randn(2)
    taps = weight.sum((2, 3))
    solution = solve_input_bias(weight, bias)
    torch.testing.assert_close(taps @ solution, bias)
    expected = taps.t() @ torch.linalg.solve(taps @ taps.t(), bias)
    torch.testing.assert_close(solution, expected, rtol=1e-4, atol=1e-5)
    single = solve_input_bias(torch.tensor([[3.0, 4.0]]), torch.tensor([50.0]))
    torch.testing.assert_close(single, torch.tensor([6.0, 8.0]))  # b w / |w|^2


class OwnNorm(nn.Linear):
    """A subclass that uses another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class TakesTwo(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


REFUSED = {
    "groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 1, 3), "ConvTranspose2d has no SAN twin.*converters="),
    "conv3d": (lambda: nn.Conv3d(4, 1, 3), "Conv3d has no SAN twin"),
    "norm": (lambda: nn.BatchNorm2d(4), "BatchNorm2d has no SAN twin"),
    "already": (lambda: san.SANLinear(3, 1), "SANLinear already"),
    "lazy": (lambda: nn.LazyLinear(1), "run the discriminator once"),
    "zero_unit": (lambda: with_weight(nn.Linear(2, 2), torch.eye(2)[:, :1] * torch.ones(2)), "unit 1 is zero"),
    "not_finite": (lambda: with_weight(nn.Linear(2, 1), torch.tensor([[1.0, math.nan]])), "not finite"),
    "padding_idx": (lambda: nn.Embedding(3, 2, padding_idx=0), "no padding_idx"),
    "sparse": (lambda: nn.Embedding(3, 2, sparse=True, max_norm=1.0), "no max_norm, sparse"),
    "more_outputs": (lambda: nn.Linear(3, 4), r"no c solves W c = b for the \(4, 3\).*bias=False"),
    "rank": (lambda: with_weight(nn.Linear(3, 2), torch.ones(2, 3)), "full row rank"),
    "nearly_rank": (
        lambda: with_weight(nn.Linear(2, 2), torch.tensor([[1.0, 0], [1.0, 1e-5]])), "exactly or nearly",
    ),
    "cancelling_taps": (
        lambda: with_weight(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, -1.0]]])), "summed over a filter's taps",
    ),
    "own_norm": (lambda: OwnNorm(3, 1), "OwnNorm computes something else.*converters={OwnNorm"),
    "two_inputs": (lambda: TakesTwo(3, 1), "does not run on one tensor"),
    "activation": (lambda: Equalized(1, 4, activation="lrelu"), "'lrelu' is not 'linear'"),
    "resampling": (lambda: Equalized(1, 4, 3, 3, down=2), "up, down"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_without_a_twin_is_refused_with_the_reason(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(san.SanifyError, match=words) as caught:
        san.convert_layer(make())
    assert "\n" not in str(caught.value) or name == "two_inputs"


def test_a_converter_extends_it() -> None:
    def convert(layer: OwnNorm) -> nn.Linear:
        plain = nn.Linear(layer.in_features, layer.out_features)
        return with_weight(plain, layer.weight / layer.weight.norm()).requires_grad_(True)

    layer, x = OwnNorm(5, 1), torch.randn(3, 5)
    with torch.no_grad():
        layer.bias.zero_()
    twin = san.convert_layer(layer, {OwnNorm: lambda m: zero_bias(convert(m))})
    torch.testing.assert_close(twin(x).fun, layer(x))
    with pytest.raises(san.SanifyError, match="converter of OwnNorm returned a Identity"):
        san.convert_layer(layer, {OwnNorm: lambda m: nn.Identity()})
    with pytest.raises(san.SanifyError, match="computes something else"):
        san.convert_layer(layer, {OwnNorm: lambda m: nn.Linear(5, 1)})
