# SPDX-License-Identifier: MIT
"""How a run is carried out on this machine, today: what is kept, when it stops. Not what it trains: see config.py.

These may change from one part of a run to the next without changing its networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One part of a run, from a start to a stop."""

    checkpoint_ticks: int = 10  # complete state every N ticks, beside every snapshot; 0 = there only
    keep_last: int = 2  # complete states kept, newest first
    keep_every_kimg: float = 0.0  # also keep a network file for good every so many thousand images; 0 = none
    time_limit_s: float | None = None  # save and stop before so many seconds are over; None = never
    on_nonfinite: Literal["skip", "rollback", "abort"] = "skip"  # what a gradient that is not finite leads to
    nonfinite_limit: int = 10  # abort after so many such steps in a row
    cache_data: Path | None = None  # local folder to copy the images to first; None = read in place
    wandb_project: str | None = None  # also log to this project of Weights & Biases; None = not
    description: str = ""  # name of the run folder after its number
    outdir: str = "runs"  # where numbered run folders go
