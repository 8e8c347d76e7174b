# SPDX-License-Identifier: MIT
"""Lengths of time as people write and read them."""

from __future__ import annotations

import re

from training.config import ConfigError

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Seconds of "3h50m", "90m", "1d", "45s" or a plain number of seconds. Raises ConfigError.

    >>> parse_duration("3h50m")
    13800.0
    """
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    elif re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
        seconds = sum(float(n) * UNITS[unit] for n, unit in re.findall(r"(\d+(?:\.\d+)?)([dhms])", text))
    else:
        seconds = 0.0
    if seconds <= 0:
        raise ConfigError(
            f"duration {text!r} is not understood; write it as 3h50m, 90m, 1d or a number of seconds"
        )
    return seconds


def format_duration(seconds: float) -> str:
    """Such as 45s, 12m05s, 3h05m or 2d07h.

    >>> format_duration(11100)
    '3h05m'
    """
    seconds = round(seconds)
    for size, unit, part_size, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part_size:02d}{part}"
    return f"{seconds}s"
