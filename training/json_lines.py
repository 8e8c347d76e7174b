# SPDX-License-Identifier: MIT
"""Files of JSON lines, read whatever has happened to them: a process killed in mid-line, a disk that was full."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch_utils.errors import UserError


def read_lines(file: Path, remarks: list[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file. Others are left out, which is added to `remarks` at the end."""
    damaged, total, is_last_damaged = 0, 0, False
    try:
        with open(file, encoding="utf-8", errors="replace") as stream:
            for text in stream:
                total += 1
                line = _parse_object(text)
                is_last_damaged = line is None
                damaged += is_last_damaged
                if line is not None:
                    yield line
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if is_last_damaged:
        damaged -= 1
        remarks.append(
            f"the last line of {file.name} was cut short, by a kill or as it is being written; left out"
        )
    if damaged:
        remarks.append(f"{damaged} of the {total} lines of {file.name} are damaged and left out")


def _parse_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
