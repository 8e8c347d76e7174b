# SPDX-License-Identifier: MIT
"""What it means that a run goes on with other settings than it began with, field by field.

One table says which are free, which make it another run, and which the stored networks cannot follow.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from training.config import ConfigError, TrainConfig

Effect = Literal["free", "checked", "changes", "refused"]

# The longest entry that a field's name starts with counts.
# free: how the run is carried out, reported and ended, not what its steps compute, or what counts at the start only.
# checked: where something is; what is there is compared by itself. changes: other steps from here on, same networks.
# refused: other networks, optimizers or data than those of the state.
EFFECTS: dict[str, Effect] = {
    **dict.fromkeys(("microbatch_size", "benchmark", "data.num_workers", "path_stem"), "free"),
    **dict.fromkeys(("tick_kimg", "snapshot_ticks", "san_diagnostics_interval", "total_kimg"), "free"),
    **dict.fromkeys(("metrics", "best_by", "evaluate_at_start", "checkpoint_activations"), "free"),
    **dict.fromkeys(("resume", "classes_from", "embedding_source"), "free"),
    "data.path": "checked",
    **dict.fromkeys(
        (
            "objective",
            "normalizes_san_weights",
            "loss_terms",
            "critic",
            "batch_size",
            "sync_batchnorm",
            "seed",
        ),
        "changes",
    ),
    **dict.fromkeys(("generator_optimizer", "discriminator_optimizer"), "changes"),
    **dict.fromkeys(("precision", "feature_precision"), "changes"),
    **dict.fromkeys(("ema_halflife_kimg", "ema_rampup", "discriminator.augment_policy"), "changes"),
    **dict.fromkeys(("generator.synthesis.num_fp16_res", "generator.synthesis.conv_clamp"), "changes"),
    **dict.fromkeys(("generator.synthesis.magnitude_ema_beta", "generator.mapping.w_avg_beta"), "changes"),
    **dict.fromkeys(("generator_optimizer.kind", "discriminator_optimizer.kind"), "refused"),
    **dict.fromkeys(("loss", "data", "generator", "discriminator"), "refused"),
    **dict.fromkeys(("frozen_head_blocks", "trains_stem_input"), "refused"),
}


@dataclass(frozen=True)
class ConfigChange:
    """A field that differs between the run so far and what is asked for now."""

    name: str  # dotted
    before: Any  # as JSON has it
    after: Any
    effect: Effect  # see EFFECTS

    def describe(self, cur_nimg: int) -> str:
        """One line for the log of a run that goes on after so many images."""
        change = f"{self.name} {_show(self.before)} -> {_show(self.after)} from {cur_nimg / 1000:g} kimg on"
        if self.effect == "changes":
            return f"Warning: this is no longer the same run: {change}"
        return f"Changed: {change}"


def compare_configs(stored: dict[str, Any], wanted: TrainConfig) -> list[ConfigChange]:
    """The fields in which a run's stored configuration, as JSON gives it, differs from the one wanted now.

    Fields that only one of them has, as those of another version, are left out; but other kinds of networks are told.
    """
    before, after = flatten(stored), flatten(json.loads(json.dumps(dataclasses.asdict(wanted))))
    kinds = {f"{part}.kind" for part in ("generator", "discriminator")}
    names = sorted((before.keys() & after.keys()) | (kinds & (before.keys() | after.keys())))
    return [
        ConfigChange(name, before.get(name), after.get(name), effect_of(name))
        for name in names
        if before.get(name) != after.get(name)
    ]


def check_changes(changes: Sequence[ConfigChange], run_dir: Any) -> None:
    """Raise ConfigError for the first change that the run in a folder cannot follow."""
    for change in changes:
        if change.effect == "refused":
            raise ConfigError(
                f"{run_dir} was trained with {change.name}={_show(change.before)}, and its networks or data do not fit "
                f"{_show(change.after)}; leave that setting as it was, or start a new run"
            )


def effect_of(name: str) -> Effect:
    """What a change of the field `name` (dotted) does. KeyError for a field that the table does not have."""
    prefix = name
    while prefix not in EFFECTS:
        if "." not in prefix:
            raise KeyError(f"EFFECTS has no entry for {name!r}")
        prefix = prefix.rpartition(".")[0]
    return EFFECTS[prefix]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    items: dict[str, Any] = {}
    for name, part in value.items():
        items |= flatten(part, f"{prefix}.{name}" if prefix else name)
    return items


def _show(value: Any) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, (list, dict)) else str(value)
