# SPDX-License-Identifier: MIT
"""Lines of metric-*.jsonl: the official keys, and what makes a value count: the step, the network, the settings."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torch_utils.distributed import world_size
from training.durations import format_duration


@dataclass(frozen=True)
class MetricRecord:
    """One evaluation of one metric."""

    metric: str  # its name
    results: Mapping[str, float]  # by official key
    cur_nimg: int | None  # images that the network had seen; None = unknown
    network: str | None  # file of the network, in the run folder or as it was given; None = no network
    network_sha256: str | None  # see `network_hash`
    seconds: float  # that all metrics evaluated together took
    settings: Mapping[str, Any] = field(default_factory=dict)  # what else the numbers depend on: JSON values
    details: Mapping[str, float] = field(default_factory=dict)  # more numbers, such as one per class

    def to_json(self) -> str:
        """One line. The first seven keys are the official ones."""
        line = {
            "results": dict(self.results),
            "metric": self.metric,
            "total_time": self.seconds,
            "total_time_str": format_duration(self.seconds),
            "num_gpus": world_size(),
            "snapshot_pkl": self.network,
            "timestamp": time.time(),
            "cur_nimg": self.cur_nimg,
            "network_sha256": self.network_sha256,
            "settings": dict(self.settings),
        }
        return json.dumps({**line, "details": dict(self.details)} if self.details else line)


def metric_file(name: str) -> str:
    """File name of the values of the metric `name` in a run folder."""
    return f"metric-{name}.jsonl"


def network_hash(G: nn.Module) -> str:
    """SHA-256, hex, of a generator's parameters and buffers, wherever they lie: equal for equal networks.

    Names, shapes and dtypes count too. A file that stores a network in float16 gives another network.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(G.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()
