# SPDX-License-Identifier: MIT
"""The families of discriminators that tests/san turns into SANs, and what a fork says to `sanify` in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from san_discriminators import (  # the file beside this one; conftest.py gives it the name
    NUM_CLASSES,
    R3GAND,
    BigGAND,
    EditedBigGAND,
    EditedR3GAND,
    EditedSingleDiscCond,
    EditedStudioGAND,
    EditedStyleGAN2D,
    PatchD,
    ProjectedD,
    SingleDiscCond,
    SNEmbedding,
    SNLinear,
    StudioGAND,
    StyleGAN2D,
    StyleGANXLD,
    WaveD,
    plain_embedding,
    plain_linear,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm


@dataclass(frozen=True)
class Family:
    """One discriminator, before and after the fork's edit of its forward, and how its data look."""

    make: Callable[[], nn.Module]
    make_edited: Callable[[], nn.Module] | None = None  # None: the forward stays
    shape: tuple[int, ...] = (3, 16, 16)  # of one sample
    labels: str | None = None  # "onehot", "id"
    objective: str = "nonsaturating"
    sanify: dict | None = field(default_factory=dict)  # keyword arguments; None: no layer to convert
    num_layers: int = 1  # that sanify replaces
    takes_pairs: bool = False  # D(real, fake)


BIGGAN = {"names": ["linear", "embed"], "converters": {SNLinear: plain_linear, SNEmbedding: plain_embedding}}
WIDE = (3, 32, 32)
FAMILIES = {
    "stylegan2": Family(StyleGAN2D),
    "stylegan2_labels": Family(
        lambda: StyleGAN2D(NUM_CLASSES), lambda: EditedStyleGAN2D(NUM_CLASSES), labels="onehot", sanify=None
    ),
    "stylegan3": Family(lambda: StyleGAN2D(low_precision=torch.bfloat16)),
    "projected": Family(ProjectedD, shape=WIDE, objective="hinge", num_layers=2),
    "stylegan_xl": Family(StyleGANXLD, shape=WIDE, objective="hinge", num_layers=4),
    "stylegan_xl_labels": Family(
        lambda: StyleGANXLD(SingleDiscCond), lambda: StyleGANXLD(EditedSingleDiscCond), WIDE, "onehot", "hinge",
        sanify=None,
    ),
    "r3gan": Family(R3GAND, objective="relativistic"),
    "r3gan_labels": Family(
        lambda: R3GAND(NUM_CLASSES), lambda: EditedR3GAND(NUM_CLASSES), labels="onehot", objective="relativistic",
        sanify=None,
    ),
    "biggan": Family(BigGAND, EditedBigGAND, labels="id", objective="hinge", sanify=BIGGAN, num_layers=2),
    "studiogan": Family(
        StudioGAND, EditedStudioGAND, labels="id", objective="hinge",
        sanify={"names": ["linear1", "embedding"]}, num_layers=2,
    ),
    "vqgan": Family(PatchD, shape=WIDE, objective="hinge"),
    "hifigan": Family(
        lambda: WaveD(("period", "period", "scale"), weight_norm), None, (1, 64), None, "soft_least_squares",
        num_layers=3, takes_pairs=True,
    ),
    "bigvgan": Family(
        lambda: WaveD(("period", "spectrogram"), parametrizations.weight_norm), None, (1, 64), None,
        "soft_least_squares", num_layers=2, takes_pairs=True,
    ),
}  # fmt: skip


def make_labels(family: Family, num_samples: int) -> tuple[Tensor, ...]:
    """No label, or one per sample."""
    ids = torch.arange(num_samples) % NUM_CLASSES
    if family.labels is None:
        return ()
    return (ids,) if family.labels == "id" else (F.one_hot(ids, NUM_CLASSES).float(),)


def list_logits(family: Family, D: nn.Module, real: Tensor, fake: Tensor, labels: tuple[Tensor, ...]):
    """Logits of real and of fake samples, a list of each, as a loss of that family receives them."""
    if family.takes_pairs:
        return D(real, fake)[:2]
    outputs = D(real, *labels), D(fake, *labels)
    outputs = [o["adv_output"] if isinstance(o, dict) else o for o in outputs]
    return tuple(output if isinstance(output, list) else [output] for output in outputs)
