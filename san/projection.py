# SPDX-License-Identifier: MIT
"""The projection-conditional head `<class vector, features>` with a direction and a length per class.

The class vector is a row of a `SANEmbedding`, or what any other network makes of the label (StyleGAN2's mapped
label): then it is split into direction and length here (SAN, arXiv:2301.12811).
"""

from __future__ import annotations

import torch
from torch import Tensor

from san.layers import split_norms
from san.logits import SANLogits


def project(h: Tensor, w: SANLogits | Tensor) -> SANLogits:
    """Logits of a projection-conditional head: the inner product of features and class vectors over channels.

    h: features (N, C, ...). w: class vectors (N, C). Returns SANLogits of (N, ...); every position of a
    feature map meets the same class vector. `fun` trains h and the scales of w, `dir` the directions of w.
    Divide by sqrt(C) afterwards for the head of StyleGAN2 and StyleSAN-XL.

    w is what a `SANEmbedding` returns; or a plain tensor, made from the label by any network: then its length
    takes gradients from `fun` and its direction from `dir`, and there is nothing to normalise after a step.

    Raises TypeError when h is not a plain tensor; ValueError when the batch or channel sizes differ.

    >>> from san import SANEmbedding
    >>> labels = torch.tensor([1, 7])
    >>> logits = project(torch.randn(2, 64, 4, 4), SANEmbedding(10, 64)(labels)) / 64**0.5
    >>> logits.shape
    torch.Size([2, 4, 4])
    >>> project(torch.randn(2, 64), torch.nn.Embedding(10, 64)(labels)).shape
    torch.Size([2])
    """
    if isinstance(h, SANLogits):
        raise TypeError(
            "project() got SANLogits as features: keep the layer that makes the features a plain one, only the "
            "class vectors have directions"
        )
    if w.ndim != 2 or h.shape[:2] != w.shape:
        raise ValueError(
            f"project() got features {tuple(h.shape)} and class vectors {tuple(w.shape)}: "
            "class vectors must be (N, C) and features (N, C, ...) with the same N and C"
        )
    views = w if isinstance(w, SANLogits) else split_directions(w)
    trailing_axes = (1,) * (h.ndim - 2)
    fun = (h * views.fun.view(*w.shape, *trailing_axes)).sum(1)
    if not torch.is_grad_enabled():
        return SANLogits(fun, fun)
    return SANLogits(fun, (h.detach() * views.dir.view(*w.shape, *trailing_axes)).sum(1))


def split_directions(w: Tensor) -> SANLogits:
    """Two views of vectors (N, C): `fun` trains their lengths, `dir` their directions."""
    directions, lengths = split_norms(w)
    return SANLogits(directions.detach() * lengths, directions * lengths.detach())
