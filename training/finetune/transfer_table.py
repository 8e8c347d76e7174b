# SPDX-License-Identifier: MIT
"""What happens to every group of tensors of a checkpoint, as lines of a table: the vocabulary of `transfer_plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from training.network_file import NetworkFileError, check_names_and_shapes

Action = Literal["loaded", "converted", "re-initialised", "skipped"]
State = dict[str, Tensor]
HEADINGS = ("network", "group", "tensors", "values", "what", "why")
RIGHT_ALIGNED = ("tensors", "values")
DAMAGE = (KeyError, IndexError, RuntimeError)  # what arithmetic on missing or misshapen tensors raises


@dataclass(frozen=True)
class GroupTransfer:
    """What happens to one group of tensors: a line of the table."""

    network: str  # "G", or "D" and its backbone
    group: str  # words for the part of the network
    action: Action  # what happens to it
    num_tensors: int  # tensors of the group
    num_values: int  # numbers in them
    reason: str  # why


@dataclass(frozen=True)
class TransferPlan:
    """Complete states for the networks of a run, and the table that explains them."""

    headline: str  # where they come from, one line
    groups: tuple[GroupTransfer, ...]  # the table
    G: State  # of the trained generator
    G_ema: State  # of its moving average
    D: State  # trained part of the discriminator

    def table(self) -> str:
        """The headline and one line per group, in columns."""
        rows = [HEADINGS]
        for line in self.groups:
            counts = (f"{line.num_tensors:,}", f"{line.num_values:,}")
            rows.append((line.network, line.group, *counts, line.action, line.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
        lines = [self.headline]
        for row in rows:
            cells = [
                cell.rjust(width) if heading in RIGHT_ALIGNED else cell.ljust(width)
                for heading, cell, width in zip(HEADINGS, row, widths, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def describe_group(
    network: str, group: str, action: Action, tensors: Mapping[str, Tensor], reason: str
) -> GroupTransfer:
    """A line of the table about `tensors`."""
    num_values = sum(x.numel() for x in tensors.values())
    return GroupTransfer(network, group, action, len(tensors), num_values, reason)


def action_of(prefix: str, old: State, converted: State, fresh: Mapping[str, Tensor]) -> Action | None:
    """What happens to the tensors whose names start with `prefix`; None if neither side has any.

    old: as stored. converted: what will be loaded. fresh: the new network's own.
    """
    if not select(fresh, prefix):
        return "skipped" if select(old, prefix) else None
    new = select(converted, prefix)
    if not new:
        return "re-initialised"
    is_same = all(name in old and torch.equal(x, old[name]) for name, x in new.items())
    return "loaded" if is_same else "converted"


def select(state: Mapping[str, Tensor], *prefixes: str) -> State:
    """The tensors whose names start with one of `prefixes`."""
    return {name: x for name, x in state.items() if name.startswith(prefixes)}


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose names start with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in select(state, prefix).items()}


def check_tensors(
    state: Mapping[str, Tensor], fresh: Mapping[str, Tensor], may_lack: tuple[str, ...], path: Path
) -> None:
    """NetworkFileError unless names and shapes are those of the new network, `may_lack` prefixes excepted."""
    expected = {name: x for name, x in fresh.items() if name in state or not name.startswith(may_lack)}
    advice = "the file does not fit its own configuration; write or download it again"
    check_names_and_shapes(expected, state, path, advice)


def damaged(path: Path, part: str, error: Exception) -> NetworkFileError:
    """The error for a part whose tensors are missing or do not fit each other."""
    what = f"lacks {error}" if isinstance(error, KeyError) else "does not fit its own configuration"
    return NetworkFileError(f"{path}: its {part} {what}; write or download it again")
