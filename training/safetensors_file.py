# SPDX-License-Identifier: MIT
"""Reading our own network files: .safetensors with tensors G_ema.*, G.*, D.* and JSON metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.config import AnyDiscriminatorConfig, AnyGeneratorConfig, ConfigError, from_dict, from_json
from training.network_file import PARTS, NetworkFile, NetworkFileError, Parts

FORMAT = "stylesan-network"
FORMAT_VERSION = "1"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_HOSTILE_METADATA = (ConfigError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def read_safetensors(path: Path, parts: Parts = PARTS) -> NetworkFile:
    """A network file written by `save_network`; of G and D only what is in `parts`.

    Raises NetworkFileError for anything else.
    """
    metadata = _read_metadata(path)
    config = _generator_config(path, metadata)
    D = (_read_tensors(path, "D") or None) if "D" in parts else None
    discriminator = None if D is None else _discriminator(path, metadata)
    return NetworkFile(
        path=path,
        generator_config=config,
        train_config_json=metadata.get("train"),
        G_ema=_read_tensors(path, "G_ema"),
        G=(_read_tensors(path, "G") or None) if "G" in parts else None,
        D=D,
        discriminator_config=discriminator and discriminator[0],
        head_kind=discriminator and discriminator[1],
        info=read_safetensors_info(path, metadata),
    )


def read_safetensors_info(path: Path, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`NetworkFile.info` alone, without reading any tensor."""
    return _read_table(path, "info", metadata)


def read_safetensors_train_settings(path: Path) -> dict[str, Any]:
    """Configuration of the run that wrote the file, as plain values; {} = not recorded."""
    return _read_table(path, "train", None)


def _read_table(path: Path, key: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    metadata = _read_metadata(path) if metadata is None else metadata
    try:
        table = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise NetworkFileError(f"{path}: its {key} is not JSON; write or download the file again") from error
    if not isinstance(table, dict):
        raise NetworkFileError(f"{path}: its {key} is not a table; write or download the file again")
    return table


def is_safetensors(start: bytes) -> bool:
    """Whether a file that starts with these 9 bytes is a .safetensors file: a length, then JSON."""
    return start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") <= _MAX_HEADER_BYTES


def _generator_config(path: Path, metadata: Mapping[str, str]) -> AnyGeneratorConfig:
    try:
        return from_json(AnyGeneratorConfig, metadata.get("generator", "{}"))
    except _HOSTILE_METADATA as error:
        raise NetworkFileError(f"{path}: its generator configuration cannot be used: {error}") from error


def _discriminator(path: Path, metadata: Mapping[str, str]) -> tuple[AnyDiscriminatorConfig, Any] | None:
    """Configuration and head kind of D: stored for D alone, or with the run that trained it; None = neither."""
    try:
        if "discriminator" in metadata:
            stored = json.loads(metadata["discriminator"])
            values, head_kind = stored["config"], stored["head_kind"]
        elif "train" in metadata:
            stored = json.loads(metadata["train"])
            values, head_kind = stored["discriminator"], stored["loss"]
        else:
            return None
        if head_kind not in ("san", "gan"):
            raise ValueError("its heads are neither 'san' nor 'gan'")
        return from_dict(AnyDiscriminatorConfig, values), head_kind
    except _HOSTILE_METADATA as error:
        raise NetworkFileError(
            f"{path}: its discriminator configuration cannot be used: {error}; write or download the file again"
        ) from error


def _read_metadata(path: Path) -> dict[str, str]:
    header = _read_header(path)
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
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
        raise NetworkFileError(
            f"{path} is not a .safetensors file; give a network written by train.py, or an official .pkl"
        )
    truncated = NetworkFileError(f"{path} is truncated ({num_bytes} bytes); copy, download or write it again")
    if len(text) < header_bytes:
        raise truncated
    try:
        header = json.loads(text)
        data_bytes = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
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
