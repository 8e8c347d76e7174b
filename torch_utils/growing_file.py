# SPDX-License-Identifier: MIT
"""A text file that grows by whole lines, whatever happens: a full disk, a process that was killed in mid-line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


class GrowingFile:
    """Appends lines to a file. Lines that the disk refuses wait in memory and are written with later ones.

    problem: what is wrong at the moment; None = all lines are on the disk.
    """

    def __init__(self, path: Path, on_problem: Callable[[str], None]) -> None:
        """A last line without its end, of a process that was killed, gets one. on_problem: told when trouble begins."""
        self.path, self.problem = path, None
        self._on_problem, self._waiting = on_problem, []
        self._needs_end = _is_torn(path)

    def append(self, line: str) -> None:
        """Write a line (without its end) and all that wait. It reaches the disk, not only the system's memory."""
        self._waiting.append(line)
        self.flush()

    def flush(self) -> None:
        """Try once more to write the lines that wait."""
        if not self._waiting:
            return
        text = "".join(f"{line}\n" for line in self._waiting)
        try:
            self._write(("\n" if self._needs_end else "") + text)
        except OSError as error:
            if self.problem is None:
                self._on_problem(f"{self.path} cannot be written ({error.strerror})")
            self.problem = error.strerror
        else:
            self._waiting.clear()
            self.problem, self._needs_end = None, False

    def _write(self, text: str) -> None:
        with open(self.path, "ab", buffering=0) as file:
            start, data = file.seek(0, os.SEEK_END), text.encode()
            try:
                while data:  # a nearly full disk takes a part
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(start)
                raise


def _is_torn(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:
        return False
