# SPDX-License-Identifier: MIT
"""Files that are either the old one or the whole new one, never a part of it.

A run that is killed while it writes, or two runs that write the same cache entry, must not leave a file that
looks complete. Everything this project keeps (networks, states, statistics) goes through `atomic_write`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces `path` at the end, or goes on an exception.

    The folder is created when missing. The contents reach the disk (fsync) before the rename, so that a power
    cut leaves the old file or the new one. The caller may write the temporary file in any way.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _apply_default_mode(temporary)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:  # a KeyboardInterrupt must not leave the temporary file either
        temporary.unlink(missing_ok=True)
        raise


def _apply_default_mode(path: Path) -> None:
    # mkstemp makes files that only the owner can read; give them the mode that open() would have given.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
