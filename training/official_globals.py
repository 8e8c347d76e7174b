# SPDX-License-Identifier: MIT
"""Names that official files may contain, and what stands for them: objects that hold data and do nothing.

A name that is not listed here is refused. Nothing is ever imported by name.
"""

from __future__ import annotations

from torch_utils.pickled_tensors import STORAGE_DTYPES, InertGlobal, InertModule, printable, refusal

__all__ = ["InertGlobal", "InertModule", "is_known", "printable", "refusal"]

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


def is_known(module: str, name: str) -> bool:
    """Whether an official file may contain `module.name`."""
    if module in _KNOWN_NAMES:
        return name in _KNOWN_NAMES[module] or (module == "torch" and name in STORAGE_DTYPES)
    if "." in name:  # a dotted name reaches through a class to what that has imported
        return False
    return any(module == known or module.startswith(f"{known}.") for known in _KNOWN_MODULES)
