# SPDX-License-Identifier: MIT
"""What the environment says about this process: the variables that torchrun sets, checked. Needs no torch.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, from torchrun, from `train.py --gpus`, or
from a script that sets them by hand (`srun`, MPI).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from torch_utils.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MAX_PORT = 65535


@dataclass(frozen=True)
class ProcessEnvironment:
    """The place of this process among all processes of a run."""

    rank: int  # index among all processes
    world_size: int  # processes on all machines
    local_rank: int  # index among those of this machine
    local_world_size: int  # processes on this machine
    master_addr: str  # machine of rank 0
    master_port: int  # port of the store there
    attempt: int = 0  # how often torchrun has started this run's processes again
    max_restarts: int = 0  # how often it may

    def describe(self) -> str:
        """For messages: "rank 3 (host b)"."""
        return f"rank {self.rank} (host {host_name()})"


def read_environment(variables: Mapping[str, str] = os.environ) -> ProcessEnvironment | None:
    """The place of this process, or None without RANK and WORLD_SIZE: it is alone. UserError for nonsense."""
    given = [name for name in ("RANK", "WORLD_SIZE") if variables.get(name)]
    if not given:
        return None
    missing = [name for name in NEEDED if not variables.get(name)]
    if missing:
        raise UserError(
            f"{', '.join(given)} set but not {', '.join(missing)}: start with torchrun or train.py --gpus, "
            "which set all of them, or unset these"
        )
    world_size = _number(variables, "WORLD_SIZE", 1)
    rank = _number(variables, "RANK", 0)
    local_world_size = _number(variables, "LOCAL_WORLD_SIZE", 1, default=world_size)
    local_rank = _number(variables, "LOCAL_RANK", 0, default=rank % local_world_size)
    for name, index, count_name, count in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size),
    ):
        if index >= count:
            raise UserError(f"{name}={index} must be below {count_name}={count}; start with torchrun")
    port = _number(variables, "MASTER_PORT", 1)
    if port > MAX_PORT:
        raise UserError(f"MASTER_PORT={port} is no port; choose one from 1024 to {MAX_PORT}")
    return ProcessEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=variables["MASTER_ADDR"],
        master_port=port,
        attempt=_number(variables, "TORCHELASTIC_RESTART_COUNT", 0, default=0),
        max_restarts=_number(variables, "TORCHELASTIC_MAX_RESTARTS", 0, default=0),
    )


def host_name() -> str:
    """Name of this machine, without its domain."""
    return socket.gethostname().partition(".")[0]


def _number(variables: Mapping[str, str], name: str, least: int, default: int | None = None) -> int:
    text = variables.get(name)
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise UserError(f"{name}={text!r} is not a whole number of at least {least}; start with torchrun")
    return int(text)
