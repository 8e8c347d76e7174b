# SPDX-License-Identifier: MIT
"""Going on with a run: which complete state to take, whether it fits today's settings, how far the run was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_utils.distributed import broadcast_object, is_main
from training.config import TrainConfig
from training.config_changes import check_changes, compare_configs
from training.network_io import read_info
from training.run_state import stored_config
from training.state_file import FOLDER, StateFileError, find_state, list_states, load_state

SNAPSHOT, BEST_MODEL = "network-snapshot.safetensors", "best_model.safetensors"


@dataclass(frozen=True)
class Continuation:
    """A complete state that a run goes on from."""

    path: Path  # its file
    state: dict[str, Any]  # its contents, see run_state.py
    notes: tuple[str, ...]  # for the log: settings that differ from those so far

    @property
    def cur_nimg(self) -> int:
        """Real images seen."""
        return self.state["others"]["clock"]["cur_nimg"]

    def describe(self) -> str:
        """For the log."""
        return f"Continued at {self.cur_nimg / 1000:g} kimg from {self.path}."


def read_continuation(
    run_dir: Path, config: TrainConfig, warn: Callable[[str], None] = print
) -> Continuation | None:
    """The newest whole state in a run folder, the same on all processes; None where no training has begun.

    Raises UserError when the networks or the data of `config` are not the run's, and when there is no state, but there
    are networks that a new start would overwrite.
    """
    path = broadcast_object(find_state(run_dir, warn) if is_main() else None)
    if path is None:
        if (run_dir / SNAPSHOT).exists():
            raise StateFileError(
                f"{run_dir} has networks but no complete state to go on from; start from its weights with --resume "
                f"{run_dir / SNAPSHOT}, or move the folder away"
            )
        return None
    state = load_state(path)
    changes = compare_configs(stored_config(state, path), config)
    check_changes(changes, run_dir)
    cur_nimg = state["others"]["clock"]["cur_nimg"]
    return Continuation(path, state, tuple(change.describe(cur_nimg) for change in changes))


def read_progress(run_dir: Path) -> int:
    """Real images that the run in a folder has seen at what it saved last; 0 = nothing to go on from.

    Raises NetworkFileError for a damaged snapshot.
    """
    snapshot = run_dir / SNAPSHOT
    in_snapshot = int(read_info(snapshot)["cur_nimg"]) if snapshot.exists() else 0
    return max(in_snapshot, *list_states(run_dir / FOLDER), 0)
