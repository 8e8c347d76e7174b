# SPDX-License-Identifier: MIT
"""The destination of an import, a zip or a folder: it appears complete at the end, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError
from training.dataset_import.report import describe_size

WriteFile = Callable[[str, bytes], None]  # (name with forward slashes, content)
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # of all members, so that the same images make the same zip, byte for byte


def check_destination(dest: str, source: str, overwrite: bool) -> None:
    """Raise UserError if writing to `dest` would lose something or cannot work."""
    path = Path(dest)
    if is_zip(dest):
        if path.is_dir():
            raise UserError(f"--dest {dest} is a folder; give the name of a new zip")
        if path.exists() and not overwrite:
            raise UserError(f"--dest {dest} exists; choose another name, or add --overwrite to replace it")
    elif path.exists():
        if not path.is_dir():
            raise UserError(f"--dest {dest} is a file; give a new folder, or a name that ends in .zip")
        if any(path.iterdir()):
            raise UserError(
                f"--dest {dest} is not empty; give a new or empty folder, or a name that ends in .zip"
            )
    if os.path.realpath(dest) == os.path.realpath(source):
        raise UserError(f"--dest {dest} is the source; choose another name")
    is_inside = os.path.realpath(dest).startswith(os.path.realpath(source) + os.sep)
    if is_inside and not is_zip(dest):
        raise UserError(
            f"--dest {dest} is inside the source, so the next import would read it; write elsewhere"
        )


def check_free_space(dest: str, num_bytes: int) -> None:
    """Raise UserError if the disk of `dest` has fewer free bytes."""
    folder = Path(dest).absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"--dest {dest} needs up to {describe_size(num_bytes)}, but {folder} has {describe_size(free)} free; "
            "write elsewhere, or use --max-images"
        )


def is_zip(dest: str) -> bool:
    """True if a destination of this name is written as a zip."""
    return dest.lower().endswith(".zip")


@contextlib.contextmanager
def open_writer(dest: str) -> Iterator[WriteFile]:
    """A function that adds one file. `dest` is there after the block, but not if the block raises."""
    with _open_zip(dest) if is_zip(dest) else _open_folder(Path(dest).absolute()) as write:
        yield write


@contextlib.contextmanager
def _open_zip(dest: str) -> Iterator[WriteFile]:
    with atomic_write(dest) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, content: bytes) -> None:
            member = zipfile.ZipInfo(name, ZIP_DATE)
            member.external_attr = 0o644 << 16  # readable once unpacked
            archive.writestr(member, content)

        yield write


@contextlib.contextmanager
def _open_folder(dest: Path) -> Iterator[WriteFile]:
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent))

    def write(name: str, content: bytes) -> None:
        file = temporary / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)

    try:
        yield write
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's folders are for their owner only
        if dest.exists():
            dest.rmdir()  # empty, as check_destination saw
        os.replace(temporary, dest)
    except BaseException:  # a KeyboardInterrupt must not leave half a folder either
        shutil.rmtree(temporary, ignore_errors=True)
        raise
