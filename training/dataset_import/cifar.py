# SPDX-License-Identifier: MIT
"""CIFAR10 and CIFAR100 from their tars of pickles.

The pickles are read as data: every global in them is looked up in a table of inert stand-ins, others are refused.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from torch_utils.errors import UserError
from training.dataset_import.image_list import ArrayImages
from training.dataset_import.labels import SourceLabels

MAX_MEMBER_BYTES = 512 * 2**20  # the largest real one, CIFAR100's train, has 155 MB
CIFAR_SIDE = 32  # pixels


def open_cifar(path: str) -> ArrayImages:
    """Training images of `cifar-10-python.tar.gz` (batches 1 to 5) or `cifar-100-python.tar.gz` (fine labels)."""
    members = _read_tar(path)
    batch_names = [f"data_batch_{number}" for number in range(1, 6)]
    if all(name in members for name in batch_names):
        label_key, meta_name, names_key = "labels", "batches.meta", "label_names"
    elif "train" in members and "meta" in members:
        batch_names, label_key, meta_name, names_key = ["train"], "fine_labels", "meta", "fine_label_names"
    else:
        raise UserError(
            f"--source {path}: holds neither CIFAR10's data_batch_1 ... 5 nor CIFAR100's train and meta; "
            "unpack it and give the folder"
        )
    try:
        batches = [load_restricted_pickle(members[name]) for name in batch_names]
        pixels = np.concatenate([batch["data"].to_bytes_array() for batch in batches])
        labels = [int(label) for batch in batches for label in batch[label_key]]
        images = pixels.reshape(len(labels), 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
        meta = load_restricted_pickle(members[meta_name]) if meta_name in members else {}
        class_names = tuple(str(name) for name in meta[names_key]) if names_key in meta else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--source {path}: its contents are not those of CIFAR ({error}); download it again"
        ) from error
    return ArrayImages(path, np.ascontiguousarray(images), SourceLabels(labels, class_names))


def _read_tar(path: str) -> dict[str, bytes]:
    """File name without folders -> content."""
    contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise UserError(
                        f"--source {path}: {member.name} has {member.size:,} bytes: not a CIFAR tar"
                    )
                file = archive.extractfile(member)
                if file is not None:
                    contents[Path(member.name).name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"--source {path}: not a complete tar file ({error}); download it again") from error
    return contents


class _PickledArray:
    """Stands in for numpy's array: keeps what the pickle says, and builds nothing until it is asked."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_bytes_array(self) -> np.ndarray:
        """The array, uint8. Raises ValueError or TypeError if it is none."""
        _, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, _PickledType) or dtype.name != "u1" or is_fortran:
            raise ValueError("an array of something else than bytes")
        content = data.encode("latin1") if isinstance(data, str) else data  # str: written by Python 2
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)


class _PickledType:
    """Stands in for numpy's dtype."""

    def __init__(self, name: str, *_unused: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields, which a single byte does not have."""


def _make_pickled_array(*_unused: Any) -> _PickledArray:
    return _PickledArray()


_REPLACEMENTS = {
    ("numpy.core.multiarray", "_reconstruct"): _make_pickled_array,
    ("numpy._core.multiarray", "_reconstruct"): _make_pickled_array,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledType,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _REPLACEMENTS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused the global {module}.{name}: not part of CIFAR") from None


def load_restricted_pickle(content: bytes) -> dict[str, Any]:
    """The table in a CIFAR pickle: plain values and `_PickledArray`. Raises ValueError otherwise; runs nothing."""
    try:
        values = _RestrictedUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged or hostile pickle can raise almost anything
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if not isinstance(values, dict):
        raise ValueError("no table of values")
    return values
