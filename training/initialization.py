# SPDX-License-Identifier: MIT
"""Values that networks take before training: class embedding rows, and weights of an earlier network file."""

from __future__ import annotations

from dataclasses import asdict

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
EMBEDDING_RESOLUTIONS = (64, 224)  # smaller and larger images are resized to these: below 64 features say little
STANDARDIZING_EPS = 1e-3  # features that do not vary between classes stay small instead of becoming noise
MAX_IMAGES_PER_CLASS = 200  # enough for a mean; bounds the start-up time of large sets


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
    return (rows - rows.mean(dim=0)) / (rows.std(dim=0, correction=0) + STANDARDIZING_EPS)


def start_from_network_(G: Generator, D: ProjectedDiscriminator, path: str) -> str:
    """Copy the weights of a network file into G and D; returns a sentence that says what was loaded.

    G takes the file's moving average, as fine-tuning does in StyleGAN. D keeps its fresh weights where the file has
    none. Raises UserError when the networks do not fit.
    """
    stored = read_network(path)
    if stored.generator_config != G.cfg:
        raise UserError(
            f"--resume {path}: its generator was built with {_first_difference(stored.generator_config, G.cfg)}"
        )
    check_state(G, stored.G_ema, stored.path)
    G.load_state_dict(stored.G_ema)
    if stored.D is None:
        return f"Started from {path}: generator loaded; the file has no discriminator, so D starts fresh."
    D.load_trained_state_dict(stored.D)
    return f"Started from {path}: generator and discriminator loaded."


def _first_difference(stored: GeneratorConfig, wanted: GeneratorConfig) -> str:
    for part in ("mapping", "synthesis"):
        before, now = asdict(getattr(stored, part)), asdict(getattr(wanted, part))
        for name in before:
            if before[name] != now[name]:
                return f"{name}={before[name]}, this run asks for {now[name]}; use the settings it was trained with"
    raise AssertionError("equal configurations")
