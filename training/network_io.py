# SPDX-License-Identifier: MIT
"""Networks on disk: .safetensors files that this project writes, and official .pkl files that it reads.

A file is data: reading it executes nothing. `load_network` gives back the generator to sample from and needs
neither timm nor the training data; `read_network` gives everything in the file, for fine-tuning. Both take a path, an
https address or the name of a built-in network. In a .safetensors file tensors are named `G_ema.<name>`, `G.<name>`
and `D.<name>`, with the names of the modules' state dicts; JSON metadata says how to build the networks.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torch_utils.checkpoint import atomic_write
from torch_utils.download import fetch, is_url
from training.config import AnyDiscriminatorConfig, AnyGeneratorConfig, TrainConfig, to_json
from training.generator.kinds import AnyGenerator, new_generator
from training.network_file import PARTS, NetworkFile, NetworkFileError, Parts, check_names_and_shapes
from training.official_network import read_official
from training.safetensors_file import (
    FORMAT,
    FORMAT_VERSION,
    is_safetensors,
    read_safetensors,
    read_safetensors_info,
    read_safetensors_train_settings,
)

__all__ = [
    "BUILTIN_NETWORKS",
    "NetworkFile",
    "NetworkFileError",
    "build_generator",
    "check_state",
    "load_network",
    "read_info",
    "read_network",
    "read_train_settings",
    "resolve_path",
    "save_network",
]

PRETRAINED_FOLDER = Path(__file__).parent / "pretrained"
BUILTIN_NETWORKS = {"digits": PRETRAINED_FOLDER / "digits.safetensors"}  # name -> file in the checkout


def save_network(
    path: str | os.PathLike[str],
    G_ema: AnyGenerator,
    *,
    G: AnyGenerator | None = None,
    D_state: Mapping[str, Tensor | None] | None = None,
    discriminator: tuple[AnyDiscriminatorConfig, Literal["san", "gan"]] | None = None,
    config: TrainConfig | None = None,
    info: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a network file, atomically.

    discriminator: configuration and kind of heads of D_state; None = those of `config`. info: values that JSON can
    hold, see NetworkFile. dtype: how parameters are stored; torch.float16 halves the file (buffers, such as
    filters, stay float32). Loading always gives float32. ValueError when a value does not fit into `dtype`.
    """
    tensors = _module_tensors("G_ema", G_ema, dtype)
    if G is not None:
        tensors |= _module_tensors("G", G, dtype)
    if D_state is not None:
        tensors |= {f"D.{name}": _packed(name, x, dtype) for name, x in D_state.items() if x is not None}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "generator": to_json(G_ema.cfg),
        "info": json.dumps(dict(info or {})),
    }
    if config is not None:
        metadata["train"] = to_json(config)
    if discriminator is not None:
        stored = {"config": dataclasses.asdict(discriminator[0]), "head_kind": discriminator[1]}
        metadata["discriminator"] = json.dumps(stored)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_network(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", offline: bool = False
) -> AnyGenerator:
    """G_ema of a network file or of a built-in network, in eval mode, without gradients, on `device`.

    path: a .safetensors file, an official .pkl, an https address of either, or a name in BUILTIN_NETWORKS.
    offline: use an address only if it has been downloaded before. NetworkFileError (or another UserError) when it
    cannot be used.
    """
    stored = _read(resolve_path(path, offline), parts=("G_ema",))
    G_ema = build_generator(stored.generator_config, stored.G_ema, stored.path)
    return G_ema.eval().requires_grad_(False).to(device)


def read_network(path: str | os.PathLike[str], offline: bool = False) -> NetworkFile:
    """Everything in a network, given as for `load_network`. NetworkFileError when it cannot be used."""
    return _read(resolve_path(path, offline), parts=PARTS)


def read_info(path: str | os.PathLike[str], offline: bool = False) -> dict[str, Any]:
    """`NetworkFile.info` alone, without keeping any tensor. NetworkFileError when the file cannot be used."""
    file = resolve_path(path, offline)
    return _read(file, parts=("G_ema",)).info if _is_pickle(file) else read_safetensors_info(file)


def read_train_settings(path: str | os.PathLike[str], offline: bool = False) -> dict[str, Any]:
    """Configuration of the run that wrote one of our files, as plain values; {} = not recorded, or another kind."""
    file = resolve_path(path, offline)
    return {} if _is_pickle(file) else read_safetensors_train_settings(file)


def build_generator(config: AnyGeneratorConfig, state: Mapping[str, Tensor], path: Path) -> AnyGenerator:
    """Generator on the CPU with the weights of `state`, copied; the random state of the caller is left alone.

    Nothing is allocated before names and shapes are seen to fit.
    """
    with torch.device("meta"):
        generator = new_generator(config)
    check_state(generator, state, path)
    generator.load_state_dict({name: x.clone() for name, x in state.items()}, assign=True)
    return generator


def check_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise NetworkFileError naming the first tensor of `state` that is missing, unknown or misshapen."""
    advice = "the file does not fit its own configuration; write or download it again"
    check_names_and_shapes(module.state_dict(), state, path, advice)


def resolve_path(path: str | os.PathLike[str], offline: bool = False) -> Path:
    """The local file that --network or --resume means; an https address is downloaded once, unless `offline`.

    NetworkFileError when it is none that can be read, UserError when a download fails.
    """
    text = os.fspath(path)
    if text in BUILTIN_NETWORKS:
        return _existing_builtin(text)
    if is_url(text):
        return fetch(text, offline=offline)
    file = Path(text)
    if file.is_dir():
        example = file / "best_model.safetensors"
        raise NetworkFileError(f"{text} is a folder; give a network file in it, such as {example}")
    if not file.exists():
        names = ", ".join(BUILTIN_NETWORKS)
        raise NetworkFileError(
            f"{text} does not exist; give a .safetensors or official .pkl file, an https address or a built-in "
            f"name ({names})"
        )
    return file


def _read(path: Path, parts: Parts) -> NetworkFile:
    return read_official(path, parts) if _is_pickle(path) else read_safetensors(path, parts)


def _is_pickle(path: Path) -> bool:
    """Whether the content, whatever the name, is a pickle (of protocol 2 or later, as all networks are)."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise NetworkFileError(f"{path} cannot be read: {error.strerror}") from error
    return start[:1] == b"\x80" and not is_safetensors(start)


def _existing_builtin(name: str) -> Path:
    file = BUILTIN_NETWORKS[name]
    if not file.exists():
        raise NetworkFileError(
            f"built-in network {name!r} is missing: {file} is not there; use a full checkout"
        )
    return file


def _module_tensors(prefix: str, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    parameters = {name for name, _ in module.named_parameters()}
    return {
        f"{prefix}.{name}": _packed(name, x, dtype if name in parameters else torch.float32)
        for name, x in module.state_dict().items()
    }


def _packed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous copy on the CPU, its own storage (the format refuses shared ones); floats become `dtype`."""
    tensor = tensor.detach().cpu()
    packed = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if packed.dtype != tensor.dtype and not torch.equal(packed.isfinite(), tensor.isfinite()):
        raise ValueError(f"values of {name!r} do not fit into {dtype}; store the network as torch.float32")
    return packed.clone(memory_format=torch.contiguous_format)
