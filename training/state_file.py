# SPDX-License-Identifier: MIT
"""Complete states on disk: `<run folder>/checkpoints/state-<images seen>.pt`, written so that they can be trusted.

A state is one file that `torch.load(weights_only=True)` reads. Its SHA-256 stands in the comment that ends every zip
archive, which a `.pt` file is, so that file and hash come and go together, whenever the process is killed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torch_utils.checkpoint import atomic_write
from torch_utils.errors import UserError

FOLDER = "checkpoints"  # of a run
FORMAT, VERSION = "stylesan-state", 1
# Format version -> what makes the next version of a state.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_LABEL = b"sha256:"
_COMMENT_BYTES = len(_LABEL) + 2 * hashlib.sha256().digest_size
_TRAILER_BYTES = 2 + _COMMENT_BYTES  # the zip's last field: length of the comment, then the comment
_CHUNK_BYTES = 1 << 22


class StateFileError(UserError):
    """A state that is missing, damaged or of another format; the message names the file and the fix."""


def state_path(folder: Path, nimg: int) -> Path:
    """Where the state after `nimg` images goes, in a folder of states."""
    return folder / f"state-{nimg:09d}.pt"


def list_states(folder: Path) -> dict[int, Path]:
    """States in a folder, whole or not, by images seen, newest first."""
    found = {}
    for path in folder.glob("state-*.pt"):
        if match := re.fullmatch(r"state-(\d+)\.pt", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state, read it back and compare, then put it in its place. OSError when it cannot be done.

    Until then nothing else has been touched, and afterwards no temporary file is left.
    """
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            stream = _HashingStream(file)
            try:
                torch.save(state, stream)
            except RuntimeError as error:  # of torch's own bookkeeping, after the disk has refused
                if stream.error is None:
                    raise
                raise stream.error from error
            digest = stream.hash.hexdigest().encode()
            file.seek(-2, os.SEEK_END)  # torch writes no comment: a length of 0
            file.write(_COMMENT_BYTES.to_bytes(2, "little") + _LABEL + digest)
            file.flush()
            os.fsync(file.fileno())
            _drop_from_cache(file.fileno())
        if (damage := find_damage(temporary)) is not None:
            raise OSError(f"what the disk gives back is not what was written: {damage}")


def find_damage(path: Path) -> str | None:
    """What is wrong with a state, as a few words; None if it is exactly what was written."""
    try:
        with open(path, "rb") as file:
            num_bytes = file.seek(0, os.SEEK_END) - _TRAILER_BYTES
            if num_bytes <= 0:
                return "it is truncated"
            file.seek(num_bytes)
            trailer = file.read()
            if trailer[:2] != _COMMENT_BYTES.to_bytes(2, "little") or trailer[2:].find(_LABEL) != 0:
                return "it is truncated, or was not written by this project"
            digest = _hash_start(file, num_bytes)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    is_whole = digest.encode() == trailer[2 + len(_LABEL) :]
    return None if is_whole else "its content does not fit its SHA-256"


def find_state(run_dir: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest state of a run that is exactly what was written; None if there never was one.

    Reads all of it. warn: gets a line for each newer one that is damaged. Raises StateFileError if all are.
    """
    states = list_states(run_dir / FOLDER)
    for path in states.values():
        if (damage := find_damage(path)) is None:
            return path
        warn(f"Warning: {path} is damaged: {damage}. Looking for an older state.")
    if states:
        raise StateFileError(
            f"{run_dir / FOLDER}: none of the {len(states)} states in it can be used; restore one, or start a new run "
            f"from a network with --resume {run_dir}/network-snapshot.safetensors"
        )
    return None


def load_state(path: Path) -> dict[str, Any]:
    """A state, its tensors on the CPU, in this code's format. Raises StateFileError for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise StateFileError(
            f"{path} cannot be read as a state ({type(error).__name__}); use an older one"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise StateFileError(f"{path} is not a state of this project; give a run folder of train.py")
    version = state.get("version")
    while version in MIGRATIONS:
        state = MIGRATIONS[version](state)
        version = state["version"]
    if version != VERSION:
        raise StateFileError(
            f"{path} has state format {version}, this code reads {VERSION}: go on with the code that wrote it, or "
            "start a new run from the folder's network-snapshot.safetensors with --resume"
        )
    return state


class _HashingStream:
    """What torch.save needs of a file, with a running hash."""

    def __init__(self, file: Any) -> None:
        self._file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None  # of the first write that failed

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _hash_start(file: Any, num_bytes: int) -> str:
    """SHA-256 of the first bytes as torch.save wrote them, with the 0 that the length of the comment has replaced."""
    digest = hashlib.sha256()
    file.seek(0)
    while num_bytes:
        chunk = file.read(min(num_bytes, _CHUNK_BYTES))
        if not chunk:
            raise OSError(None, "it ends too early")
        digest.update(chunk)
        num_bytes -= len(chunk)
    digest.update(bytes(2))
    return digest.hexdigest()


def _drop_from_cache(handle: int) -> None:
    # So that reading back reads the disk, where the system can be told so.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
