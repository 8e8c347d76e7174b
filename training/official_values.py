# SPDX-License-Identifier: MIT
"""Arrays, numbers and containers of official pickles, rebuilt from checked bytes by code of ours.

`REBUILDERS` names everything that is rebuilt; tensors are rebuilt by `torch_utils/pickled_tensors.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from torch_utils.pickle_machine import DamagedPickleError
from torch_utils.pickled_tensors import (
    InertModule,
    is_shape,
    load_storage,
    rebuild_parameter,
    rebuild_tensor,
    rebuild_with_attributes,
)

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
    if array_dtype is None or not isinstance(data, memoryview) or not is_shape(shape):
        return None
    if math.prod(shape) * array_dtype.itemsize != len(data):
        raise DamagedPickleError(f"an array of {math.prod(shape)} numbers in {len(data)} bytes")
    return np.frombuffer(data, array_dtype).reshape(shape, order="F" if is_fortran else "C")


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
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): rebuild_with_attributes,
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
