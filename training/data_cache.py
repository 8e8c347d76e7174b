# SPDX-License-Identifier: MIT
"""--cache-data: a data set copied to a local folder of each machine before training reads it again and again.

The processes of a machine make one copy together. It appears under its name only when it is complete and verified, so
that a copy that was broken off is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from tqdm import tqdm

from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError
from training.dataset import BUILT_IN
from training.dataset_labels import LABEL_FILE
from training.image_source import has_image_suffix
from training.watchdog import activity

CHUNK_BYTES = 8 << 20
SPARE_BYTES = 256 << 20  # stay free on the local disk
MEMBER_BYTES = 256  # of a zip's directory and headers, per file; twice the name comes on top
RECORD = "complete.json"  # says that the copy beside it is whole; written last


@dataclass(frozen=True)
class Original:
    """What is to be copied: one file, or the files of a folder that a data set reads."""

    path: Path
    files: list[Path]  # sorted by name
    num_bytes: int  # of all files
    key: str  # 16 hex digits of path, names, sizes and times: another key, another copy

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def copy_name(self) -> str:
        """File name of the copy: a folder becomes a zip. Runs and messages call the set by what is before .zip."""
        return f"{self.path.name}.zip" if self.is_folder else self.path.name

    @property
    def copy_bytes(self) -> int:
        """At most so many bytes for the copy."""
        if not self.is_folder:
            return self.num_bytes
        return self.num_bytes + sum(MEMBER_BYTES + 2 * len(os.fsencode(file)) for file in self.files)


def local_path(path: str, flags: dict[str, Any]) -> str:
    """Where to read the data set at `path`: a copy in the folder of --cache-data, if a run is to have one."""
    is_copied = flags["cache_data"] is not None and not flags["dry_run"]
    if not is_copied:
        return path
    with activity("copying the data set"):  # the other processes of the machine wait
        return os.fspath(stage_data(path, flags["cache_data"]))


def stage_data(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str]) -> Path | str:
    """Path of a verified copy of a data set in `cache_dir`, made unless it is there; other names stay as they are.

    A zip is copied as it is, a folder becomes an uncompressed zip: its content hash stays the same. Raises UserError
    when the copy does not fit, cannot be written, or differs from the original.
    """
    name = os.fspath(path)
    if name in BUILT_IN or not (
        os.path.isdir(name) or (os.path.isfile(name) and name.lower().endswith(".zip"))
    ):
        return name  # in memory already; or nothing that can be opened, which `open_dataset` says
    try:
        original = survey(Path(name).resolve())
        folder = Path(cache_dir) / original.key
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of the processes of a machine, one copies and the others wait
            if not is_complete(folder, original):
                check_space(folder, original)
                copy_verified(original, folder)
    except OSError as error:
        where = error.filename or cache_dir
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"--cache-data {cache_dir}: {name} cannot be copied ({where}: {reason}); use another local folder, or "
            "leave --cache-data out"
        ) from error
    return folder / original.copy_name


def survey(path: Path) -> Original:
    """What there is to copy. Raises UserError when there is nothing."""
    if not path.is_dir():
        status = path.stat()
        facts = [(str(path), status.st_size, status.st_mtime_ns)]
        return Original(path, [path], status.st_size, hash_facts(facts))
    files = sorted(
        Path(folder, file)
        for folder, _, names in os.walk(path)
        for file in names
        if has_image_suffix(Path(folder, file).relative_to(path).as_posix())
    )
    if not files:
        raise UserError(f"{path}: no image files found; expected PNG or JPEG files, in any subfolder")
    if (path / LABEL_FILE).is_file():
        files.append(path / LABEL_FILE)
    facts = [(str(path), 0, 0)]
    for file in files:
        status = file.stat()
        facts.append((str(file), status.st_size, status.st_mtime_ns))
    return Original(path, files, sum(size for _, size, _ in facts), hash_facts(facts))


def hash_facts(facts: list[tuple[str, int, int]]) -> str:
    """16 hex digits for names, sizes and times."""
    return hashlib.sha256(repr(facts).encode(errors="surrogateescape")).hexdigest()[:16]


def is_complete(folder: Path, original: Original) -> bool:
    """Whether the copy there was verified when it was made, and has not changed since."""
    copy = folder / original.copy_name
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        status = copy.stat()
        return (record["bytes"], record["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_space(folder: Path, original: Original) -> None:
    """Raise UserError unless the copy fits, with something to spare."""
    free = shutil.disk_usage(folder).free
    if free < original.copy_bytes + SPARE_BYTES:
        raise UserError(
            f"--cache-data {folder.parent}: {original.path} needs {original.copy_bytes / 2**30:.2f} GiB and "
            f"{SPARE_BYTES / 2**30:.2f} to spare, but only {free / 2**30:.2f} GiB are free there; delete old copies in "
            "it, use another local folder, or leave --cache-data out"
        )


def copy_verified(original: Original, folder: Path) -> None:
    """Copy, read the copy back, and record that it is whole. Raises UserError if it differs from the original."""
    (folder / RECORD).unlink(missing_ok=True)
    for unfinished in folder.glob(".*.tmp"):  # of a process that was killed while it copied
        unfinished.unlink()
    target = folder / original.copy_name
    with atomic_write(target) as temporary:
        write = write_zip if original.is_folder else write_file
        with show_progress(original, "Copying") as advance:
            written = write(original, temporary, advance)
        with show_progress(original, "Verifying") as advance:
            found = (hash_members if original.is_folder else hash_file)(temporary, advance)
        if found != written:
            raise UserError(
                f"--cache-data: the copy of {original.path} in {folder} differs from what was written; that disk is "
                "faulty or full: use another local folder"
            )
        if survey(original.path).key != original.key:
            raise UserError(
                f"{original.path} changed while it was copied; start again when it is written completely"
            )
    status = target.stat()
    record = {
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": found,
        "of": str(original.path),
    }
    with atomic_write(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextmanager
def show_progress(original: Original, verb: str) -> Iterator[Callable[[int], object]]:
    """A progress bar in bytes; gives what advances it."""
    text = f"{verb} {original.copy_name}"
    with tqdm(total=original.num_bytes, desc=text, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update


def write_file(original: Original, target: Path, advance: Callable[[int], object]) -> str:
    """Copy one file; returns the SHA-256 of what was read."""
    digest = hashlib.sha256()
    with open(original.path, "rb") as source, open(target, "wb") as copy:
        for chunk in read_chunks(source):
            digest.update(chunk)
            copy.write(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def hash_file(path: Path, advance: Callable[[int], object]) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        for chunk in read_chunks(source):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def write_zip(original: Original, target: Path, advance: Callable[[int], object]) -> str:
    """Put a folder's files into an uncompressed zip; returns the SHA-256 of names and contents as they were read."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for file in original.files:
            member = zipfile.ZipInfo(file.relative_to(original.path).as_posix())
            member.file_size = file.stat().st_size  # so that it knows whether it needs the 64-bit form
            digest.update(member.filename.encode(errors="surrogateescape"))
            with open(file, "rb") as source, archive.open(member, "w") as copy:
                for chunk in read_chunks(source):
                    digest.update(chunk)
                    copy.write(chunk)
                    advance(len(chunk))
    return digest.hexdigest()


def hash_members(path: Path, advance: Callable[[int], object]) -> str:
    """SHA-256 of names and contents of a zip's members, in order; "damaged" for what is no such zip."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                digest.update(member.filename.encode(errors="surrogateescape"))
                with archive.open(member) as source:
                    for chunk in read_chunks(source):
                        digest.update(chunk)
                        advance(len(chunk))
    except zipfile.BadZipFile:
        return "damaged"
    return digest.hexdigest()


def read_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """The rest of a stream, in parts."""
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk
