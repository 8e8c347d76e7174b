# SPDX-License-Identifier: MIT
"""What train.py does with its flags: a configuration, a run folder to go on with if there is one, a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from torch_utils.distributed import broadcast_object, is_main
from training.cli_config import build_config, check_refused, num_processes, override
from training.cli_superres import stage_notes
from training.config import TrainConfig, to_json
from training.dataset import ImageDataset
from training.precision import check_precision, precision_note
from training.processes import join_processes
from training.relaunch import run_folder_of_launch
from training.resume import Resume, continued_config, is_whole_command, newest_run, parse_resume
from training.run_options import RunOptions
from training.stopping import StopReason


@dataclass(frozen=True)
class RunPlan:
    """What the flags come to."""

    config: TrainConfig  # what to train
    dataset: ImageDataset  # on what
    options: RunOptions  # how
    run_dir: Path | None  # the run to go on with; None = a new one


def run_training(flags: dict[str, Any]) -> None:
    """Do what the flags ask. Raises UserError for whatever the user can fix, before anything is written."""
    resume = parse_resume(flags["resume"])
    if resume.run_dir is None or is_whole_command(flags):
        check_refused({**flags, "resume": resume.network})
    device = join_processes(flags["device"])
    plan = plan_run(flags, resume)
    check_precision(plan.config, device)
    if flags["batch_gpu"] == "auto" and not flags["dry_run"]:
        plan = fit_microbatch(plan, device)
    click.echo(to_json(plan.config))
    for note in stage_notes(plan.config, flags):
        click.echo(note)
    if (note := precision_note(plan.config, device)) is not None:
        click.echo(note)
    if flags["dry_run"]:
        preview(plan)
    else:
        train(plan, device)


def plan_run(flags: dict[str, Any], resume: Resume) -> RunPlan:
    """Configuration, data and run folder for the flags, alike on all processes. Raises UserError; writes nothing."""
    if resume.run_dir is not None:
        config, dataset = continued_config(resume.run_dir, flags)
        return RunPlan(config, dataset, read_options(flags, ""), resume.run_dir)
    flags = {**flags, "resume": resume.network}
    config, dataset = build_config(flags)
    description = describe_run(flags, config, dataset)
    run_dir = None
    if is_main():  # before any other process could see the folder that this one makes
        run_dir = run_folder_of_launch(flags["outdir"])
        if run_dir is None and resume.is_auto:
            run_dir = newest_run(flags["outdir"], description)
    return RunPlan(config, dataset, read_options(flags, description), broadcast_object(run_dir))


def fit_microbatch(plan: RunPlan, device: torch.device) -> RunPlan:
    """The plan with as many images per forward pass as fit into memory; says how many."""
    from training.microbatch import choose_microbatch  # imports timm and friends

    size, sentence = choose_microbatch(plan.config, device)
    click.echo(sentence)
    return replace(plan, config=replace(plan.config, microbatch_size=size))


def read_options(flags: dict[str, Any], description: str) -> RunOptions:
    """How the run is carried out."""
    return override(
        RunOptions(outdir=flags["outdir"], description=description),
        checkpoint_ticks=flags["checkpoint"],
        keep_last=flags["keep_last"],
        keep_every_kimg=flags["keep_every"],
        time_limit_s=flags["time_limit"],
        on_nonfinite=flags["on_nonfinite"],
        nonfinite_limit=flags["nonfinite_limit"],
        cache_data=flags["cache_data"] and Path(flags["cache_data"]),
        wandb_project=flags["wandb"],
    )


def preview(plan: RunPlan) -> None:
    """Say what would be done."""
    if plan.run_dir is not None:
        click.echo(f"Would go on with {plan.run_dir}.")
    elif plan.config.resume is not None:
        from training.initialization import preview_start

        click.echo(preview_start(plan.config, plan.dataset))
    click.echo("Dry run: nothing was trained or written.")


def train(plan: RunPlan, device: torch.device) -> None:
    """Train as planned."""
    from training.training_loop import (
        Trainer,
    )  # imports timm and friends: seconds that --dry-run need not wait

    trainer = Trainer(plan.config, plan.dataset, device, plan.options, plan.run_dir)
    end_run(trainer.run_dir, trainer.fit())


def end_run(run_dir: Path, reason: StopReason | None) -> None:
    """Say where everything is, or leave with the exit code of an early stop."""
    if reason is None:
        click.echo(summarize_run(run_dir))
        return
    click.echo(f"Everything is saved. To go on: the same command with --resume {run_dir}")
    sys.exit(reason.exit_code)


def describe_run(flags: dict[str, Any], config: TrainConfig, dataset: ImageDataset) -> str:
    """Name of the run folder after its number: configuration, data, processes, batch."""
    parts = [config.loss, flags["preset"] or flags["cfg"] or "finetune"]
    if config.is_dcgan or flags["objective"]:
        parts.append(flags["objective"] or config.objective)
    parts += [dataset.name, f"gpus{num_processes(flags)}", f"batch{config.batch_size}"]
    return "-".join(parts + ([flags["desc"]] if flags["desc"] else []))


def summarize_run(run_dir: Path) -> str:
    """Where the results are, one line per kind of file that exists."""
    fakes = sorted(run_dir.glob("fakes[0-9]*.png"))
    entries = [
        ("images", f"{run_dir}/fakes_init.png ... {fakes[-1].name if fakes else ''} (real ones: reals.png)"),
        ("best network", f"{run_dir}/best_model.safetensors"),
        ("metrics", ", ".join(str(path) for path in sorted(run_dir.glob("metric-*.jsonl"))) or "none"),
        (
            "statistics",
            f"{run_dir}/stats.jsonl, log.txt, training_options.json; tensorboard --logdir {run_dir}",
        ),
        ("more images", f"python gen_images.py --network {run_dir}/best_model.safetensors --outdir out"),
    ]
    return "\nDone. Results:\n" + "\n".join(f"  {kind:<13} {where}" for kind, where in entries)
