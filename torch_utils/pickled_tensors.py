# SPDX-License-Identifier: MIT
"""Tensors inside pickles, rebuilt from checked bytes by code of ours, and what stands for everything else.

A tensor is a view of the file. A storage inside a pickle is a file of its own, in torch's format from before zip
files; it is read here by hand, because its pickles must be as harmless as the one around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_utils.errors import UserError
from torch_utils.pickle_machine import Budget, DamagedPickleError, PickleMachine

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_STORAGE_OPERATIONS = 200  # at most, in one of the five pickles of a storage; torch writes 40

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class InertModule:
    """What a pickled object held, without the object: `state` is its former `__dict__`, `name` its class.

    A call that is not made gives one as well. Classes are named in full, those of `torch_utils.persistence`
    (the networks) by their bare name.
    """

    name: str = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, name: str, arguments: tuple[Any, ...] = (), state: Any = None) -> None:
        self.name = name
        self.arguments = arguments
        if state is not None:
            self.state = state


class InertGlobal:
    """A function or class that a pickle names. `rebuild` makes its objects; None = they are stand-ins."""

    __slots__ = ("name", "rebuild")

    def __init__(self, name: str, rebuild: Callable[..., Any] | None = None) -> None:
        self.name = name
        self.rebuild = rebuild


def refusal(module: str, name: str) -> UserError:
    """The error for a name that no official file contains."""
    return UserError(
        f"refused the global {printable(f'{module}.{name}')}: only known parts of official files are read, no "
        "code; use the official file, or convert it to .safetensors"
    )


def printable(text: str, max_length: int = 120) -> str:
    """One line of `text` from a file, for a message."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * max_length]).split())
    return line if len(line) <= max_length else f"{line[: max_length - 3]}..."


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


def rebuild_tensor(flat: Any, offset: Any, size: Any, stride: Any, *_unused: Any) -> Tensor:
    """The tensor of that shape in `flat`, as a view. Raises DamagedPickleError if it does not lie within."""
    if not isinstance(flat, Tensor) or not is_shape(size) or not is_shape((*stride, offset)):
        raise DamagedPickleError("a tensor without a storage or a shape")
    if math.prod(size) > flat.numel():
        raise DamagedPickleError(f"a tensor of shape {tuple(size)} from {flat.numel()} stored numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= flat.numel():
        raise DamagedPickleError(
            f"a tensor of strides {tuple(stride)} leaves its storage of {flat.numel()} numbers"
        )
    return torch.as_strided(flat, size, stride, offset)


def rebuild_parameter(data: Any, *_unused: Any) -> Tensor:
    """A parameter, as a plain tensor."""
    if not isinstance(data, Tensor):
        raise DamagedPickleError("a parameter without a tensor")
    return data


def rebuild_with_attributes(function: Any, _type: Any, arguments: Any, _state: Any) -> Tensor:
    """A tensor to which somebody gave attributes."""
    if not isinstance(function, InertGlobal) or function.rebuild is not rebuild_tensor:
        raise DamagedPickleError("a tensor of an unknown kind")
    return rebuild_tensor(*arguments)


def is_shape(value: Any) -> bool:
    """Whether `value` is a tuple of at most 32 sizes."""
    return isinstance(value, tuple) and len(value) <= 32 and all(type(n) is int and n >= 0 for n in value)
