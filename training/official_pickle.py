# SPDX-License-Identifier: MIT
"""The only unpickler of the project: it reads official files as data and executes nothing that they ask for.

Every global that a pickle names is one of three things: a part of tensors and plain containers, which
`official_values` rebuilds; a name that official networks contain, which becomes an `InertModule` whatever the file
does with it; or refused, before the file gets further.

What a file can make this program allocate: tensors and arrays are views of the file, which is mapped into memory, and
take its size at most. All other objects together take less than MAX_OBJECT_BYTES.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from torch_utils.errors import UserError
from torch_utils.pickle_machine import Budget, DamagedPickleError, PickleMachine
from training.official_globals import InertGlobal, InertModule, is_known, printable, refusal
from training.official_values import REBUILDERS

__all__ = ["MAX_OBJECT_BYTES", "InertModule", "load_official_pickle"]

MAX_OPERATIONS = 2_000_000  # a full StyleGAN-XL snapshot has less than a fifth of these
MAX_TEXT_BYTES = 32 << 20
MAX_OBJECT_BYTES = 300 * MAX_OPERATIONS + 4 * MAX_TEXT_BYTES  # see Budget; 0.7 GB


def load_official_pickle(path: str | Path) -> Any:
    """The object in `path`: modules as `InertModule`, tensors on the CPU. Copy a tensor before you change it.

    Raises UserError if the file is missing or damaged, contains more than a network does, or names a global that
    no official file does; that name is in the message, and nothing of it has been imported or run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:  # a private mapping: nothing that happens in memory reaches the file
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        return PickleMachine(data, _SnapshotHooks(), Budget(MAX_OPERATIONS, MAX_TEXT_BYTES)).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        reason = printable(str(error)) or type(error).__name__
        raise UserError(
            f"{path} is not a pickle this program can read ({reason}); download it again"
        ) from error


class _SnapshotHooks:
    """What the globals, calls and states of a snapshot become."""

    def __init__(self) -> None:
        self._globals: dict[tuple[str, str], InertGlobal] = {}

    def find_global(self, module: str, name: str) -> InertGlobal:
        key = ("builtins" if module == "__builtin__" else module, name)
        if key not in self._globals:
            rebuild = REBUILDERS.get(key)
            if rebuild is None and not is_known(*key):
                raise refusal(*key)
            self._globals[key] = InertGlobal(f"{key[0]}.{name}", rebuild)
        return self._globals[key]

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if isinstance(function, InertModule):  # what a call that was not made would have returned
            return InertModule("result", arguments)
        if not isinstance(function, InertGlobal):
            raise DamagedPickleError(f"it calls a {type(function).__name__}")
        if function.rebuild is None:
            return InertModule(function.name, arguments)
        try:
            return function.rebuild(*arguments)
        except UserError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise DamagedPickleError(f"{function.name}: {error}") from error

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, InertModule):
            target.state = state
        elif isinstance(target, InertGlobal):
            raise DamagedPickleError("the file tries to alter a function of the reader")
        elif not isinstance(target, dict):  # a dict's attributes are of no interest
            raise DamagedPickleError(f"the file tries to alter a {type(target).__name__}")

    def persistent(self, key: Any) -> Any:
        raise DamagedPickleError("it refers to objects outside the file")
