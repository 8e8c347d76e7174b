# SPDX-License-Identifier: MIT
"""Files of random weights in the formats in which detectors are published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metrics.inception import InceptionTrunk, torch_layer_names


@pytest.fixture(scope="session")
def inception_tensors() -> dict[str, Tensor]:
    """Random weights of Inception under torch-fidelity's names; maps keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(7)
    with torch.device("meta"):
        shapes = [m.weight.shape for m in InceptionTrunk().modules() if isinstance(m, nn.Conv2d)]
    tensors: dict[str, Tensor] = {}
    for name, shape in zip(torch_layer_names(), shapes, strict=True):
        unit, width = name.removesuffix("conv"), shape[0]
        std = (2 / shape[1:].numel()) ** 0.5
        tensors[f"{unit}conv.weight"] = torch.randn(shape, generator=generator) * std
        tensors[f"{unit}bn.weight"] = torch.rand(width, generator=generator) + 0.5
        tensors[f"{unit}bn.bias"] = torch.randn(width, generator=generator) * 0.1
        tensors[f"{unit}bn.running_mean"] = torch.randn(width, generator=generator) * 0.1
        tensors[f"{unit}bn.running_var"] = torch.rand(width, generator=generator) + 0.5
        tensors[f"{unit}bn.num_batches_tracked"] = torch.tensor(0)
    tensors["fc.weight"] = torch.randn(1008, 2048, generator=generator) / 2048**0.5
    tensors["fc.bias"] = torch.randn(1008, generator=generator)
    return tensors


@pytest.fixture(scope="session")
def inception_file(inception_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """These weights as torch-fidelity and pytorch-fid publish them."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_tensors, path)
    return path
