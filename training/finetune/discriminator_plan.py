# SPDX-License-Identifier: MIT
"""What a discriminator takes from a checkpoint, backbone by backbone: projections as they are, heads converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from training.config import TrainConfig
from training.discriminator.heads import HeadKind
from training.discriminator.projected import module_key
from training.finetune.class_sources import ClassSources
from training.finetune.head_conversion import ConversionError, HeadForm, convert_head
from training.finetune.transfer_table import (
    DAMAGE,
    Action,
    GroupTransfer,
    State,
    action_of,
    check_tensors,
    damaged,
    describe_group,
    select,
    without_prefix,
)
from training.network_file import NetworkFile

PARTS = {"trunk": "trunks of heads", "last": "last layers"}
KIND_WORDS: dict[HeadKind, str] = {"san": "SAN", "gan": "plain"}


@dataclass(frozen=True)
class HeadTransfer:
    """What the heads of every backbone go through."""

    stored: NetworkFile  # the checkpoint; it has D
    source: HeadForm  # of its heads
    target: HeadForm  # of the run's heads
    classes: ClassSources | None  # where the run's classes come from; None = the checkpoint has none

    @property
    def reason(self) -> str:
        """Why last layers are as they are."""
        parts = []
        if self.source.kind != self.target.kind:
            parts.append(f"{KIND_WORDS[self.source.kind]} to {KIND_WORDS[self.target.kind]}, same function")
        if self.classes is not None and not (parts and self.classes.is_identity):
            folded = "" if self.target.is_conditional else "one filter for all images: "
            parts.append(folded + self.classes.describe())
        elif self.classes is None and self.target.is_conditional:
            parts.append("every class starts with the file's filter")
        return "; ".join(parts) or "as in the file"


def plan_discriminator(
    stored: NetworkFile,
    config: TrainConfig,
    fresh: Mapping[str, Tensor],
    classes: ClassSources | None,
    class_rows: Tensor | None,
) -> tuple[State, list[GroupTransfer]]:
    """Complete trained state of D, and its lines of the table.

    fresh: the trained state of the run's new discriminator. classes: where its classes come from; None if the file
    has none. class_rows: embedding rows (classes, width) of G to start new plain class tables from; None = as they are.
    """
    plain_tables = [] if class_rows is None else _plain_class_tables(fresh, class_rows.shape[1])
    state, groups = dict(fresh), []
    for table in plain_tables:
        state[table] = torch.cat([class_rows, fresh[table][len(class_rows) :]])[: len(fresh[table])]
    fresh = dict(state)
    old_names = () if stored.discriminator_config is None else stored.discriminator_config.backbones
    for name in config.discriminator.backbones:
        if name in old_names:
            source = HeadForm(stored.discriminator_config, stored.head_kind)
            transfer = HeadTransfer(stored, source, HeadForm(config.discriminator, config.loss), classes)
            taken, lines = _convert_backbone(name, transfer, fresh)
            state |= taken
            groups += lines
        else:
            why = "the file has no heads for this backbone" if old_names else _why_no_discriminator(stored)
            why += "; class tables take G's rows" if plain_tables else ""
            tensors = select(fresh, *_prefixes(name))
            groups.append(_whole_backbone(name, "re-initialised", tensors, why))
    for name in old_names:
        if name not in config.discriminator.backbones:
            tensors = select(stored.D, *_prefixes(name))
            groups.append(_whole_backbone(name, "skipped", tensors, "this run does not use this backbone"))
    return state, groups


def _convert_backbone(
    name: str, transfer: HeadTransfer, fresh: Mapping[str, Tensor]
) -> tuple[State, list[GroupTransfer]]:
    """What one backbone's projection and heads take, and their lines of the table."""
    stored, key = transfer.stored, module_key(name)
    projection = select(stored.D, *_prefixes(name)[:2])
    state, failures = dict(projection), {}
    for level in range(transfer.target.cfg.num_levels):
        prefix = f"heads.{key}.{level}."
        old, new = without_prefix(stored.D, prefix), without_prefix(fresh, prefix)
        try:
            head = convert_head(old, new, transfer.source, transfer.target, transfer.classes)
        except ConversionError as error:
            head = select(old, "trunk.")
            failures[level] = str(error)
        except DAMAGE as error:
            raise damaged(stored.path, f"head {prefix.removesuffix('.')!r}", error) from error
        state |= {prefix + part: x for part, x in head.items()}
    may_lack = tuple(f"heads.{key}.{level}.last." for level in failures)
    check_tensors(state, select(fresh, *_prefixes(name)), may_lack, stored.path)
    why = "as in the file: the heads know no other"
    lines = [describe_group(f"D {name}", "random projection", "loaded", projection, why)]
    return state, lines + _head_lines(name, transfer, state, fresh, failures)


def _head_lines(
    name: str, transfer: HeadTransfer, state: State, fresh: Mapping[str, Tensor], failures: Mapping[int, str]
) -> list[GroupTransfer]:
    """Lines for trunks, then last layers; levels that fare alike share one."""
    lines, levels = [], range(transfer.target.cfg.num_levels)
    for part, words in PARTS.items():
        fates: dict[tuple[Action, str], list[int]] = {}
        for level in levels:
            prefix = f"heads.{module_key(name)}.{level}.{part}."
            action = action_of(prefix, transfer.stored.D, state, fresh)
            if action is None:  # a trunk without blocks
                continue
            reason = transfer.reason if part == "last" else "as in the file"
            if part == "trunk" and action == "converted":
                reason = "last BatchNorm takes the scale of the last layer"
            fates.setdefault((action, failures.get(level, reason) if part == "last" else reason), []).append(
                level
            )
        for (action, reason), members in fates.items():
            which = f" {', '.join(map(str, members))}" if len(fates) > 1 else ""
            tensors = select(fresh, *(f"heads.{module_key(name)}.{level}.{part}." for level in members))
            lines.append(describe_group(f"D {name}", words + which, action, tensors, reason))
    return lines


def _whole_backbone(name: str, action: Action, tensors: State, reason: str) -> GroupTransfer:
    return describe_group(f"D {name}", "projection and heads", action, tensors, reason)


def _plain_class_tables(state: Mapping[str, Tensor], width: int) -> list[str]:
    """Names of the class tables of plain heads, where their rows have `width`."""
    projections = [name for name in state if name.endswith("last.embed_proj.weight")]
    tables = [name.replace("embed_proj.weight", "embed.weight") for name in projections]
    return [name for name in tables if state[name].shape[1] == width]


def _why_no_discriminator(stored: NetworkFile) -> str:
    reason = stored.info.get("discriminator")
    return reason if isinstance(reason, str) else "the file has no discriminator"


def _prefixes(name: str) -> tuple[str, str, str]:
    """How the names of a backbone's saved tensors start: projection, reassembly of ViTs, heads."""
    key = module_key(name)
    return f"projectors.{key}.", f"feature_networks.{key}.", f"heads.{key}."
