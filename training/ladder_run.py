# SPDX-License-Identifier: MIT
"""train.py --ladder: walk the stages of a recipe. Finished ones are skipped, a half-done one goes on, others start.

What is done is read from the run folders, so the same command after a crash, or on another machine with the same
folders, goes on where the last one stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from training.cli import end_run, read_options, summarize_run
from training.cli_config import (
    build_config,
    check_refused,
    num_processes,
    override_networks,
    override_schedule,
)
from training.cli_superres import add_stage_of_flags, is_stage_run
from training.config import ConfigError, TrainConfig
from training.continuation import BEST_MODEL
from training.dataset import open_dataset
from training.ladder import (
    Ladder,
    StageState,
    check_unchanged,
    find_ladder,
    read_states,
    stage_folder,
    stage_resolution,
)
from training.ladder_table import StageRow, format_table
from training.memory import count_footprint
from training.network_io import BUILTIN_NETWORKS, read_network
from training.presets import PRESETS
from training.processes import join_processes
from training.sampling import pick_device
from training.training_loop import Trainer

LADDER_FLAGS = {
    *("ladder", "loss", "outdir", "data", "device", "gpus", "batch_gpu", "dry_run", "workers"),
    *("embedding", "path_stem", "backbones", "official_bn", "train_stem_input", "tick", "snap"),
    *("metrics", "best_by", "seed", "nobench", "ops", "precision", "feature_precision"),
}
SWITCHES = ("superres", "stem")  # False when absent
STEM_ONLY_FLAGS = ("embedding",)  # a stage takes its class embeddings from the stem
STAGE_ONLY_FLAGS = ("train_stem_input",)
PLACEHOLDER = "{resolution}"  # in --data: the side of a stage's images


def run_ladder(flags: dict[str, Any]) -> None:
    """Show the stages of flags["ladder"], then train those that are not finished. Raises UserError."""
    check_ladder_flags(flags)
    ladder = find_ladder(flags["ladder"])
    if flags["path_stem"] is not None:
        ladder = above_stem(ladder, flags)
    states = read_states(flags["outdir"], ladder)
    click.echo(f"Ladder {ladder.name} in {Path(flags['outdir']) / ladder.name}")
    click.echo(format_table(count_rows(ladder, states, flags)))
    if flags["dry_run"]:
        click.echo("Dry run: nothing was trained or written.")
        return
    device = join_processes(flags["device"])
    check_ahead(ladder, states, flags)
    for stage in ladder.stages:
        if states[stage].is_over:
            click.echo(f"Stage {stage}: {states[stage].describe()}, skipped.")
        else:
            train_stage(ladder, stage, flags, device)
    click.echo(summarize_run(stage_folder(flags["outdir"], ladder, ladder.stages[-1])))


def check_ladder_flags(flags: dict[str, Any]) -> None:
    """Raise ConfigError for flags that a ladder's stages set themselves."""
    for name, value in flags.items():
        is_absent = value is None or (name in SWITCHES and not value)
        if name not in LADDER_FLAGS and not is_absent:
            flag = "--" + (
                name.replace("_", "-") if name in ("map_depth", "blur_kimg", "classes_from") else name
            )
            raise ConfigError(
                f"{flag} with --ladder: every stage has its own; leave it out, or train with --preset"
            )


def above_stem(ladder: Ladder, flags: dict[str, Any]) -> Ladder:
    """The stages above the network of --path_stem. In a dry run without the file, all but the stem."""
    path = flags["path_stem"]
    if flags["dry_run"] and path not in BUILTIN_NETWORKS and not Path(path).exists():
        click.echo(
            f"Note: --path_stem {path} is not there; the stages are shown as on the recipe's own stem."
        )
        resolution = stage_resolution(ladder.stages[0])
    else:
        resolution = read_network(path).generator_config.img_resolution
    if remaining := ladder.above(resolution).stages:
        return Ladder(ladder.name, remaining)
    raise ConfigError(
        f"--path_stem {path} makes {resolution}x{resolution} images already; --ladder {flags['ladder']} ends there"
    )


def count_rows(ladder: Ladder, states: dict[str, StageState], flags: dict[str, Any]) -> list[StageRow]:
    """A row of the table per stage. Needs neither data nor weights."""
    is_planned = flags["dry_run"] and flags["device"] != "auto"  # for a machine that need not be this one
    device_type = flags["device"] if is_planned else pick_device(flags["device"]).type
    rows = []
    for stage in tqdm(ladder.stages, desc="Counting parameters and memory", leave=False):
        config = nominal_config(stage, flags)
        config.validate(world_size=num_processes(flags))
        rows.append(StageRow(stage, config, count_footprint(config, device_type), states[stage]))
    return rows


