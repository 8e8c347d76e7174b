# SPDX-License-Identifier: MIT
"""The table of a ladder: for every stage its images, layers, parameters, memory, length and state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from training.config import TrainConfig
from training.generator.network_plan import plan_network
from training.ladder import StageState
from training.memory import Footprint

HEADER = (
    *("stage", "images", "layers", "", "G params", "trained", "D params", "trained"),
    *("memory/GiB", "weights", "G_ema", "grads", "Adam", "activations", "batch", "per pass", "kimg", "state"),
)
NOTES = (
    "layers: dropped from the stage below and added, then all, ToRGB included. memory: of one process; activations of "
    "one pass",
    "of G's step; libraries' work space comes on top.",
)


@dataclass(frozen=True)
class StageRow:
    """One line of the table."""

    name: str  # of the stage
    config: TrainConfig
    footprint: Footprint
    state: StageState


def format_table(rows: Sequence[StageRow]) -> str:
    """The table as text, with aligned columns and its notes."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = []
    for line in cells:
        parts = [
            text.ljust(width) if column in (0, 1, 2, 3, len(HEADER) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join([*lines, *NOTES])


def _cells(row: StageRow) -> tuple[str, ...]:
    config, need = row.config, row.footprint
    side = config.generator.img_resolution
    dropped, added, total = count_layers(config)
    sizes = (need.total, need.weights, need.average, need.gradients, need.optimizers, need.activations)
    return (
        row.name,
        f"{side}x{side}",
        f"-{dropped} +{added}" if dropped else f"+{added}",
        f"= {total}",
        *(_millions(n) for n in (need.G_parameters, need.G_trained, need.D_parameters, need.D_trained)),
        *(f"{size / 2**30:.3g}" for size in sizes),
        str(config.batch_size),
        str(config.microbatch_size),
        f"{config.total_kimg:g}",
        row.state.describe(),
    )


def count_layers(config: TrainConfig) -> tuple[int, int, int]:
    """Layers that the last stage drops from the network below it, that it adds, and that the network then has."""
    plan = plan_network(config.generator)
    if not config.generator.superres:
        return 0, len(plan.head), len(plan.head)
    below = plan_network(replace(config.generator, superres=config.generator.superres[:-1]))
    return len(below.layers) - len(plan.kept), len(plan.head), len(plan.layers)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count / 1e6:.3f}M"
