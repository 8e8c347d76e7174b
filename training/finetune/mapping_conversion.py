# SPDX-License-Identifier: MIT
"""The mapping network of a checkpoint for other classes, for none, or for classes where there were none.

The first images change as little as can be: see `convert_mapping`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_utils.ops.bias_act import bias_act
from training.config import MappingConfig
from training.finetune.class_sources import ClassSources, take_rows
from training.generator.mapping import normalize_second_moment


def convert_mapping(
    state: dict[str, Tensor], source: MappingConfig, target: MappingConfig, classes: ClassSources | None
) -> dict[str, Tensor]:
    """State of a mapping network (names without prefix) for other classes, or with or without classes.

    classes: None if the checkpoint is unconditional. What is not in the result has to start anew: `embed_proj`
    (and the embedding rows) of a network that becomes conditional. At first each class gives the images of the
    classes it comes from; without classes, of their mean class vector; a network that becomes conditional gives
    its unconditional images for every class.
    """
    if classes is None:
        return state if target.c_dim == 0 else _add_classes(state, source, target)
    if target.c_dim == 0:
        return _remove_classes(state, source, classes)
    converted = dict(state)
    converted["embed.weight"] = take_rows(state["embed.weight"], classes, target.num_embeddings)
    converted["w_avg"] = take_rows(state["w_avg"], classes)
    return converted


def _remove_classes(
    state: dict[str, Tensor], source: MappingConfig, classes: ClassSources
) -> dict[str, Tensor]:
    """Fold the mean class vector into the first layer's bias.

    That layer computes lr (W_z z + W_y y) / sqrt(2 z_dim) + lr b; without y it divides by sqrt(z_dim).
    """
    y = embedding_vectors(state["embed_proj.weight"], state["embed_proj.bias"], state["embed.weight"])
    y = take_rows(normalize_second_moment(y), classes)[0]
    weight_z, weight_y = state["fc0.weight"].split(source.z_dim, dim=1)
    shift = weight_y.double() @ y / math.sqrt(2 * source.z_dim)
    converted = {name: x for name, x in state.items() if not name.startswith("embed_proj.")}
    converted["fc0.weight"] = weight_z / math.sqrt(2)
    converted["fc0.bias"] = (state["fc0.bias"].double() + shift).to(weight_z.dtype)
    converted["w_avg"] = take_rows(state["w_avg"], classes)[0]
    return converted


def _add_classes(state: dict[str, Tensor], source: MappingConfig, target: MappingConfig) -> dict[str, Tensor]:
    """New columns for the class vector start at zero, so that classes make no difference yet."""
    converted = {name: x for name, x in state.items() if name != "embed.weight"}
    weight = state["fc0.weight"]
    converted["fc0.weight"] = torch.cat([weight * math.sqrt(2), torch.zeros_like(weight)], dim=1)
    converted["w_avg"] = state["w_avg"].expand(target.c_dim, -1).clone()
    return converted


def embedding_vectors(weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """What a fully connected layer with leaky ReLU makes of embedding rows, float64 (rows, out).

    weight (out, width) and bias (out,) as stored, at a learning rate multiplier of 1.
    """
    product = rows.double() @ weight.double().T / math.sqrt(weight.shape[1])
    return bias_act(product, bias.double(), act="lrelu")
