# SPDX-License-Identifier: MIT
"""The networks of a run before its first step: built, class embeddings filled in, an earlier network loaded."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from torch_utils.errors import UserError
from training.config import GeneratorConfig, TrainConfig
from training.dataset import ImageDataset
from training.discriminator.feature_network import build_feature_network
from training.discriminator.projected import ProjectedDiscriminator
from training.generator.class_embedding import load_class_embedding, set_class_embedding_
from training.generator.generator import Generator
from training.network_io import check_state, read_network

EMBEDDING_NETWORK = "tf_efficientnet_lite0"  # the network behind the official table: 320 pooled channels
EMBEDDING_RESOLUTIONS = (
    64,
    224,
)  # smaller and larger images are resized to these: below 64 features say little
STANDARDIZING_EPS = 1e-3  # features that do not vary between classes stay small instead of becoming noise
MAX_IMAGES_PER_CLASS = 200  # enough for a mean; bounds the start-up time of large sets


@dataclass(frozen=True)
class Networks:
    """The three networks of a run, on their device."""

    G: Generator
    D: ProjectedDiscriminator
    G_ema: Generator  # moving average of G: the one to sample from


def build_networks(config: TrainConfig, dataset: ImageDataset, device: torch.device) -> tuple[Networks, str]:
    """Networks ready for the first step, and a sentence about where their weights come from.

    Raises UserError for weights that cannot be had or do not fit. Writes nothing.
    """
    G = Generator(config.generator).to(device)
    D = ProjectedDiscriminator(config.discriminator, head_kind=config.loss).to(device)
    D.set_trainable_(False)  # only discriminator_step turns gradients on
    set_class_embeddings_(G, D, config, dataset, device)
    networks = Networks(G, D, copy.deepcopy(G).eval().requires_grad_(False))
    if config.resume is None:
        return networks, "Networks start from random weights."
    return networks, start_from_network_(networks, config.resume)


def set_class_embeddings_(
    G: Generator, D: ProjectedDiscriminator, config: TrainConfig, dataset: ImageDataset, device: torch.device
) -> None:
    """Fill the class embedding tables as config.embedding_source says: "random", "data", or a file."""
    if config.generator.mapping.c_dim == 0 or config.embedding_source == "random":
        return
    if config.embedding_source == "data":
        rows = class_mean_features(dataset, device)
    else:
        rows = load_class_embedding(config.embedding_source)
    set_class_embedding_(G.mapping, rows)
    D.set_class_embeddings_(rows)


@torch.inference_mode()
def class_mean_features(dataset: ImageDataset, device: torch.device) -> Tensor:
    """Mean pooled EfficientNet-Lite0 features of every class, standardised, (c_dim, 320) float32 on the CPU.

    The official table holds such means for ImageNet. Classes of a narrow set (digits, faces) have nearly equal means,
    which the mapping network would take for one class: so each feature is shifted and scaled to mean 0 and variance 1
    over classes. A class without images gets the mean of the others.
    """
    network = build_feature_network(EMBEDDING_NETWORK, pretrained=True).to(device)
    smallest, largest = EMBEDDING_RESOLUTIONS
    resolution = min(max(dataset.resolution, smallest), largest)
    rows = torch.zeros(dataset.c_dim, network.channels[-1])
    seen = torch.zeros(dataset.c_dim, dtype=torch.bool)
    for class_id in range(dataset.c_dim):
        members = np.flatnonzero(dataset.labels == class_id)[:MAX_IMAGES_PER_CLASS]
        if len(members):
            images, _ = dataset.batch(members)
            features = network.pooled_features(images.to(device).float() / 127.5 - 1, resolution)
            rows[class_id], seen[class_id] = features.mean(dim=0).cpu(), True
    rows[~seen] = rows[seen].mean(dim=0)
    rows = rows.double()
    return ((rows - rows.mean(dim=0)) / (rows.std(dim=0, correction=0) + STANDARDIZING_EPS)).float()


def start_from_network_(networks: Networks, path: str) -> str:
    """Copy the weights of a network file into G, D and G_ema; returns a sentence that says what was loaded.

    A file without G, such as a published generator, gives its moving average to G too; one without D leaves D fresh.
    Raises UserError when the networks do not fit.
    """
    stored = read_network(path)
    if difference := _first_difference(stored.generator_config, networks.G.cfg):
        raise UserError(f"--resume {path}: its generator was built with {difference}")
    for network, state in ((networks.G_ema, stored.G_ema), (networks.G, stored.G or stored.G_ema)):
        check_state(network, state, stored.path)
        network.load_state_dict(state)
    if stored.D is None:
        return f"Started from {path}: generator loaded; the file has no discriminator, so D starts fresh."
    networks.D.load_trained_state_dict(stored.D)
    return f"Started from {path}: generator and discriminator loaded."


def _first_difference(stored: GeneratorConfig, wanted: GeneratorConfig) -> str | None:
    for part in ("mapping", "synthesis"):
        before, now = asdict(getattr(stored, part)), asdict(getattr(wanted, part))
        for name in before:
            is_relevant = name != "magnitude_ema_beta"  # follows the batch size; no weight depends on it
            if is_relevant and before[name] != now[name]:
                return f"{name}={before[name]}, this run asks for {now[name]}; use the settings it was trained with"
    return None
