# SPDX-License-Identifier: MIT
"""Files that are either the old one or the whole new one, never a part of it.

A run that is killed while it writes, or two runs that write the same cache entry, must not leave a file that
looks complete. Everything this project keeps (networks, states, statistics) goes through `atomic_write`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".tmp"  # of temporary files, whose names start with a dot


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces `path` at the end, or goes on an exception.

    The folder is created when missing. The contents reach the disk (fsync) before the rename, and the rename before
    the end, so that a power cut leaves the old file or the new one. The caller may write the temporary file in any way.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _apply_default_mode(temporary)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException:  # a KeyboardInterrupt must not leave the temporary file either
        temporary.unlink(missing_ok=True)
        raise


def atomic_copy(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Put the contents of `source` at `path` as well, as `atomic_write` does.

    Where the file system allows it the two share the space on the disk: a later `atomic_write` of either leaves the
    other as it is.
    """
    with atomic_write(path) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:  # across file systems, or without hard links
            shutil.copyfile(source, temporary)


def remove_temporary_files(folder: Path) -> None:
    """Remove what processes that were killed in `atomic_write` have left in a folder that nobody else writes to."""
    for path in folder.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # it costs space only
            path.unlink()


def _apply_default_mode(path: Path) -> None:
    # mkstemp makes files that only the owner can read; give them the mode that open() would have given.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    # The contents are safe already; where folders cannot be opened or flushed there is nothing more to be done.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
