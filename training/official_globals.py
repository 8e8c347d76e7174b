# SPDX-License-Identifier: MIT
"""Names that official files may contain, and what stands for them: objects that hold data and do nothing.

A name that is not listed here is refused. Nothing is ever imported by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_utils.errors import UserError

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

# Everything in these modules and below them: what discriminators with their feature networks are made of.
_MODULES = """
    collections copyreg dill dnnlib easydict feature_networks functools numpy pathlib pg_modules timm torch._C
    torch._tensor torch._utils torch.functional torch.nn torch.storage torch.utils.hooks torch_utils training types
    """
# Of these modules, only these names.
_NAMES = {
    "builtins": """
        __dict__ bool bytearray bytes classmethod complex dict float frozenset getattr int list object property range
        set setattr slice staticmethod str super tuple type
        """,
    "torch": """
        Size Tensor bfloat16 bool device dtype float16 float32 float64 int16 int32 int64 int8 memory_format uint8
        """,
}
_KNOWN_MODULES = tuple(_MODULES.split())
_KNOWN_NAMES = {module: frozenset(names.split()) for module, names in _NAMES.items()}


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


def is_known(module: str, name: str) -> bool:
    """Whether an official file may contain `module.name`."""
    if module in _KNOWN_NAMES:
        return name in _KNOWN_NAMES[module] or (module == "torch" and name in STORAGE_DTYPES)
    if "." in name:  # a dotted name reaches through a class to what that has imported
        return False
    return any(module == known or module.startswith(f"{known}.") for known in _KNOWN_MODULES)


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
