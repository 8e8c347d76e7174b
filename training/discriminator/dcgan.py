# SPDX-License-Identifier: MIT
"""A small convolutional discriminator after DCGAN (arXiv:1511.06434), plain or SAN, trained from scratch.

Its last layer, a 4x4 convolution over 4x4 features, is one inner product: with SAN (arXiv:2301.12811) it gets a unit
direction. A conditional critic has one such product per class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from torch import Tensor, nn

import san
from torch_utils.conv_stacks import COARSEST, LEAK, down_stack, init_weights_
from training.config import ConfigError
from training.dcgan_config import DCGANDiscriminatorConfig, plan_channels

CODE_HEAD_DIM = 128  # hidden units of InfoGAN's Q head


class CodeLogits(NamedTuple):
    """What InfoGAN's Q head says about the codes of images."""

    categorical: Tensor  # (N, num_categories): logits
    mean: Tensor  # (N, num_continuous): means of normal distributions
    log_std: Tensor  # (N, num_continuous): logarithms of their standard deviations


class TrainedDiscriminator(nn.Module):
    """A discriminator that is trained and saved as a whole: what the training loop asks for beside `forward`."""

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters for the optimizer."""
        return self.parameters()

    def set_trainable_(self, mode: bool) -> None:
        """Let gradients reach the parameters, or not."""
        self.requires_grad_(mode)

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Everything that is saved; the tensors share memory with the module."""
        return self.state_dict()

    def load_trained_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `trained_state_dict` gave. Raises ConfigError unless names and shapes agree."""
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(
                "the saved discriminator was built from another configuration; use the one stored beside it"
            ) from error


class DCGANDiscriminator(TrainedDiscriminator):
    """Images (N, C, H, W) in [-1, 1] and labels -> {critic: SANLogits (N, 1)}, the weakest critic first.

    Raises ConfigError for a configuration that gives no network.
    """

    def __init__(self, cfg: DCGANDiscriminatorConfig, head_kind: Literal["san", "gan"]) -> None:
        super().__init__()
        has_codes = cfg.num_categories + cfg.num_continuous > 0
        if not cfg.channel_bases or (has_codes and len(cfg.channel_bases) > 1):
            raise ConfigError(f"channel_bases={cfg.channel_bases} must have one entry, or more without codes")
        self.cfg = cfg
        self.critics = nn.ModuleDict(
            {f"critic{i}": Critic(cfg, head_kind, base) for i, base in enumerate(cfg.channel_bases)}
        )
        self.code_head = CodeHead(cfg, self.critics["critic0"].num_features) if has_codes else None

    def forward(
        self, images: Tensor, labels: Tensor | None = None, augment: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, san.SANLogits]:
        """Logits by critic. labels: int64 class ids (N,); ignored without classes. augment: images -> images."""
        return {
            name: critic(augment(images) if augment else images, labels)
            for name, critic in self.critics.items()
        }

    def forward_with_codes(
        self, images: Tensor, labels: Tensor | None = None, augment: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[dict[str, san.SANLogits], CodeLogits]:
        """As `forward`, and what InfoGAN's Q head says of the same features."""
        critic = self.critics["critic0"]
        features = critic.trunk(augment(images) if augment else images)
        return {"critic0": critic.judge(features, labels)}, self.code_head(features)


class Critic(nn.Module):
    """Images (N, C, H, W) to logits, SANLogits (N, 1): of the label if there are classes.

    Plain and SAN critics start as the same function. The last layer has no bias, as DCGAN's.
    """

    def __init__(
        self, cfg: DCGANDiscriminatorConfig, head_kind: Literal["san", "gan"], channel_base: int
    ) -> None:
        super().__init__()
        widths = plan_channels(cfg.img_resolution, channel_base, cfg.channel_max)
        self.num_features = widths[-1]
        self.is_conditional = cfg.c_dim > 0
        self.trunk = down_stack(cfg.img_channels, widths, cfg.has_batchnorm)
        self.last = nn.Conv2d(self.num_features, max(cfg.c_dim, 1), COARSEST, bias=False)
        init_weights_(self, cfg.has_batchnorm)
        if head_kind == "san":
            self.last = san.convert_layer(self.last)

    def forward(self, images: Tensor, labels: Tensor | None) -> san.SANLogits:
        return self.judge(self.trunk(images), labels)

    def judge(self, features: Tensor, labels: Tensor | None) -> san.SANLogits:
        """Logits (N, 1) of the trunk's features (N, num_features, 4, 4)."""
        logits = self.last(features)
        logits = (logits if isinstance(logits, san.SANLogits) else san.SANLogits.plain(logits)).flatten(1)
        if not self.is_conditional:
            return logits
        if labels is None:
            raise ValueError("labels are None, but the discriminator is conditional: pass class ids (N,)")
        return logits.gather(1, labels.unsqueeze(1))  # (N, c_dim) -> (N, 1)


class CodeHead(nn.Module):
    """InfoGAN's Q (arXiv:1606.03657): features (N, C, 4, 4) to the distributions of the codes."""

    def __init__(self, cfg: DCGANDiscriminatorConfig, num_features: int) -> None:
        super().__init__()
        self.sizes = [cfg.num_categories, cfg.num_continuous, cfg.num_continuous]
        self.layers = nn.Sequential(
            nn.Conv2d(num_features, CODE_HEAD_DIM, COARSEST, bias=False),
            nn.BatchNorm2d(CODE_HEAD_DIM),
            nn.LeakyReLU(LEAK, inplace=True),
            nn.Flatten(),
            nn.Linear(CODE_HEAD_DIM, sum(self.sizes)),
        )
        init_weights_(self, has_batchnorm=True)

    def forward(self, features: Tensor) -> CodeLogits:
        return CodeLogits(*self.layers(features).split(self.sizes, dim=1))
