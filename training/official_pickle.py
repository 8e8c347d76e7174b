# SPDX-License-Identifier: MIT
"""The only unpickler of the project: it reads official files as data and executes nothing that they ask for.

Every global a pickle names is looked up in a fixed table of inert replacements; any other name is refused
before the file gets further. Tensors come back as CPU tensors, modules as `InertModule`.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_utils.errors import UserError


class InertModule:
    """What a pickled torch module held, without the module: `state` is its former `__dict__`."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Replacement:
    """A function that a pickle may call. A pickle cannot alter it: `BUILD` on it is refused."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the file tries to alter a function of the reader")


def load_official_pickle(path: str | Path) -> Any:
    """The object in `path`, modules as `InertModule` and tensors on the CPU.

    Raises UserError if the file is missing or damaged, or names a global that this reader does not know; that
    name is in the message, and nothing of it has been imported or run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _RestrictedUnpickler(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is not a pickle this program can read ({reason}); download it again"
        ) from error


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _REPLACEMENTS[module, name]
        except KeyError:
            raise UserError(
                f"refused the global {module}.{name}: only known parts of official files are read, no code; "
                "use the official file, or convert it to .safetensors"
            ) from None


def _load_storage(data: bytes) -> Tensor:
    """One-dimensional tensor over the whole of a pickled storage; torch's own restricted reader parses it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
        try:
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's message advises to load the file unsafely
            raise pickle.UnpicklingError("a storage in it holds more than numbers") from error
        return torch.empty(0, dtype=storage.dtype).set_(storage)


def _rebuild_tensor(
    flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_unused: Any
) -> Tensor:
    """The tensor of that shape in `flat`; one that would leave the storage is an error in `as_strided`."""
    if math.prod(size) > flat.numel():
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} from {flat.numel()} stored numbers")
    return torch.as_strided(flat, size, stride, offset).clone()


def _rebuild_parameter(data: Tensor, *_unused: Any) -> Tensor:
    return data


_REPLACEMENTS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_parameter"): _Replacement(_rebuild_parameter),
    ("torch._utils", "_rebuild_tensor_v2"): _Replacement(_rebuild_tensor),
    ("torch.storage", "_load_from_bytes"): _Replacement(_load_storage),
    ("torch.nn.modules.sparse", "Embedding"): InertModule,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,  # a module's empty set of non-persistent buffers, in pickles of protocol 3
}
