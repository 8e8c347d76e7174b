# SPDX-License-Identifier: MIT
"""How a run is carried out on this machine, today: what is kept, when it stops. Not what it trains: see config.py.

These may change from one part of a run to the next without changing its networks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.config import ConfigError

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One part of a run, from a start to a stop."""

    checkpoint_ticks: int = (
        10  # write the complete state every N ticks, beside every snapshot; 0 = there only
    )
    keep_last: int = 2  # complete states kept, newest first
    keep_every_kimg: float = 0.0  # also keep a network file for good every so many thousand images; 0 = none
    time_limit_s: float | None = (
        None  # stop, with the state saved, before so many seconds are over; None = never
    )
    on_nonfinite: Literal["skip", "rollback", "abort"] = "skip"  # what a gradient that is not finite leads to
    nonfinite_limit: int = 10  # abort after so many such steps in a row
    cache_data: Path | None = (
        None  # copy the training images to this local folder first; None = read in place
    )
    wandb_project: str | None = None  # also log to this project of Weights & Biases; None = not
    description: str = ""  # name of the run folder after its number
    outdir: str = "runs"  # where numbered run folders go


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
