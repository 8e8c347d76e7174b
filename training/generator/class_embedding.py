# SPDX-License-Identifier: MIT
"""Class embedding rows of the mapping network: read from a file, written into the table.

StyleGAN-XL starts from one row of pretrained image features per class (arXiv:2202.00273, section 3.1). The
official table (`tf_efficientnet_lite0.pkl`) is read without executing anything in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_utils.errors import UserError
from training.generator.mapping import MappingNetwork
from training.official_pickle import InertModule, load_official_pickle

_SUFFIXES = (".npy", ".npz", ".safetensors", ".pt", ".pkl")


def load_class_embedding(path: str | Path) -> Tensor:
    """Embedding rows (rows, width), float32 on the CPU: .npy, .npz, .safetensors, .pt or the official .pkl.


    A file of several arrays must call the table `embed` or `embed.weight`. Raises UserError if the file is
    missing, damaged, of another kind, or holds no finite table of floats.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: class embeddings come from {', '.join(_SUFFIXES)} files; convert it")
    if not path.is_file():
        raise UserError(f"{path}: no such file of class embeddings; check the path")
    if path.suffix == ".pkl":
        content = _unwrap_official(path, load_official_pickle(path))
    else:
        try:
            content = _read(path)
        except Exception as error:  # each format's reader raises its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} cannot be read as {path.suffix} ({reason}); write it again") from error
    return _check_table(path, _pick_table(path, content))


@torch.no_grad()
def set_class_embedding_(mapping: MappingNetwork, rows: Tensor) -> None:
    """Copy row i of `rows` (rows, embedding_dim) to class i; rows beyond the table are ignored, others stay.

    Raises UserError for another width than the table's, or fewer rows than the network has classes.
    """
    num_classes, (table_rows, width) = mapping.cfg.c_dim, mapping.embed.weight.shape
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UserError(
            f"class embeddings of shape {tuple(rows.shape)} do not fit a table of width {width}; use it"
        )
    if len(rows) < num_classes:
        raise UserError(
            f"{len(rows)} class embeddings given to a network with {num_classes} classes; give one per class"
        )
    count = min(len(rows), table_rows)
    mapping.embed.weight[:count].copy_(rows[:count])


def _read(path: Path) -> Any:
    """A tensor, or a dict of tensors by name."""
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {
                name: torch.from_numpy(arrays[name])
                for name in arrays.files
                if arrays[name].dtype.kind in "fiub"
            }
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # imported here: only this format needs the package

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap_official(path: Path, content: Any) -> Tensor:
    """The weight of the Embedding that the official file stores under `embed`."""
    value = content
    for key in ("embed", "_parameters", "weight"):
        value = value.state if isinstance(value, InertModule) else value
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, Tensor):
        raise UserError(
            f"{path}: no torch Embedding under the key 'embed'; this is not an official embedding file"
        )
    return value


def _pick_table(path: Path, content: Any) -> Tensor:
    if isinstance(content, Tensor):
        return content
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    for name in ("embed", "embed.weight"):
        if name in tensors:
            return tensors[name]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    found = ", ".join(sorted(tensors)) or "none"
    raise UserError(f"{path}: one array, or one called 'embed', is wanted; the arrays found are: {found}")


def _check_table(path: Path, table: Tensor) -> Tensor:
    if table.ndim != 2 or not table.is_floating_point():
        raise UserError(
            f"{path}: shape {tuple(table.shape)}, {table.dtype} is not a table of floats (rows, width)"
        )
    if not table.isfinite().all():
        raise UserError(f"{path}: the table has NaN or infinite entries; compute it again")
    return table.detach().to(torch.float32).contiguous()
