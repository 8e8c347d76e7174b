# SPDX-License-Identifier: MIT
"""One trained head of D rewritten as another kind of head that computes the same function.

SAN or plain, with classes or without: the trunk stays, the last layer is read as what it computes (one filter, or
one vector per class behind a convolution) and written anew. "The same function" holds for evaluation mode up to
rounding, values and gradients. In training mode spectral norms take a power iteration first, and then the functions
agree as far as the stored vectors were those of the weights, which they are but for the last optimizer step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from san.layers import split_norms
from training.config import DiscriminatorConfig
from training.discriminator.heads import LEAK, HeadKind
from training.finetune.class_sources import ClassSources, take_rows
from training.finetune.mapping_conversion import embedding_vectors

ZERO_LENGTH = 1e-10  # class vectors shorter than this have no direction
HeadState = dict[str, Tensor]  # state of a ProjectionHead: names start with "trunk." and "last."


class ConversionError(ValueError):
    """No head of the wanted kind computes this function; the message is the reason, for the transfer table."""


@dataclass(frozen=True)
class HeadForm:
    """What kind of last layer a head has."""

    cfg: DiscriminatorConfig  # sizes, and whether there are classes
    kind: HeadKind  # "san" or "gan"

    @property
    def is_conditional(self) -> bool:
        """True if the last layer has class vectors."""
        return self.cfg.c_dim > 0


def convert_head(
    state: HeadState, fresh: HeadState, source: HeadForm, target: HeadForm, classes: ClassSources | None
) -> HeadState:
    """State of a `target` head that computes what the `source` head with `state` computes.

    fresh: a new target head's state; gives what the function leaves open. classes: which classes the new ones come
    from, one entry for a target without classes; None if the source has none. Raises ConversionError.
    """
    if source.kind == target.kind and source.is_conditional == target.is_conditional:
        return state if classes is None else _with_class_rows(state, source, target, classes)
    kept = {name: x for name, x in state.items() if name.startswith(("trunk.", "last.conv."))}
    num_rows = target.cfg.num_class_embeddings
    if classes is None and not target.is_conditional:
        return _write_filter(state, _read_filter(state, source), target, fresh)
    if classes is None:
        convolution, vector = _spread_filter(_read_filter(state, source), fresh)
        return kept | convolution | _write_vectors(vector.expand(num_rows, -1), target, fresh)
    vectors = _read_vectors(state, source)
    if target.is_conditional:
        return kept | _write_vectors(take_rows(vectors, classes, num_rows), target, fresh)
    return _write_filter(state, _filter_of_class(state, take_rows(vectors, classes)[0]), target, fresh)


def _with_class_rows(
    state: HeadState, source: HeadForm, target: HeadForm, classes: ClassSources
) -> HeadState:
    """Other classes in a head of the same kind."""
    num_rows = target.cfg.num_class_embeddings
    if classes.is_identity and num_rows == source.cfg.num_class_embeddings:
        return state
    if source.kind == "gan":
        return state | {"last.embed.weight": take_rows(state["last.embed.weight"], classes, num_rows)}
    vectors = take_rows(_read_vectors(state, source), classes, num_rows)
    return state | _write_vectors(vectors, target, state)


# What a last layer computes, float64.


def _read_filter(state: HeadState, form: HeadForm) -> Tensor:
    """Filter (1, C, 4, 4) of an unconditional last layer, scale included."""
    if form.kind == "gan":
        return _normalized_weight(state, "last")
    directions, _ = split_norms(state["last.weight"].double())
    return directions * state["last.scale"].double().view(-1, 1, 1, 1)


def _read_vectors(state: HeadState, form: HeadForm) -> Tensor:
    """Class vectors (rows, class_dim) of a conditional last layer."""
    if form.kind == "gan":
        projection = (state["last.embed_proj.weight"], state["last.embed_proj.bias"])
        return embedding_vectors(*projection, state["last.embed.weight"])
    return split_norms(state["last.embed.weight"].double())[0] * state["last.embed.scale"].double()


def _filter_of_class(state: HeadState, vector: Tensor) -> Tensor:
    """The filter that a conditional last layer applies for one class vector (class_dim,)."""
    filters = _normalized_weight(state, "last.conv")  # (class_dim, C, 4, 4)
    return torch.einsum("k,kchw->chw", vector, filters).unsqueeze(0) / math.sqrt(len(vector))


def _normalized_weight(state: HeadState, layer: str) -> Tensor:
    """Spectrally normalised weight as evaluation mode has it, with the stored vectors."""
    weight, u, v = (state[f"{layer}.weight_{part}"].double() for part in ("orig", "u", "v"))
    return weight / torch.dot(u, weight.flatten(1) @ v)


# Last layers that compute it.


def _write_filter(state: HeadState, weight: Tensor, target: HeadForm, fresh: HeadState) -> HeadState:
    """Trunk of `state` and an unconditional last layer that applies `weight`."""
    direction, norm = split_norms(weight)
    scale = norm.item()
    if not weight.any():
        raise ConversionError("its filter is zero, which has no direction")
    head = {name: x for name, x in state.items() if name.startswith("trunk.")}
    if target.kind == "san":
        dtype = fresh["last.weight"].dtype
        return head | {"last.weight": direction.to(dtype), "last.scale": norm.view(1).to(dtype)}
    dtype = fresh["last.weight_orig"].dtype
    last = {
        "last.weight_orig": direction,
        "last.weight_u": torch.ones(1),
        "last.weight_v": direction.flatten(),
    }
    return _scale_trunk(head, scale) | {name: x.to(dtype) for name, x in last.items()}


def _scale_trunk(head: HeadState, scale: float) -> HeadState:
    """Trunk whose output is `scale` times as large: a spectrally normalised filter can only have length 1.

    Leaky ReLU passes a positive factor on, so the BatchNorm before it takes it.
    """
    names = [name for name in head if name.endswith((".1.weight", ".1.bias"))]
    if not names:
        raise ConversionError(
            "spectral norm takes away its scale, and no BatchNorm comes before it to keep it"
        )
    last_block = max(int(name.split(".")[1]) for name in names)
    scaled = {name: head[name] * scale for name in names if int(name.split(".")[1]) == last_block}
    return head | scaled


def _spread_filter(weight: Tensor, fresh: HeadState) -> tuple[HeadState, Tensor]:
    """Convolution (class_dim, C, 4, 4) and class vector (class_dim,) whose product is the filter (1, C, 4, 4).

    The filter's direction becomes the first output. The others are new and orthogonal to it, with a zero in the
    vector: were they absent, all gradients of the convolution and of the directions would stay on one line.
    """
    direction, norm = split_norms(weight)
    template = fresh["last.conv.weight_orig"]
    rows = torch.cat([direction.flatten(1), template.double().flatten(1)[1:]])
    if rows.shape[0] > rows.shape[1]:
        raise ConversionError(f"{rows.shape[0]} orthogonal filters do not fit {rows.shape[1]} weights each")
    basis = torch.linalg.qr(rows.T)[0].T.contiguous()
    basis[0] = direction.flatten()
    u = torch.zeros(len(basis), dtype=torch.float64)
    u[0] = 1
    convolution = {
        "last.conv.weight_orig": basis.view_as(template),
        "last.conv.weight_u": u,
        "last.conv.weight_v": basis[0].clone(),
    }
    vector = u * norm.item() * math.sqrt(len(u))
    return {name: x.to(template.dtype) for name, x in convolution.items()}, vector


def _write_vectors(vectors: Tensor, target: HeadForm, fresh: HeadState) -> HeadState:
    """Tables of a conditional last layer with the class vectors (rows, class_dim)."""
    if target.kind == "gan":
        return _write_plain_vectors(vectors, fresh)
    dtype = fresh["last.embed.weight"].dtype
    directions, norms = split_norms(vectors)
    is_zero = norms.flatten() < ZERO_LENGTH
    directions[is_zero] = 1 / math.sqrt(vectors.shape[1])  # any direction will do at a scale of zero
    norms[is_zero] = 0
    return {"last.embed.weight": directions.to(dtype), "last.embed.scale": norms.to(dtype)}


def _write_plain_vectors(vectors: Tensor, fresh: HeadState) -> HeadState:
    """The new projection as it is, and the embedding rows nearest to the new ones that it maps to the vectors."""
    weight, bias = fresh["last.embed_proj.weight"], fresh["last.embed_proj.bias"]
    class_dim, width = weight.shape
    if width < class_dim:
        raise ConversionError(f"embedding rows of width {width} cannot hold class vectors of {class_dim}")
    matrix = weight.double() / math.sqrt(width)
    wanted = torch.where(vectors > 0, vectors, vectors / LEAK) / math.sqrt(2)  # before the leaky ReLU
    rows = fresh["last.embed.weight"].double()
    rows = rows + (wanted - rows @ matrix.T - bias.double()) @ torch.linalg.pinv(matrix).T
    return {
        "last.embed.weight": rows.to(weight.dtype),
        "last.embed_proj.weight": weight,
        "last.embed_proj.bias": bias,
    }
