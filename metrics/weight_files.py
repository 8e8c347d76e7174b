# SPDX-License-Identifier: MIT
"""Tensors by name from files of weights, whatever wrote them: nothing in a file is imported or executed.

torch.save's files (.pth), TorchScript's (.pt: a zip with a pickle, and code that is not looked at), pickles that hold
the bytes of such a zip, pickled modules (.pkl), and .safetensors.
"""

from __future__ import annotations

import io
import mmap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from torch_utils.errors import UserError
from torch_utils.pickle_machine import Budget, DamagedPickleError, PickleMachine
from torch_utils.pickled_tensors import (
    STORAGE_DTYPES,
    InertGlobal,
    InertModule,
    load_storage,
    printable,
    rebuild_parameter,
    rebuild_tensor,
    rebuild_with_attributes,
)

_MAX_OPERATIONS = 1_000_000  # see Budget; a detector's pickle has fewer than 100,000
_MAX_TEXT_BYTES = 16 << 20
_END_OF_ZIP = b"PK\x05\x06"  # starts the last record of a zip
_END_RECORD_BYTES = 22
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save's files before they were zips
_MODULE_DICTS = ("_parameters", "_buffers", "_modules")  # of a pickled nn.Module; no part of a tensor's name


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of `path` by dotted name, in the order of the file, on the CPU. Copy one before you change it.

    Raises UserError if the file is missing, damaged or holds no tensors.
    """
    path = Path(path)
    try:
        tensors = _read(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:  # a damaged file can raise almost anything
        reason = printable(str(error)) or type(error).__name__
        raise UserError(
            f"{path} holds no weights this program can read ({reason}); download it again"
        ) from error
    if not tensors:
        raise UserError(f"{path} holds no tensors; give the file of a network's weights")
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    with path.open("rb") as file:  # a private mapping: nothing that happens in memory reaches the file
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    archive = _find_archive(mapped)
    if archive is not None:
        return _read_archive(archive)
    if mapped[:2] == b"PK":
        raise DamagedPickleError("a zip without its end, or without a network")
    if mapped[: len(_LEGACY_START)] == _LEGACY_START:
        return _named_tensors(torch.load(path, map_location="cpu", weights_only=True))
    budget = Budget(_MAX_OPERATIONS, _MAX_TEXT_BYTES)
    return _named_tensors(PickleMachine(memoryview(mapped), _Hooks(_no_storage), budget).load())


# Zip files.


class _View(io.RawIOBase):
    """A part of a file as a file, for zipfile; mmap lacks what it asks for before Python 3.13."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        if start + offset < 0:
            raise OSError("a position before the start")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def _find_archive(mapped: mmap.mmap) -> zipfile.ZipFile | None:
    """The last zip in a file that holds a network's pickle, whatever stands before and after it."""
    end = mapped.rfind(_END_OF_ZIP)
    if end < 0:
        return None
    try:
        archive = zipfile.ZipFile(_View(memoryview(mapped)[: end + _END_RECORD_BYTES]))
    except zipfile.BadZipFile:  # four bytes among the numbers
        return None
    return archive if any(_is_pickle(name) for name in archive.namelist()) else None


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or (name.count("/") == 1 and name.endswith("/data.pkl"))


def _read_archive(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Tensors of a zip as TorchScript and torch.save write it: data.pkl, and a file for each storage."""
    pickles = [name for name in archive.namelist() if _is_pickle(name)]
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and _stored(archive, f"{folder}byteorder") != b"little":
        raise DamagedPickleError("written on a big-endian machine")
    storages: dict[str, Tensor] = {}

    def load(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in storages:
            numbers = _stored(archive, f"{folder}data/{key}")
            if len(numbers) != count * dtype.itemsize:
                raise DamagedPickleError(
                    f"a storage of {len(numbers)} bytes does not hold its {count} numbers"
                )
            storages[key] = torch.frombuffer(numbers, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        if storages[key].dtype != dtype:
            raise DamagedPickleError(f"storage {printable(key)} has two types")
        return storages[key]

    data = memoryview(_stored(archive, pickles[0]))
    machine = PickleMachine(data, _Hooks(load), Budget(_MAX_OPERATIONS, _MAX_TEXT_BYTES))
    return _named_tensors(machine.load())


def _stored(archive: zipfile.ZipFile, name: str) -> bytearray:
    """A file in the zip, its checksum checked. Compressed ones are refused: torch writes none, bombs are."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise DamagedPickleError(f"{printable(name)} is compressed")
    content = bytearray(info.file_size if info.file_size == info.compress_size else 0)
    with archive.open(info) as file:
        num_bytes = file.readinto(content)
    if num_bytes != info.file_size:
        raise DamagedPickleError(f"{printable(name)} ends early")
    return content


# Pickles.

LoadStorage = Callable[[torch.dtype, str, int], Tensor]  # type, key, count of numbers


def _no_storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
    raise DamagedPickleError("it refers to objects outside the file")


def _restore_network(meta: Any) -> InertModule:
    """A network of `torch_utils.persistence`: its attributes are kept, the source text beside them is not."""
    if not isinstance(meta, dict):
        raise DamagedPickleError("a network without a name")
    return InertModule(printable(str(meta.get("class_name"))), state=meta.get("state"))


def _start_dict(*_unused: Any) -> dict[Any, Any]:
    return {}  # its items follow


_REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): rebuild_with_attributes,
    ("torch.storage", "_load_from_bytes"): load_storage,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _restore_network,
    ("collections", "OrderedDict"): _start_dict,
}


class _Hooks:
    """Tensors and containers are rebuilt; whatever else a file names becomes a stand-in that does nothing."""

    def __init__(self, load: LoadStorage) -> None:
        self._load = load

    def find_global(self, module: str, name: str) -> InertGlobal:
        return InertGlobal(f"{module}.{name}", _REBUILDERS.get((module, name)))

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if not isinstance(function, InertGlobal) or function.rebuild is None:
            return InertModule(getattr(function, "name", "result"), arguments)
        try:
            return function.rebuild(*arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DamagedPickleError(f"{function.name}: {error}") from error

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, InertModule):
            target.state = state
        elif not isinstance(target, dict):  # a dict's attributes are of no interest
            raise DamagedPickleError(f"the file tries to alter a {type(target).__name__}")

    def persistent(self, key: Any) -> Tensor:
        """("storage", type, key, device, count of numbers)."""
        if not isinstance(key, tuple) or len(key) != 5 or not isinstance(key[1], InertGlobal):
            raise DamagedPickleError("it refers to objects outside the file")
        dtype = STORAGE_DTYPES.get(key[1].name.removeprefix("torch."))
        if key[0] != "storage" or dtype is None or type(key[2]) is not str or type(key[4]) is not int:
            raise DamagedPickleError("a storage of an unknown kind")
        return self._load(dtype, key[2], key[4])


def _named_tensors(value: Any) -> dict[str, Tensor]:
    """Tensors in nested modules and containers, by the names on the way to them; each container counts once."""
    return dict(_walk(value, "", set()))


def _walk(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    if not isinstance(value, (dict, list, tuple, InertModule)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, InertModule):
        yield from _walk(value.arguments, name, seen)
        yield from _walk(value.state, name, seen)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, name if key in _MODULE_DICTS else _joined(name, key), seen)
    else:
        for index, item in enumerate(value):
            yield from _walk(item, _joined(name, index), seen)


def _joined(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)