def nominal_config(stage: str, flags: dict[str, Any]) -> TrainConfig:
    """Configuration of a stage on the recipe's own stem and for its own number of classes."""
    stage_flags = flags_of_stage(stage, flags, path_stem=None)
    config = PRESETS[stage]()
    if is_stage_run(stage_flags):
        config = add_stage_of_flags(config, stage_flags)
    return override_schedule(override_networks(config, stage_flags), stage_flags)


def flags_of_stage(stage: str, flags: dict[str, Any], path_stem: str | None) -> dict[str, Any]:
    """The flags of the command that trains one stage alone."""
    preset = PRESETS[stage]()
    is_stem = not preset.generator.superres
    left_out = STAGE_ONLY_FLAGS if is_stem else STEM_ONLY_FLAGS
    data = flags["data"] and flags["data"].replace(PLACEHOLDER, str(preset.generator.img_resolution))
    return {
        **flags,
        **dict.fromkeys(left_out),
        "ladder": None,
        "preset": stage,
        "data": data,
        "path_stem": path_stem,
    }


def stem_of(ladder: Ladder, stage: str, flags: dict[str, Any]) -> str | None:
    """File under a stage: that of --path_stem, or best_model of the stage below; None for a stem."""
    index = ladder.stages.index(stage)
    if index == 0:
        return flags["path_stem"]
    return str(stage_folder(flags["outdir"], ladder, ladder.stages[index - 1]) / BEST_MODEL)


def check_ahead(ladder: Ladder, states: dict[str, StageState], flags: dict[str, Any]) -> None:
    """Raise UserError now for what would stop a later stage: its data, or a folder of another configuration."""
    to_train = [stage for stage in ladder.stages if not states[stage].is_over]
    if flags["data"] is not None and PLACEHOLDER not in flags["data"] and len(to_train) > 1:
        raise ConfigError(
            f"--data {flags['data']} is one file, but {len(to_train)} stages need images of their own size; write "
            f"{PLACEHOLDER} where the file names differ, such as data/cifar10_{PLACEHOLDER}.zip"
        )
    for stage in ladder.stages:
        stage_flags = flags_of_stage(stage, flags, stem_of(ladder, stage, flags))
        stem = stage_flags["path_stem"]
        if stage in to_train:
            check_refused(stage_flags)
            check_data(stage, stage_flags)
        is_buildable = stem is None or stem in BUILTIN_NETWORKS or Path(stem).exists()
        folder = stage_folder(flags["outdir"], ladder, stage)
        if is_buildable and (folder / "training_options.json").exists() and _has_data(stage, stage_flags):
            check_unchanged(folder, build_config(stage_flags)[0])


def check_data(stage: str, stage_flags: dict[str, Any]) -> None:
    """Raise UserError unless a stage's images are there, of its size, and labelled if it needs labels."""
    data, resolution = PRESETS[stage]().data, stage_resolution(stage)
    path = stage_flags["data"] or data.path
    dataset = open_dataset(path, data.use_labels)
    if dataset.resolution != resolution:
        side = dataset.resolution
        raise ConfigError(
            f"{path} has {side}x{side} images, but stage {stage} needs {resolution}x{resolution}: make them with "
            f"dataset_tool.py --resolution {resolution}x{resolution}"
        )


def train_stage(ladder: Ladder, stage: str, flags: dict[str, Any], device: torch.device) -> None:
    """Train one stage to its end, exactly as it would have gone on where it was stopped."""
    folder = stage_folder(flags["outdir"], ladder, stage)
    config, dataset = build_config(flags_of_stage(stage, flags, stem_of(ladder, stage, flags)))
    check_unchanged(folder, config)
    click.echo(f"Stage {stage} in {folder}")
    reason = Trainer(config, dataset, device, read_options(flags, stage), run_dir=folder).fit()
    if reason is not None:
        end_run(folder, reason)


def _has_data(stage: str, stage_flags: dict[str, Any]) -> bool:
    """Finished stages do not need their data any more, and it may be gone."""
    path = stage_flags["data"] or PRESETS[stage]().data.path
    return path == PRESETS[stage]().data.path or Path(path).exists()
