# SPDX-License-Identifier: MIT
"""Projected discriminator of StyleGAN-XL (arXiv:2202.00273): frozen features, frozen projections, trained
heads.

Images go through every backbone on their own: augment, normalise, resize, features, random projection, one
head per level. Only the heads are trained. Only what cannot be had elsewhere is saved: heads and random
projections.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from san import SANLogits
from torch_utils.recompute import recompute
from training.config import ConfigError, DiscriminatorConfig, FeaturePrecision
from training.discriminator.feature_network import MAX_LEVELS, build_feature_network, resize
from training.discriminator.heads import DownBlock, HeadKind, ProjectionHead
from training.discriminator.projector import Projector


class ProjectedDiscriminator(nn.Module):
    """Images (N, 3, H, W), float in [-1, 1], and labels -> {backbone: SANLogits (N, K)}, K patches over all
    levels.

    The feature networks and projectors stay frozen and in evaluation mode whatever is asked of the module.
    """

    def __init__(self, cfg: DiscriminatorConfig, head_kind: HeadKind, pretrained: bool = True) -> None:
        """head_kind: "san" or "gan". pretrained: False = random feature networks, for tests.

        Raises ConfigError for unknown or repeated backbones and sizes that do not fit together, UserError if
        pretrained weights cannot be had.
        """
        super().__init__()
        _check_config(cfg, head_kind)
        self.cfg = cfg
        self.recomputes = False  # a backward pass to the images computes all that is frozen again
        self.feature_networks = nn.ModuleDict()
        self.projectors = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        for name in cfg.backbones:
            network = build_feature_network(
                name,
                pretrained,
                cfg.num_levels,
                official_batchnorm_statistics=cfg.official_batchnorm_statistics,
            )
            projector = Projector(network.channels, cfg.projected_channels)
            heads = nn.ModuleList(
                ProjectionHead(cfg, head_kind, channels, cfg.nominal_resolution // 2 ** (level + 1))
                for level, channels in enumerate(projector.out_channels)
            )
            resolution = network.required_resolution or cfg.feature_resolution or cfg.img_resolution
            _check_sizes(name, resolution, network.level_sizes(resolution), heads)
            key = module_key(name)
            self.feature_networks[key], self.projectors[key], self.heads[key] = network, projector, heads
        self.to(memory_format=torch.channels_last)
        self.train()

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, SANLogits]:
        """Logits of every patch, per backbone in the configured order.

        labels: int64 class ids (N,); ignored by an unconditional discriminator. augment: images -> images,
        drawn afresh for each backbone. Raises ValueError for images that are not RGB.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images of shape {tuple(images.shape)} are not (N, 3, H, W); repeat a grey channel 3 times"
            )
        return {
            name: self.backbone_logits(name, augment(images) if augment else images, labels)
            for name in self.names
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Backbones, in order."""
        return self.cfg.backbones

    def backbone_logits(self, name: str, images: Tensor, labels: Tensor | None) -> SANLogits:
        """Logits (N, K) of one backbone for images (N, 3, H, W) in [-1, 1] that are augmented already."""
        key = module_key(name)
        projected = recompute(self.project, key, images) if self.recomputes else self.project(key, images)
        return torch.cat([head(x, labels) for head, x in zip(self.heads[key], projected, strict=True)], dim=1)

    def project(self, key: str, images: Tensor) -> list[Tensor]:
        """All that is frozen: projected feature maps, finest first. key: `module_key` of a backbone."""
        network = self.feature_networks[key]
        resolution = network.required_resolution or self.cfg.feature_resolution
        return self.projectors[key](network(resize(network.normalize(images), resolution)))

    def set_feature_precision_(self, precision: FeaturePrecision) -> None:
        """What the pretrained networks compute in from now on; all else, and what goes in and out, stays float32."""
        for network in self.feature_networks.values():
            network.set_precision_(precision)

    # What is trained.

    def train(self, mode: bool = True) -> ProjectedDiscriminator:
        """Switch the heads (BatchNorm, spectral norm) between training and evaluation mode."""
        super().train(mode)
        self.feature_networks.eval()
        self.projectors.eval()
        return self

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters for the optimizer: those of the heads, without frozen blocks."""
        blocks = (m for m in self.heads.modules() if isinstance(m, DownBlock) and m.is_frozen)
        frozen = {id(parameter) for block in blocks for parameter in block.parameters()}
        return (parameter for parameter in self.heads.parameters() if id(parameter) not in frozen)

    def freeze_blocks_(self, count: int) -> None:
        """Freeze the first `count` blocks of every head for good: a block keeps its weights and statistics.

        Heads with fewer blocks are frozen up to their last layer. Raises ConfigError when no head has so many.
        """
        heads = [head for level in self.heads.values() for head in level]
        most = max(len(head.trunk) for head in heads)
        if count > most:
            raise ConfigError(f"--freezed {count}: the heads of D have at most {most} blocks; freeze fewer")
        for head in heads:
            head.freeze_blocks_(count)

    def set_trainable_(self, mode: bool) -> None:
        """Let gradients reach the heads' parameters, or not. Never touches the frozen parts."""
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(mode)

    def requires_grad_(self, requires_grad: bool = True) -> ProjectedDiscriminator:
        """Like `set_trainable_`: the frozen parts stay frozen."""
        self.set_trainable_(requires_grad)
        return self

    @torch.no_grad()
    def set_class_embeddings_(self, rows: Tensor) -> None:
        """Start the class tables of plain conditional heads from pooled image features, float (classes,
        width).

        Without effect on SAN and unconditional heads, which have no such table. Raises ConfigError when the
        shape does not fit.
        """
        for table in (m for m in self.heads.modules() if isinstance(m, nn.Embedding)):
            if rows.ndim != 2 or rows.shape[1] != table.embedding_dim or len(rows) > table.num_embeddings:
                raise ConfigError(
                    f"class embeddings of shape {tuple(rows.shape)} do not fit a table of "
                    f"{table.num_embeddings} rows of embedding_dim={table.embedding_dim}"
                )
            table.weight[: len(rows)].copy_(rows)

    # What is saved.

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Everything but the pretrained backbones: heads with their buffers, and all random frozen layers.

        The tensors are contiguous, as file formats require; most share memory with the module.
        """
        state = self.state_dict()
        return {name: value.contiguous() for name, value in state.items() if not _is_backbone(name)}

    def load_trained_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `trained_state_dict` gave. Raises ConfigError unless names and shapes agree."""
        own = self.trained_state_dict()
        if odd := sorted(own.keys() ^ state.keys()):
            where = "missing from" if odd[0] in own else "not expected in"
            raise ConfigError(
                f"{len(odd)} tensors, first {odd[0]!r}, are {where} the saved discriminator: {_HINT}"
            )
        for name, value in state.items():
            if value.shape != own[name].shape:
                raise ConfigError(
                    f"saved discriminator: {name!r} has shape {list(value.shape)}, "
                    f"not {list(own[name].shape)}: {_HINT}"
                )
        self.load_state_dict(state, strict=False)


_HINT = "it was built from another configuration; use the one stored beside it"


def module_key(name: str) -> str:
    """Name of a backbone's parts in the state dict."""
    return name.replace(".", "-")  # timm's tags follow a dot, which names of modules cannot contain


def _is_backbone(name: str) -> bool:
    return name.startswith("feature_networks.") and name.split(".")[2] == "backbone"


def _check_config(cfg: DiscriminatorConfig, head_kind: str) -> None:
    if head_kind not in ("san", "gan"):
        raise ConfigError(f"head kind {head_kind!r} is neither 'san' nor 'gan'")
    if not cfg.backbones:
        raise ConfigError("backbones is empty; name at least one, such as tf_efficientnet_lite0")
    repeated = [name for name in cfg.backbones if cfg.backbones.count(name) > 1]
    if repeated:
        raise ConfigError(
            f"backbone {repeated[0]!r} is listed {len(repeated)} times; name each backbone once"
        )
    if not 1 <= cfg.num_levels <= MAX_LEVELS:
        raise ConfigError(f"num_levels={cfg.num_levels} is not between 1 and {MAX_LEVELS}")
    if cfg.head_resolution not in (4, 8, 16):
        raise ConfigError(f"head_resolution={cfg.head_resolution} is not one of 4, 8, 16")


def _check_sizes(name: str, resolution: int, sizes: tuple[int, ...], heads: nn.ModuleList) -> None:
    """sizes: sides of the feature maps; the projector doubles them."""
    for level, (finer, coarser) in enumerate(itertools.pairwise(sizes)):
        if finer != 2 * coarser:
            raise ConfigError(
                f"{name} on {resolution}x{resolution} images has levels {level} and {level + 1} of sides "
                f"{finer} and {coarser}, not 2:1; set feature_resolution to a multiple of "
                f"{4 * 2 ** (len(sizes) - 1)}"
            )
    for level, (size, head) in enumerate(zip(sizes, heads, strict=True)):
        if head.final_size(2 * size) < 1:
            raise ConfigError(
                f"level {level} of {name} on {resolution}x{resolution} images is too small for its head: "
                "increase feature_resolution, decrease nominal_resolution, or use fewer num_levels"
            )
