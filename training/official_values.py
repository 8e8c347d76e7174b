# SPDX-License-Identifier: MIT
"""Tensors, arrays, numbers and containers of official pickles, rebuilt from checked bytes by code of ours.

A tensor is a view of the file. A storage inside a pickle is a file of its own, in torch's format from before zip
files; it is read here by hand, because its pickles must be as harmless as the one around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.official_globals import STORAGE_DTYPES, InertGlobal, InertModule, refusal
from training.pickle_machine import Budget, DamagedPickleError, PickleMachine

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_STORAGE_OPERATIONS = 200  # at most, in one of the five pickles of a storage; torch writes 40
_NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def numpy_array(value: Any) -> np.ndarray | None:
    """The array that a stand-in holds, a view of the file; None if it is not an array of plain numbers.

    Raises DamagedPickleError if its shape does not fit its bytes.
    """
    if not isinstance(value, InertModule) or value.name != "numpy.ndarray":
        return None
    if not isinstance(value.state, tuple) or len(value.state) != 5:
        return None
    _version, shape, dtype, is_fortran, data = value.state
    array_dtype = _numpy_dtype(dtype)
    if array_dtype is None or not isinstance(data, memoryview) or not _is_shape(shape):
        return None
    if math.prod(shape) * array_dtype.itemsize != len(data):
        raise DamagedPickleError(f"an array of {math.prod(shape)} numbers in {len(data)} bytes")
    return np.frombuffer(data, array_dtype).reshape(shape, order="F" if is_fortran else "C")


class _StorageHooks:
    """The pickles inside a storage name a type, refer to the numbers behind them, and do nothing else."""

    def find_global(self, module: str, name: str) -> InertGlobal:
        if (module == "torch" and name in STORAGE_DTYPES) or (module, name) == ("collections", "OrderedDict"):
            return InertGlobal(name)
        raise refusal(module, name)

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        raise DamagedPickleError("a storage holds more than numbers")

    def build(self, target: Any, state: Any) -> None:
        raise DamagedPickleError("a storage holds more than numbers")

    def persistent(self, key: Any) -> Any:
        return key


def load_storage(data: Any) -> Tensor:
    """One-dimensional tensor over a storage: five pickles, a count of numbers, and the numbers."""
    if not isinstance(data, memoryview):
        raise DamagedPickleError("a storage that is not bytes")
    position, values = 0, []
    for _ in range(5):  # magic number, version, system, description, keys of all storages
        machine = PickleMachine(data, _StorageHooks(), Budget(_STORAGE_OPERATIONS, 4096), position)
        values.append(machine.load())
        position = machine.position
    magic, version, system, description, keys = values
    if (magic, version) != (_MAGIC, _VERSION) or not isinstance(system, dict):
        raise DamagedPickleError("a storage in an unknown format")
    if system.get("little_endian") is not True:
        raise DamagedPickleError("a storage of a big-endian machine")
    if not isinstance(description, tuple) or len(description) not in (5, 6) or not isinstance(keys, list):
        raise DamagedPickleError("a storage without a description")
    kind, storage_type, key, _location, count = description[:5]
    if kind != "storage" or not isinstance(storage_type, InertGlobal) or keys != [key]:
        raise DamagedPickleError("a storage holds more than numbers")
    dtype = STORAGE_DTYPES.get(storage_type.name)
    numbers = data[position + 8 :]
    stored = int.from_bytes(data[position : position + 8], "little")
    if dtype is None or stored != count or len(numbers) != count * dtype.itemsize:
        raise DamagedPickleError(f"a storage of {len(numbers)} bytes does not hold its {stored} numbers")
    return torch.frombuffer(numbers, dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _rebuild_tensor(flat: Any, offset: Any, size: Any, stride: Any, *_unused: Any) -> Tensor:
    """The tensor of that shape in `flat`, as a view."""
    if not isinstance(flat, Tensor) or not _is_shape(size) or not _is_shape((*stride, offset)):
        raise DamagedPickleError("a tensor without a storage or a shape")
    if math.prod(size) > flat.numel():
        raise DamagedPickleError(f"a tensor of shape {tuple(size)} from {flat.numel()} stored numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= flat.numel():
        raise DamagedPickleError(
            f"a tensor of strides {tuple(stride)} leaves its storage of {flat.numel()} numbers"
        )
    return torch.as_strided(flat, size, stride, offset)


def _rebuild_parameter(data: Any, *_unused: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise DamagedPickleError("a parameter without a tensor")
    return data


def _rebuild_with_attributes(function: Any, _type: Any, arguments: Any, _state: Any) -> Tensor:
    """A tensor to which somebody gave attributes."""
    if not isinstance(function, InertGlobal) or function.rebuild is not _rebuild_tensor:
        raise DamagedPickleError("a tensor of an unknown kind")
    return _rebuild_tensor(*arguments)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 32 and all(type(n) is int and n >= 0 for n in value)


def _rebuild_network(meta: Any) -> InertModule:
    """A network of `torch_utils.persistence`: its attributes are kept, the source text beside them is not."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise DamagedPickleError("a network without a name")
    return InertModule(meta["class_name"][:80], state=meta.get("state"))


def _numpy_dtype(value: Any) -> np.dtype | None:
    """The data type that a stand-in holds; None unless it is one of plain numbers."""
    if not isinstance(value, InertModule) or value.name != "numpy.dtype" or not value.arguments:
        return None
    code, state = value.arguments[0], value.state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
    if code not in _NUMPY_CODES or order not in ("<", ">", "|", "="):
        return None
    return np.dtype(("<" if order in "=|" else order) + code)


def _rebuild_number(dtype: Any, data: Any) -> int | float | bool | InertModule:
    """A NumPy scalar, as a Python number."""
    number_dtype = _numpy_dtype(dtype)
    if number_dtype is None or not isinstance(data, memoryview) or len(data) != number_dtype.itemsize:
        return InertModule("numpy.scalar")
    return np.frombuffer(data, number_dtype)[0].item()


def _start_array(*_unused: Any) -> InertModule:
    return InertModule("numpy.ndarray")  # its state follows


def _rebuild_array(_function: Any, _arguments: Any, state: Any, *_unused: Any) -> InertModule:
    return InertModule("numpy.ndarray", state=state)


def _rebuild_dict(*_unused: Any) -> dict[Any, Any]:
    return {}  # its items follow


def _rebuild_set(items: Any = None) -> list[Any]:
    return items if isinstance(items, list) else []


REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_attributes,
    ("torch.storage", "_load_from_bytes"): load_storage,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _rebuild_network,
    ("numpy.core.multiarray", "_reconstruct"): _start_array,
    ("numpy._core.multiarray", "_reconstruct"): _start_array,
    ("numpy.core.multiarray", "scalar"): _rebuild_number,
    ("numpy._core.multiarray", "scalar"): _rebuild_number,
    ("dill._dill", "_create_array"): _rebuild_array,
    ("collections", "OrderedDict"): _rebuild_dict,
    ("dnnlib.util", "EasyDict"): _rebuild_dict,
    ("builtins", "dict"): _rebuild_dict,
    ("builtins", "set"): _rebuild_set,  # of a module's buffers that are not saved, in pickles of protocol 3
    ("builtins", "frozenset"): _rebuild_set,
}
