# SPDX-License-Identifier: MIT
"""Parameters and memory of a run, counted without weights: networks are built on PyTorch's meta device.

Meta tensors have shapes but no data, so a run that needs many GPUs is counted on a laptop, in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

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
    activations: int  # bytes kept for the backward pass of G's step, one micro-batch

    @property
    def total(self) -> int:
        """Bytes in all: a lower bound, since work space and the allocator's waste come on top."""
        return self.weights + self.average + self.gradients + self.optimizers + self.activations


def count_footprint(config: TrainConfig, device_type: str) -> Footprint:
    """Footprint of a run of `config` on a kind of device ("cuda" runs some layers in half precision).

    Raises UserError for a configuration that gives no network.
    """
    with torch.device("meta"):
        G = Generator(config.generator).to("meta")  # filters are designed on the CPU
        D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
        guidance = GuidanceClassifier.random() if config.loss_terms.cls_weight else None
    if config.generator.superres:
        freeze_stem_(G, config.trains_stem_input)
    G_trained = [p for p in G.parameters() if p.requires_grad]
    D_trained = list(D.trainable_parameters())
    trained_bytes = count_bytes(G_trained) + count_bytes(D_trained)
    networks = [network for network in (G, D, guidance) if network is not None]
    with using("reference" if device_type == "cuda" else backend()):
        activations = count_activations(G, D, guidance, config, force_fp32=device_type != "cuda")
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

    The networks may be anywhere, and each tensor's memory counts once, however many layers need it.
    """
    device = G.mapping.w_avg.device
    own = {
        t.untyped_storage()
        for m in (G, D, guidance)
        if m is not None
        for t in [*m.parameters(), *m.buffers()]
    }
    kept: dict[torch.UntypedStorage, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in own:
            kept[storage] = storage.nbytes()
        return tensor

    num_images, c_dim = config.microbatch_size, config.generator.mapping.c_dim
    D.set_trainable_(False)
    loss = ProjectedGANLoss(config, guidance)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        z = torch.zeros(num_images, G.z_dim, device=device)
        labels = torch.zeros(num_images, dtype=torch.int64, device=device) if c_dim else None
        # One-hot: ids would be checked against their range, which needs values.
        classes = torch.zeros(num_images, c_dim, device=device) if c_dim else None
        images = G.synthesis(G.mapping(z, classes), force_fp32=force_fp32)
        draws = Draws(config.seed, np.arange(num_images), device)
        batch = Batch(images, labels, z, labels, draws)
        result = loss.generator_loss(D, images, batch, cur_nimg=0, stats=StatsCollector())
    del result
    return sum(kept.values())


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
