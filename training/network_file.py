# SPDX-License-Identifier: MIT
"""What every kind of network file is read into, and the error for those that cannot be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from torch_utils.errors import UserError
from training.config import AnyDiscriminatorConfig, AnyGeneratorConfig, TrainConfig, from_json

PARTS = ("G_ema", "G", "D")  # networks in a file
Parts = Collection[Literal["G_ema", "G", "D"]]


class NetworkFileError(UserError):
    """A network file that is missing, damaged or of another kind; the message names the file and the fix."""


@dataclass(frozen=True)
class NetworkFile:
    """Contents of a network file; tensors float32 on the CPU."""

    path: Path  # where it was read from
    generator_config: AnyGeneratorConfig  # builds G and G_ema
    train_config_json: str | None  # of the run that wrote it, as JSON; None = not recorded
    G_ema: dict[str, Tensor]  # averaged generator, the one to sample from
    G: dict[str, Tensor] | None  # generator as trained; None = not in the file
    D: dict[str, Tensor] | None  # trainable part of the discriminator; None = not in the file
    discriminator_config: AnyDiscriminatorConfig | None  # builds D; None = D is not in the file
    head_kind: Literal["san", "gan"] | None  # of D's heads; None = D is not in the file
    info: dict[str, Any]  # progress and results: "cur_nimg", "class_names", "metrics" when known

    @property
    def train_config(self) -> TrainConfig | None:
        """Configuration of the run that wrote the file. ConfigError when this code has other fields."""
        return None if self.train_config_json is None else from_json(TrainConfig, self.train_config_json)


def check_names_and_shapes(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, advice: str
) -> None:
    """Raise NetworkFileError naming the first tensor of `state` that is missing, unknown or misshapen."""
    if missing := [name for name in expected if name not in state]:
        raise NetworkFileError(f"{path} lacks tensor {missing[0]!r} ({len(missing)} in all): {advice}")
    if unexpected := [name for name in state if name not in expected]:
        unknown = f"{unexpected[0][:120]!r} ({len(unexpected)} in all)"
        raise NetworkFileError(f"{path} has unknown tensor {unknown}: {advice}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            have, want = tuple(tensor.shape), tuple(expected[name].shape)
            raise NetworkFileError(f"{path}: tensor {name!r} has shape {have}, expected {want}: {advice}")
