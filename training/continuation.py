# SPDX-License-Identifier: MIT
"""Going on with a run that stopped, from the networks of its last snapshot.

Weights, image count and the best metric value go on as they were; optimizer moments and random numbers start anew, as
in StyleGAN-XL's restarts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch_utils.errors import UserError
from training.network_io import NetworkFile, check_state, read_info, read_network

if TYPE_CHECKING:
    from training.initialization import Networks  # brings timm along

SNAPSHOT, BEST_MODEL = "network-snapshot.safetensors", "best_model.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    cur_nimg: int = 0  # real images seen; 0 = nothing to go on from
    pl_mean: float = 0.0  # running mean of path lengths
    best_value: float | None = None  # first metric of best_model; None = not measured


def read_progress(run_dir: Path) -> Progress:
    """Progress of the run in a folder, from the files of its last snapshot. NetworkFileError for damaged ones."""
    if not (run_dir / SNAPSHOT).exists():
        return Progress()
    info = read_info(run_dir / SNAPSHOT)
    best = read_info(run_dir / BEST_MODEL).get("metrics", {}) if (run_dir / BEST_MODEL).exists() else {}
    return Progress(
        cur_nimg=int(info["cur_nimg"]),
        pl_mean=float(info.get("pl_mean", 0.0)),
        best_value=next(iter(best.values()), None),
    )


def continue_from_snapshot_(networks: Networks, run_dir: Path) -> str:
    """Copy the weights of a folder's last snapshot into G, D and G_ema; returns a sentence that says so.

    UserError when the snapshot does not hold what its run trains.
    """
    stored = read_network(run_dir / SNAPSHOT)
    if stored.G is None or stored.D is None:
        raise UserError(
            f"{stored.path} lacks G or D, so its run cannot go on; move the folder away to start over"
        )
    for network, state in ((networks.G_ema, stored.G_ema), (networks.G, stored.G)):
        check_state(network, state, stored.path)
        network.load_state_dict(state)
    networks.D.load_trained_state_dict(stored.D)
    return _describe(stored)


def _describe(stored: NetworkFile) -> str:
    kimg = stored.info["cur_nimg"] / 1000
    return f"Going on at {kimg:g} kimg from {stored.path}; the optimizers' moments start anew."
