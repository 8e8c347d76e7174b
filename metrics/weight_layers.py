# SPDX-License-Identifier: MIT
"""Convolutions and linear layers from tensors by name, and into networks of ours.

Files disagree about names but not about order and shape. A layer is a weight and the vectors that follow it; a
BatchNorm's are folded into the weight, in float64. Every mismatch is an error that names the first one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from torch_utils.errors import UserError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

BATCHNORM_EPSILON = 1e-3  # of Inception in TensorFlow; no other network here has BatchNorms
_ROLES = {  # last part of a vector's name -> what it is; "weight" is a BatchNorm's, a layer's own is no vector
    "weight": "gain",
    "gamma": "gain",
    "bias": "shift",
    "beta": "shift",
    "running_mean": "mean",
    "moving_mean": "mean",
    "mean": "mean",
    "running_var": "variance",
    "moving_variance": "variance",
    "moving_var": "variance",
    "variance": "variance",
    "var": "variance",
}


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer, its BatchNorm folded in."""

    name: str  # of its weight in the file, without ".weight"
    weight: Tensor  # float32 (out, in, height, width) or (out, in)
    bias: Tensor | None  # float32 (out,)


def group_layers(tensors: Mapping[str, Tensor], source: str) -> list[Layer]:
    """Layers of a file's tensors, in its order. source: the file's name, for messages.

    Integers (counters) and vectors of at most three numbers (a preprocessing's mean) are left out. Raises UserError
    for a vector whose part in its layer is unknown, or that does not fit it.
    """
    groups: list[tuple[str, Tensor, dict[str, Tensor]]] = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() <= 3:
            continue
        last = name.rpartition(".")[2]
        is_vector = tensor.ndim == 1 or (
            tensor.numel() == max(tensor.shape) and last in _ROLES and last != "weight"
        )
        if not is_vector:
            groups.append((name, tensor, {}))
            continue
        role = _ROLES.get(last)
        if not groups or role is None or role in groups[-1][2] or len(tensor.flatten()) != len(groups[-1][1]):
            layer = f"after {groups[-1][0]} {list(groups[-1][1].shape)}" if groups else "before any layer"
            raise UserError(
                f"{source}: {name} {list(tensor.shape)}, {layer}, has no known part in a layer; "
                "give a file in one of the documented formats"
            )
        groups[-1][2][role] = tensor.flatten()
    return [_fold(name, weight, vectors, source) for name, weight, vectors in groups]


def _fold(name: str, weight: Tensor, vectors: Mapping[str, Tensor], source: str) -> Layer:
    """A weight with its vectors as one layer."""
    name = name.removesuffix(".weight")
    if ("mean" in vectors) != ("variance" in vectors) or ("gain" in vectors and "mean" not in vectors):
        raise UserError(
            f"{source}: {name} has a part of a BatchNorm only ({', '.join(vectors)}); give a complete file"
        )
    shift = vectors.get("shift")
    if "mean" not in vectors:
        return Layer(name, weight.float(), None if shift is None else shift.float())
    gain = (vectors["variance"].double() + BATCHNORM_EPSILON).rsqrt()
    if "gain" in vectors:
        gain = gain * vectors["gain"].double()
    bias = -vectors["mean"].double() * gain
    if shift is not None:
        bias = bias + shift.double()
    scaled = weight.double() * gain.view(-1, *[1] * (weight.ndim - 1))
    return Layer(name, scaled.float(), bias.float())


def sort_layers(layers: Sequence[Layer], names: Sequence[str]) -> list[Layer]:
    """`layers` with those called `names` in that order, first, if all of these are there; else as they are."""
    by_name = {layer.name: layer for layer in layers}
    if not set(names) <= set(by_name):
        return list(layers)
    return [*(by_name[name] for name in names), *(layer for layer in layers if layer.name not in set(names))]


def empty_network(build: Callable[[], ModuleT]) -> ModuleT:
    """A network of no weights yet, for `load_layers_`: initial ones take seconds, and random numbers from training."""
    with torch.device("meta"):
        network = build()
    return network.to_empty(device="cpu")


@torch.no_grad()
def load_layers_(network: nn.Module, layers: Sequence[Layer], source: str) -> None:
    """Fill `network`: its i-th convolution from the i-th in `layers`, and so with linear layers.

    Numbers of layers and all shapes must agree. Raises UserError with the first that do not, before it changes
    anything.
    """
    pairs = []
    for kind, word, ndim in ((nn.Conv2d, "convolution", 4), (nn.Linear, "linear layer", 2)):
        own = [(name, module) for name, module in network.named_modules() if isinstance(module, kind)]
        stored = [layer for layer in layers if layer.weight.ndim == ndim]
        for i, ((name, module), layer) in enumerate(zip(own, stored, strict=False)):
            found = _shapes(layer.weight, layer.bias)
            if found != _shapes(module.weight, module.bias):
                raise UserError(
                    f"{source}: {word} {i + 1}, {layer.name}, has shapes {found}; {name} of the network needs "
                    f"{_shapes(module.weight, module.bias)}; give the weights of this network"
                )
            pairs.append((module, layer))
        if len(own) != len(stored):
            raise UserError(
                f"{source} has {len(stored)} {word}s, the network {len(own)}; give the weights of this network"
            )
    for module, layer in pairs:
        module.weight.copy_(layer.weight)
        if layer.bias is not None:
            module.bias.copy_(layer.bias)


def _shapes(weight: Tensor, bias: Tensor | None) -> str:
    return f"{list(weight.shape)} + {list(bias.shape) if bias is not None else 'no bias'}"


def hash_weights(module: nn.Module, recipe: str) -> str:
    """Hex digest of every name and value in the module's state, and of `recipe`."""
    digest = hashlib.sha256(recipe.encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
