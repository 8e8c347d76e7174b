# SPDX-License-Identifier: MIT
"""Networks on disk: one .safetensors file holds the weights and, as JSON metadata, how to build the networks.

A file is data: reading it executes nothing. `load_network` gives back the generator to sample from and needs
neither timm nor the training data; `read_network` gives everything in the file, for fine-tuning. Tensors are
named `G_ema.<name>`, `G.<name>` and `D.<name>`, with the names of the modules' state dicts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError
from training.config import (
    ConfigError,
    DiscriminatorConfig,
    GeneratorConfig,
    TrainConfig,
    from_dict,
    from_json,
    to_json,
)
from training.generator.generator import Generator

FORMAT_VERSION = "1"
PRETRAINED_FOLDER = Path(__file__).parent / "pretrained"
BUILTIN_NETWORKS = {"digits": PRETRAINED_FOLDER / "digits.safetensors"}  # name -> file in the checkout
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class NetworkFileError(UserError):
    """A network file that is missing, damaged or of another kind; the message names the file and the fix."""


@dataclass(frozen=True)
class NetworkFile:
    """Contents of a network file; tensors float32 on the CPU."""

    path: Path  # where it was read from
    generator_config: GeneratorConfig  # builds G and G_ema
    train_config_json: str | None  # of the run that wrote it, as JSON; None = not recorded
    G_ema: dict[str, Tensor]  # averaged generator, the one to sample from
    G: dict[str, Tensor] | None  # generator as trained; None = not in the file
    D: dict[str, Tensor] | None  # trainable part of the discriminator; None = not in the file
    discriminator_config: DiscriminatorConfig | None  # builds D; None = D is not in the file
    head_kind: Literal["san", "gan"] | None  # of D's heads; None = D is not in the file
    info: dict[str, Any]  # progress and results: "cur_nimg", "class_names", "metrics" when known

    @property
    def train_config(self) -> TrainConfig | None:
        """Configuration of the run that wrote the file. ConfigError when this code has other fields."""
        return None if self.train_config_json is None else from_json(TrainConfig, self.train_config_json)


def save_network(
    path: str | os.PathLike[str],
    G_ema: Generator,
    *,
    G: Generator | None = None,
    D_state: Mapping[str, Tensor | None] | None = None,
    config: TrainConfig | None = None,
    info: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a network file, atomically.

    info: values that JSON can hold, see NetworkFile. dtype: how parameters are stored; torch.float16 halves
    the file (buffers, such as filters, stay float32). Loading always gives float32. ValueError when a value
    does not fit into `dtype`.
    """
    tensors = _module_tensors("G_ema", G_ema, dtype)
    if G is not None:
        tensors |= _module_tensors("G", G, dtype)
    if D_state is not None:
        tensors |= {f"D.{name}": _packed(name, x, dtype) for name, x in D_state.items() if x is not None}
    metadata = {
        "format": "stylesan-network",
        "format_version": FORMAT_VERSION,
        "generator": to_json(G_ema.cfg),
        "info": json.dumps(dict(info or {})),
    }
    if config is not None:
        metadata["train"] = to_json(config)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_network(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Generator:
    """G_ema of a network file or of a built-in network, in eval mode, without gradients, on `device`.

    path: a .safetensors file, or a name in BUILTIN_NETWORKS. NetworkFileError when it cannot be used.
    """
    path = resolve_path(path)
    metadata = _read_metadata(path)
    state = _read_tensors(path, "G_ema")
    G_ema = build_generator(_generator_config(path, metadata), state, path)
    return G_ema.eval().requires_grad_(False).to(device)


def read_network(path: str | os.PathLike[str]) -> NetworkFile:
    """Everything in a network file or built-in network. NetworkFileError when it cannot be used."""
    path = resolve_path(path)
    metadata = _read_metadata(path)
    D = _read_tensors(path, "D") or None
    trained = json.loads(metadata["train"]) if D is not None and "train" in metadata else None
    return NetworkFile(
        path=path,
        generator_config=_generator_config(path, metadata),
        train_config_json=metadata.get("train"),
        G_ema=_read_tensors(path, "G_ema"),
        G=_read_tensors(path, "G") or None,
        D=D,
        discriminator_config=trained and from_dict(DiscriminatorConfig, trained["discriminator"]),
        head_kind=trained and trained["loss"],
        info=json.loads(metadata.get("info", "{}")),
    )


def build_generator(config: GeneratorConfig, state: Mapping[str, Tensor], path: Path) -> Generator:
    """Generator on the CPU with the weights of `state`; the random state of the caller is left alone."""
    with torch.random.fork_rng(devices=[]):  # the constructor draws initial weights, which are replaced below
        generator = Generator(config)
    check_state(generator, state, path)
    generator.load_state_dict(dict(state))
    return generator


def check_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise NetworkFileError naming the first tensor of `state` that is missing, unknown or misshapen."""
    expected = module.state_dict()
    advice = "the file does not fit its own configuration; write or download it again"
    if missing := [name for name in expected if name not in state]:
        raise NetworkFileError(f"{path} lacks tensor {missing[0]!r} ({len(missing)} in all): {advice}")
    if unexpected := [name for name in state if name not in expected]:
        unknown = f"{unexpected[0]!r} ({len(unexpected)} in all)"
        raise NetworkFileError(f"{path} has unknown tensor {unknown}: {advice}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            have, want = tuple(tensor.shape), tuple(expected[name].shape)
            raise NetworkFileError(f"{path}: tensor {name!r} has shape {have}, expected {want}: {advice}")


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """The file that --network or --resume means. NetworkFileError when it is none that can be read."""
    text = os.fspath(path)
    if text in BUILTIN_NETWORKS:
        return _existing_builtin(text)
    if text.startswith(("http://", "https://")):
        raise NetworkFileError(
            f"{text}: reading from a URL comes in a later release; download the file first"
        )
    if text.endswith(".pkl"):
        raise NetworkFileError(
            f"{text}: official .pkl files come in a later release; give a .safetensors file"
        )
    file = Path(text)
    if file.is_dir():
        example = file / "best_model.safetensors"
        raise NetworkFileError(f"{text} is a folder; give a network file in it, such as {example}")
    if not file.exists():
        names = ", ".join(BUILTIN_NETWORKS)
        raise NetworkFileError(
            f"{text} does not exist; give a .safetensors file or a built-in name ({names})"
        )
    return file


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


def _read_metadata(path: Path) -> dict[str, str]:
    header = _read_header(path)
    metadata = header.get("__metadata__") or {}
    if metadata.get("format") != "stylesan-network":
        raise NetworkFileError(f"{path} is not a network of this project; give a file written by train.py")
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise NetworkFileError(
            f"{path} has format version {version}, this code reads {FORMAT_VERSION}; update the checkout"
        )
    return metadata


def _read_header(path: Path) -> dict[str, Any]:
    """JSON header of a .safetensors file, after checking that the file is as long as the header says."""
    try:
        num_bytes = path.stat().st_size
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            text = file.read(min(header_bytes, _MAX_HEADER_BYTES))
    except OSError as error:
        raise NetworkFileError(f"{path} cannot be read: {error.strerror}") from error
    if not 0 < header_bytes <= _MAX_HEADER_BYTES or not text.startswith(b"{"):
        raise NetworkFileError(f"{path} is not a .safetensors file; give a network written by train.py")
    truncated = NetworkFileError(f"{path} is truncated ({num_bytes} bytes); copy, download or write it again")
    if len(text) < header_bytes:
        raise truncated
    try:
        header = json.loads(text)
        data_bytes = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise NetworkFileError(f"{path} is not a .safetensors file: its header is damaged") from error
    if num_bytes < 8 + header_bytes + data_bytes:
        raise truncated
    return header


def _read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors whose name starts with `prefix.`, without it; floats as float32."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = [name for name in file.keys() if name.startswith(f"{prefix}.")]  # noqa: SIM118 - not a dict
            state = {name.removeprefix(f"{prefix}."): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise NetworkFileError(f"{path} cannot be read: {error}; copy, download or write it again") from error
    return {name: x.float() if x.is_floating_point() else x for name, x in state.items()}


def _generator_config(path: Path, metadata: Mapping[str, str]) -> GeneratorConfig:
    try:
        return from_json(GeneratorConfig, metadata.get("generator", "{}"))
    except (ConfigError, ValueError) as error:
        raise NetworkFileError(f"{path}: its generator configuration cannot be used: {error}") from error
