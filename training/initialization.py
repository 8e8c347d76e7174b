# SPDX-License-Identifier: MIT
"""The networks of a run before its first step: built, class embeddings filled in, an earlier network loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_utils.sync_batch_norm import sync_batchnorm_
from training.config import TrainConfig
from training.dataset import ImageDataset
from training.dcgan_loss import make_dcgan_loss
from training.discriminator.feature_network import build_feature_network
from training.discriminator.kinds import AnyDiscriminator, new_discriminator
from training.discriminator.projected import ProjectedDiscriminator
from training.finetune.class_sources import ClassSources, choose_sources
from training.finetune.transfer_plan import check_fit, plan_transfer
from training.finetune.transfer_table import TransferPlan
from training.generator.class_embedding import load_class_embedding, set_class_embedding_
from training.generator.generator import Generator
from training.generator.kinds import AnyGenerator, new_generator
from training.loss import AdversarialLoss, GuidanceClassifier, ProjectedGANLoss
from training.network_file import NetworkFile
from training.network_io import read_network
from training.precision import apply_precision_
from training.superres import freeze_stem_, load_stem, reload_stem_, start_from_stem_

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

    G: AnyGenerator
    D: AnyDiscriminator
    G_ema: AnyGenerator  # moving average of G: the one to sample from


def new_networks(config: TrainConfig, device: torch.device) -> Networks:
    """Networks with random weights, what is not trained frozen.

    G and D compute as config.precision and config.feature_precision say; G_ema as those who load its file will run it.
    Raises UserError for missing pretrained weights, and a precision that the device lacks.
    """
    G = new_generator(config.generator).to(device)
    D = new_discriminator(config.discriminator, head_kind=config.loss).to(device)
    D.set_trainable_(False)  # only discriminator_step turns gradients on
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    if config.trains_head_only:
        freeze_stem_(G, config.trains_stem_input)
    if config.frozen_head_blocks:
        D.freeze_blocks_(config.frozen_head_blocks)
    if config.checkpoint_activations:
        G.synthesis.recomputes = D.recomputes = True
    if config.sync_batchnorm:
        sync_batchnorm_(D)
        sync_batchnorm_(G)  # --cfg dcgan's; others have none
    apply_precision_(G, D, config, device)
    return Networks(G, D, G_ema)


def build_networks(config: TrainConfig, dataset: ImageDataset, device: torch.device) -> tuple[Networks, str]:
    """Networks ready for the first step, and a text about where their weights come from.

    Raises UserError for weights that cannot be had or do not fit. Writes nothing.
    """
    start = None if config.resume is None else StartingPoint.read(config, dataset, device)
    networks = new_networks(config, device)
    set_class_embeddings_(networks.G, networks.D, config, dataset, device)
    networks.G_ema.load_state_dict(networks.G.state_dict())
    origin = "Networks start from random weights."
    stem = load_stem(config) if config.trains_head_only else None
    if stem is not None:
        origin = start_from_stem_(networks.G, networks.G_ema, networks.D, stem, config)
    if start is not None:
        origin = start_from_network_(networks, config, start)
        if stem is not None:
            origin += "\n" + reload_stem_(networks.G, networks.G_ema, stem, config)
    if config.frozen_head_blocks:
        origin += f"\nThe first {config.frozen_head_blocks} blocks of every head of D stay as they are."
    return networks, origin


def set_class_embeddings_(
    G: Generator, D: ProjectedDiscriminator, config: TrainConfig, dataset: ImageDataset, device: torch.device
) -> None:
    """Fill the class embedding tables as config.embedding_source says: "random", "data", or a file.

    Those of a stem ("stem") and of a network to start from ("checkpoint") come with its weights, later.
    """
    source = config.embedding_source
    if config.generator.c_dim == 0 or source in ("random", "stem", "checkpoint"):
        return
    if config.embedding_source == "data":
        rows = class_mean_features(dataset, device)
    else:
        rows = load_class_embedding(config.embedding_source)
    set_class_embedding_(G.mapping, rows)
    D.set_class_embeddings_(rows)


def class_mean_features(dataset: ImageDataset, device: torch.device) -> Tensor:
    """Mean pooled EfficientNet-Lite0 features of every class, standardised, (c_dim, 320) float32 on the CPU.

    The official table holds such means for ImageNet. Classes of a narrow set (digits, faces) have nearly equal means,
    which the mapping network would take for one class: so each feature is shifted and scaled to mean 0 and variance 1
    over classes.
    """
    rows = pooled_class_means(dataset, device).double()
    return ((rows - rows.mean(dim=0)) / (rows.std(dim=0, correction=0) + STANDARDIZING_EPS)).float()


@torch.inference_mode()
def pooled_class_means(dataset: ImageDataset, device: torch.device) -> Tensor:
    """Mean pooled EfficientNet-Lite0 features of every class, (classes, 320) float32 on the CPU.

    A class without images gets the mean of the others. A set without classes counts as one class.
    """
    network = build_feature_network(EMBEDDING_NETWORK, pretrained=True).to(device)
    smallest, largest = EMBEDDING_RESOLUTIONS
    resolution = min(max(dataset.resolution, smallest), largest)
    num_classes = max(dataset.c_dim, 1)
    rows = torch.zeros(num_classes, network.channels[-1])
    seen = torch.zeros(num_classes, dtype=torch.bool)
    for class_id in range(num_classes):
        members = np.flatnonzero(dataset.labels == class_id)[:MAX_IMAGES_PER_CLASS]
        if len(members):
            images, _ = dataset.batch(members)
            features = network.pooled_features(images.to(device).float() / 127.5 - 1, resolution)
            rows[class_id], seen[class_id] = features.mean(dim=0).cpu(), True
    rows[~seen] = rows[seen].mean(dim=0)
    return rows


@dataclass(frozen=True)
class StartingPoint:
    """The networks that a run starts from, seen to fit, and where its classes come from."""

    stored: NetworkFile  # contents of config.resume
    classes: ClassSources | None  # None = it has no classes

    @classmethod
    def read(cls, config: TrainConfig, dataset: ImageDataset, device: torch.device) -> StartingPoint:
        """Read config.resume. Raises UserError when it cannot be read or does not fit."""
        stored = read_network(config.resume)
        check_fit(stored, config)
        num_classes = config.generator.mapping.c_dim
        classes = choose_sources(
            config.classes_from,
            stored,
            num_classes,
            dataset.class_names,
            lambda: pooled_class_means(dataset, device),
        )
        return cls(stored, classes)

    def plan(self, config: TrainConfig, G: Generator, D: ProjectedDiscriminator) -> TransferPlan:
        """What the new networks G and D will take, see `plan_transfer`. Changes nothing."""
        fresh_G = {name: x.cpu() for name, x in G.state_dict().items()}
        fresh_D = {name: x.cpu() for name, x in D.trained_state_dict().items()}
        return plan_transfer(self.stored, config, fresh_G, fresh_D, self.classes)


def start_from_network_(networks: Networks, config: TrainConfig, start: StartingPoint) -> str:
    """Load what the file has for G, D and G_ema; returns the table of what was loaded, converted or left.

    Raises UserError for a damaged file, before any network is changed.
    """
    plan = start.plan(config, networks.G, networks.D)
    networks.G_ema.load_state_dict(plan.G_ema)
    networks.G.load_state_dict(plan.G)
    networks.D.load_trained_state_dict(plan.D)
    return plan.table()


def preview_start(config: TrainConfig, dataset: ImageDataset) -> str:
    """The table of a run that starts from config.resume. Needs no pretrained weights, except to compare classes."""
    start = StartingPoint.read(config, dataset, torch.device("cpu"))
    G = Generator(config.generator)
    D = ProjectedDiscriminator(config.discriminator, head_kind=config.loss, pretrained=False)
    D.freeze_blocks_(config.frozen_head_blocks)  # refuses too many
    return start.plan(config, G, D).table()


def build_loss(config: TrainConfig, device: torch.device) -> AdversarialLoss:
    """The loss that goes with the networks. Raises UserError for an objective that does not, or missing weights."""
    if config.is_dcgan:
        return make_dcgan_loss(config)
    guidance = GuidanceClassifier.pretrained().to(device) if config.loss_terms.cls_weight else None
    return ProjectedGANLoss(config, guidance)
