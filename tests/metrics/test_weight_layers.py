# SPDX-License-Identifier: MIT
"""Layers from tensors: BatchNorms folded, order by name, mismatches named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metrics.weight_layers import Layer, empty_network, group_layers, hash_weights, load_layers_, sort_layers
from torch_utils.errors import UserError


def batchnorm(width: int, **names: str) -> dict[str, Tensor]:
    """Random vectors under the given names for gain, shift, mean and variance."""
    values = {"gain": torch.rand(width) + 0.5, "shift": torch.randn(width)}
    values |= {"mean": torch.randn(width), "variance": torch.rand(width) + 0.5}
    return {name: values[role] for role, name in names.items()}


STYLES = {
    "torch": {
        "gain": "bn.weight",
        "shift": "bn.bias",
        "mean": "bn.running_mean",
        "variance": "bn.running_var",
    },
    "graph": {"shift": "beta", "mean": "mean", "variance": "var"},
    "graph with gains": {
        "gain": "gamma",
        "shift": "beta",
        "mean": "moving_mean",
        "variance": "moving_variance",
    },
    "no shift": {"mean": "mean", "variance": "var"},
}


@pytest.mark.parametrize("style", STYLES)
def test_batchnorms_are_folded_into_their_layer(style):
    names = STYLES[style]
    vectors = batchnorm(4, **names)
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 6, 6)
    (layer,) = group_layers({"a.conv.weight": weight, **{f"a.{k}": v for k, v in vectors.items()}}, "file")
    by_role = {role: vectors[name] for role, name in names.items()}
    expected = nn.functional.batch_norm(
        nn.functional.conv2d(x, weight),
        by_role["mean"],
        by_role["variance"],
        by_role.get("gain"),
        by_role.get("shift"),
        eps=1e-3,
    )
    assert layer.name == "a.conv"
    torch.testing.assert_close(
        nn.functional.conv2d(x, layer.weight, layer.bias), expected, rtol=1e-4, atol=1e-5
    )


def test_counters_and_preprocessing_are_left_out():
    tensors = {
        "mean": torch.zeros(3),
        "std": torch.ones(1, 3, 1, 1),
        "fc.weight": torch.ones(4, 5, dtype=torch.float16),
        "fc.bias": torch.ones(4, dtype=torch.float16),
        "bn.num_batches_tracked": torch.tensor(7),
    }
    (layer,) = group_layers(tensors, "file")
    assert layer.name == "fc" and layer.weight.dtype == layer.bias.dtype == torch.float32


def test_vectors_may_have_the_shape_of_maps():
    tensors = {"c.weight": torch.randn(4, 3, 1, 1), "c.bias": torch.arange(4.0).view(1, 4, 1, 1)}
    (layer,) = group_layers(tensors, "file")
    assert torch.equal(layer.bias, torch.arange(4.0))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.bias": torch.ones(4)}, "a.bias [4], before any layer"),
        ({"a.weight": torch.ones(4, 5), "a.sigma": torch.ones(4)}, "a.sigma [4], after a.weight [4, 5]"),
        ({"a.weight": torch.ones(4, 5), "a.bias": torch.ones(5)}, "a.bias [5], after a.weight [4, 5]"),
        (
            {"a.weight": torch.ones(4, 5), "a.bias": torch.ones(4), "b.bias": torch.ones(4)},
            "b.bias [4], after",
        ),
        ({"a.weight": torch.ones(4, 5), "a.mean": torch.ones(4)}, "a has a part of a BatchNorm only (mean)"),
        (
            {"a.weight": torch.ones(4, 5), "bn.weight": torch.ones(4)},
            "a has a part of a BatchNorm only (gain)",
        ),
    ],
)
def test_unknown_parts_are_named(tensors, message):
    with pytest.raises(UserError) as caught:
        group_layers(tensors, "file.pt")
    assert f"file.pt: {message}" in str(caught.value) and "\n" not in str(caught.value)


def layers(**shapes: tuple[int, ...]) -> list[Layer]:
    return [Layer(name, torch.randn(shape), torch.randn(shape[0])) for name, shape in shapes.items()]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2))


def test_layers_are_loaded_by_order_within_their_kind():
    stored = layers(last=(2, 16), first=(4, 3, 1, 1), second=(4, 4, 1, 1))
    target = empty_network(network)
    load_layers_(target, stored, "file")
    for module, layer in zip((target[4], target[0], target[2]), stored, strict=True):
        assert torch.equal(module.weight, layer.weight) and torch.equal(module.bias, layer.bias)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            layers(a=(4, 3, 1, 1), b=(4, 4, 3, 3), c=(2, 16)),
            "convolution 2, b, has shapes [4, 4, 3, 3] + [4]; 2 of",
        ),
        (layers(a=(4, 3, 1, 1), c=(2, 16)), "has 1 convolutions, the network 2"),
        (layers(a=(4, 3, 1, 1), b=(4, 4, 1, 1)), "has 0 linear layers, the network 1"),
        (layers(a=(4, 3, 1, 1), b=(4, 4, 1, 1), c=(2, 16), d=(3, 4)), "has 2 linear layers, the network 1"),
        ([Layer("a", torch.ones(4, 3, 1, 1), None)], "convolution 1, a, has shapes [4, 3, 1, 1] + no bias"),
    ],
)
def test_the_first_mismatch_is_named_before_anything_changes(stored, message):
    target = network()
    before = hash_weights(target, "")
    with pytest.raises(UserError) as caught:
        load_layers_(target, stored, "file")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert hash_weights(target, "") == before


def test_known_names_give_the_order():
    stored = layers(b=(1, 1), a=(1, 1), other=(1, 1))
    assert [layer.name for layer in sort_layers(stored, ["a", "b"])] == ["a", "b", "other"]
    assert [layer.name for layer in sort_layers(stored, ["a", "x"])] == ["b", "a", "other"]


def test_an_empty_network_draws_no_random_numbers():
    state = torch.random.get_rng_state()
    assert next(empty_network(network).parameters()).device.type == "cpu"
    assert torch.equal(torch.random.get_rng_state(), state)
