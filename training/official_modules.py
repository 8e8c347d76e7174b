# SPDX-License-Identifier: MIT
"""Reading the stand-ins of official modules: attributes with a checked type, submodules, and state dicts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from training.network_file import NetworkFileError
from training.official_globals import InertModule, printable

MAX_MODULES = 20_000  # below one module; a full discriminator has about 1,000
MAX_MEMBERS = 500  # parameters, buffers or submodules of one module
_MISSING = object()


class OfficialModule:
    """One module of an official file. All errors are NetworkFileError and say where in the file they are."""

    def __init__(self, node: Any, where: str) -> None:
        """node: what the unpickler gave. where: the module's name, such as G_ema.mapping."""
        self.where = where
        if not isinstance(node, InertModule) or not isinstance(node.state, dict):
            raise NetworkFileError(f"{where} is not a network; use the official file")
        self.class_name = node.name.rpartition(".")[2]  # without the module it was defined in
        self.full_name = node.name
        self._state = node.state

    @property
    def module_names(self) -> list[str]:
        """Names of the direct submodules, in order."""
        return [name for name, node in self._table("_modules").items() if isinstance(node, InertModule)]

    def module(self, name: str) -> OfficialModule:
        """The direct submodule of that name."""
        return OfficialModule(self._table("_modules").get(name), f"{self.where}.{name}")

    def attribute(self, name: str, default: Any = _MISSING) -> Any:
        """A plain attribute, or the argument of that name that the module was built with."""
        arguments = self._state.get("_init_kwargs")
        value = self._state.get(name, _MISSING)
        if value is _MISSING and isinstance(arguments, dict):
            value = arguments.get(name, _MISSING)
        return self._given(name, value, default)

    def argument(self, name: str, default: Any = _MISSING) -> Any:
        """The argument of that name that the module was built with; attributes may have changed since."""
        arguments = self._state.get("_init_kwargs")
        return self._given(
            name, arguments.get(name, _MISSING) if isinstance(arguments, dict) else _MISSING, default
        )

    def _given(self, name: str, value: Any, default: Any) -> Any:
        value = default if value is _MISSING else value
        if value is _MISSING:
            raise NetworkFileError(f"{self.where} has no attribute {name!r}; use the official file")
        return value

    def integer(self, name: str, default: Any = _MISSING) -> int:
        """A whole number of at most 2^20 in size; floats without a fraction count."""
        return self._whole(name, self.attribute(name, default))

    def integer_argument(self, name: str, default: Any = _MISSING) -> int:
        """Like `integer`, of an argument."""
        return self._whole(name, self.argument(name, default))

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A finite number."""
        return self._number(name, self.attribute(name, default))

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        """True or False."""
        return bool(self.integer(name, default))

    def text_list(self, name: str) -> list[str]:
        """A list of texts."""
        value = self.attribute(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise NetworkFileError(f"{self.where}.{name} is not a list of names; use the official file")
        return value

    def _number(self, name: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or abs(value) > 2**63 or not math.isfinite(value):
            raise NetworkFileError(f"{self.where}.{name} is not a finite number; use the official file")
        return value

    def _whole(self, name: str, value: Any) -> int:
        number = self._number(name, value)
        if number != int(number) or abs(number) > 2**20:
            raise NetworkFileError(
                f"{self.where}.{name} is {number}, not a whole number; use the official file"
            )
        return int(number)

    def tensors(self) -> dict[str, Tensor]:
        """State dict: views of the file, by dotted name. Buffers that are None are left out."""
        tensors: dict[str, Tensor] = {}
        for prefix, module in self.walk():
            for table in ("_parameters", "_buffers"):
                for name, value in module._table(table).items():
                    if isinstance(value, Tensor) and isinstance(name, str):
                        tensors[f"{prefix}{name}"] = value
        return tensors

    def walk(self) -> Iterator[tuple[str, OfficialModule]]:
        """(dotted prefix, module) of this module and all below it. One that contains itself is an error."""
        todo: list[tuple[str, OfficialModule]] = [("", self)]
        num_modules = 0
        while todo:
            num_modules += 1
            prefix, module = todo.pop()
            if num_modules > MAX_MODULES or len(prefix) > 1000:
                raise NetworkFileError(f"{self.where} has more modules than a network; use the official file")
            yield prefix, module
            todo += [(f"{prefix}{name}.", module.module(name)) for name in reversed(module.module_names)]

    def _table(self, name: str) -> dict[Any, Any]:
        value = self._state.get(name)
        if not isinstance(value, dict) or len(value) > MAX_MEMBERS:
            raise NetworkFileError(f"{self.where} has no usable {name}; use the official file")
        return {key: item for key, item in value.items() if isinstance(key, str)}


class StateCopier:
    """Turns views of the file into tensors, until they would take more than `max_bytes` as they are stored.

    Only repeated views of one storage can reach that limit when it is the size of the file.
    """

    def __init__(self, max_bytes: int) -> None:
        self._bytes_left = max_bytes

    def copy(self, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        """Contiguous copies, floats as float32. Raises NetworkFileError beyond the limit."""
        self._bytes_left -= sum(x.numel() * x.element_size() for x in tensors.values())
        if self._bytes_left < 0:
            raise NetworkFileError(f"{where} claims more numbers than the file has; use the official file")
        return {
            name: x.to(torch.float32 if x.is_floating_point() else x.dtype, copy=True).contiguous()
            for name, x in tensors.items()
        }


def plain(value: Any, max_items: int = 100) -> Any:
    """What JSON can hold of a value: numbers, short texts, one-number tensors, dicts and lists of these; else None."""
    if isinstance(value, Tensor):
        return plain(value.item()) if value.numel() == 1 else None
    if isinstance(value, (int, float)):  # bool too
        return value if math.isfinite(value) and abs(value) < 2**63 else None
    if isinstance(value, str):
        return printable(value, 500)
    if isinstance(value, dict):
        items = list(value.items())[:max_items]
        return {printable(k): plain(v, 0) for k, v in items if isinstance(k, str)}
    if isinstance(value, (list, tuple)):
        return [plain(item, 0) for item in value[:max_items]]
    return None
