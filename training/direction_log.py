# SPDX-License-Identifier: MIT
"""SAN's three conditions in the log of a run: SAN/cosine, SAN/separability_gap, ... (san/diagnostics.py)."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import nn

import san
from san.diagnostics import Recording, SANDiagnostics, Side
from torch_utils.stats import StatsCollector
from training.config import TrainConfig


class DirectionLog:
    """Measures the conditions on D's passes in every `interval`-th of its steps."""

    def __init__(self, diagnostics: SANDiagnostics, interval: int) -> None:
        self.diagnostics, self.interval = diagnostics, interval
        self.num_steps = 0

    @property
    def is_due(self) -> bool:
        """True in a step that is measured."""
        return self.num_steps % self.interval == 0

    def record(self, side: Side) -> AbstractContextManager[Recording | None]:
        """Around a pass of D on real or on generated images; gives None in a step that is not measured."""
        return self.diagnostics.record(side) if self.is_due else contextlib.nullcontext()

    def finish_step(self, stats: StatsCollector) -> None:
        """After D's update and the normalisation of its directions: report as SAN/<measure> and SAN/<measure>/<layer>.

        What this process has no evidence for is reported as empty: processes must agree on the names.
        """
        if self.is_due:
            values = self.diagnostics.measure()
            for name in self.diagnostics.names:
                stats.report(f"SAN/{name}", torch.tensor([values[name]] if name in values else []))
        self.num_steps += 1

    def state_dict(self) -> dict[str, int]:
        """What moves: between steps of D nothing is recorded, and the diagnostics are empty."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what `state_dict` gave."""
        self.num_steps = state["num_steps"]


def make_direction_log(config: TrainConfig, D: nn.Module) -> DirectionLog | None:
    """The log of a run with SAN heads; None for plain heads, or when it is off."""
    if config.loss != "san" or config.san_diagnostics_interval == 0:
        return None
    objective = {**san.OBJECTIVES, **san.PAIRED_OBJECTIVES}[config.objective]
    return DirectionLog(
        SANDiagnostics(D, objective, config.normalizes_san_weights), config.san_diagnostics_interval
    )
