# SPDX-License-Identifier: MIT
"""Parameters and memory of a run, counted without weights: networks are built on PyTorch's meta device.

Meta tensors have shapes but no data, so a run that needs many GPUs is counted on a laptop, in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_utils.ops.choice import backend, using
from torch_utils.stats import StatsCollector
from training.batch import Batch
from training.config import TrainConfig
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.generator.generator import Generator
from training.loss import GuidanceClassifier, ProjectedGANLoss
from training.superres import freeze_stem_

ADAM_MOMENTS = 2  # tensors of the optimizer per parameter that it trains


@dataclass(frozen=True)
class Footprint:
    """What one process needs to train, in parameters and bytes."""

    G_parameters: int
    G_trained: int  # of them, those that the optimizer moves
    D_parameters: int  # feature networks included
    D_trained: int
    weights: int  # bytes of G, D and, if used, the guidance classifier, with their buffers
    average: int  # bytes of G_ema
    gradients: int  # bytes, of the trained parameters of both networks
    optimizers: int  # bytes of Adam's moments
    activations: int  # bytes kept or computed again for the backward pass of G's step, one micro-batch

    @property
    def total(self) -> int:
        """Bytes in all: a lower bound, since work space and the allocator's waste come on top."""
        return self.weights + self.average + self.gradients + self.optimizers + self.activations


def count_footprint(config: TrainConfig, device_type: str) -> Footprint:
    """Footprint of a run of `config` on a kind of device ("cuda" by itself runs some layers in half precision).

    Raises UserError for a configuration that gives no network.
    """
    with torch.device("meta"):
        G = Generator(config.generator).to("meta")  # filters are designed on the CPU
        D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
        guidance = GuidanceClassifier.random() if config.loss_terms.cls_weight else None
    G.synthesis.set_precision_(config.precision)
    D.set_feature_precision_(config.feature_precision)
    if config.generator.superres:
        freeze_stem_(G, config.trains_stem_input)
    G_trained = [p for p in G.parameters() if p.requires_grad]
    D_trained = list(D.trainable_parameters())
    trained_bytes = count_bytes(G_trained) + count_bytes(D_trained)
    networks = [network for network in (G, D, guidance) if network is not None]
    force_fp32 = device_type != "cuda" and config.precision == "paper"
    with using("reference" if device_type == "cuda" else backend()):
        activations = count_activations(G, D, guidance, config, force_fp32)
    return Footprint(
        G_parameters=count_numbers(G.parameters()),
        G_trained=count_numbers(G_trained),
        D_parameters=count_numbers(D.parameters()) + count_numbers(folded_weights(D)),
        D_trained=count_numbers(D_trained),
        weights=sum(count_bytes(network.state_dict().values()) for network in networks),
        average=count_bytes(G.state_dict().values()),
        gradients=trained_bytes,
        optimizers=ADAM_MOMENTS * trained_bytes,
        activations=activations,
    )


def count_activations(
    G: Generator,
    D: ProjectedDiscriminator,
    guidance: nn.Module | None,
    config: TrainConfig,
    force_fp32: bool,
) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one micro-batch of G's step.

    The networks may be anywhere, and each tensor's memory counts once, however many layers need it. With
    `config.checkpoint_activations` it is the most at any moment of the backward pass: what was kept before a part, and
    what that part keeps once it is computed again.
    """
    if not config.checkpoint_activations:
        return pass_forward(G, D, guidance, config, force_fp32).total
    plain = pass_forward(G, D, guidance, replace(config, checkpoint_activations=False), force_fp32)
    kept = pass_forward(G, D, guidance, config, force_fp32)
    moments = [at.before + part.size for at, part in zip(kept.parts, plain.parts, strict=True)]
    return max(kept.total, *moments)


@dataclass(frozen=True)
class Part:
    """A layer of G, or a frozen network with what follows it."""

    before: int  # bytes kept when it began
    size: int  # bytes that it added


class Kept:
    """Memory that autograd keeps, beside that of networks: in all, and for parts of a forward pass."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._own = {t.untyped_storage() for m in networks for t in [*m.parameters(), *m.buffers()]}
        self._kept: dict[torch.UntypedStorage, int] = {}
        self._before = 0  # bytes kept when the present part began
        self.parts: list[Part] = []  # in order

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self._kept.values())

    def keep(self, tensor: Tensor) -> Tensor:
        """To be called with each tensor that is saved for a backward pass."""
        storage = tensor.untyped_storage()
        if storage not in self._own:
            self._kept[storage] = storage.nbytes()
        return tensor

    def watch(self, first: nn.Module, last: nn.Module) -> list[RemovableHandle]:
        """Count as a part what is kept from the beginning of one module to the end of another."""

        def begin(*_: Any) -> None:
            self._before = self.total

        def end(*_: Any) -> None:
            self.parts.append(Part(self._before, self.total - self._before))

        return [first.register_forward_pre_hook(begin), last.register_forward_hook(end)]


def pass_forward(
    G: Generator, D: ProjectedDiscriminator, guidance: nn.Module | None, config: TrainConfig, force_fp32: bool
) -> Kept:
    """What is kept when the loss of G's step has been computed for a micro-batch."""
    device, num_images = G.mapping.w_avg.device, config.microbatch_size
    D.set_trainable_(False)
    G.synthesis.recomputes = D.recomputes = config.checkpoint_activations
    loss = ProjectedGANLoss(config, guidance)
    parts = [(layer, layer) for layer in G.synthesis.layers]
    parts += [(D.feature_networks[key], D.projectors[key]) for key in D.feature_networks]
    parts += [(guidance, guidance)] if guidance is not None else []
    kept = Kept(network for network in (G, D, guidance) if network is not None)
    handles = [handle for part in parts for handle in kept.watch(*part)]
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        z = torch.zeros(num_images, G.z_dim, device=device)
        labels = torch.zeros(num_images, dtype=torch.int64, device=device) if G.c_dim else None
        images = G.synthesis(G.styles_of(z, labels), force_fp32=force_fp32)
        draws = Draws(config.seed, np.arange(num_images), device)
        batch = Batch(images, labels, z, labels, draws)
        result = loss.generator_loss(D, images, batch, cur_nimg=0, stats=StatsCollector())
    for handle in handles:
        handle.remove()
    del result
    return kept


def folded_weights(D: ProjectedDiscriminator) -> list[Tensor]:
    """Weights of frozen convolutions, which are buffers since their BatchNorm is folded in."""
    return [
        b
        for n in D.feature_networks.values()
        for name, b in n.named_buffers()
        if name.startswith("backbone.")
    ]


def count_numbers(tensors: Iterable[Tensor]) -> int:
    """Numbers in all tensors."""
    return sum(tensor.numel() for tensor in tensors)


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
