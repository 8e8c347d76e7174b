# SPDX-License-Identifier: MIT
"""What calc_metrics.py does with its flags: score a network or images, write what was asked for, show it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click
import torch

from torch_utils.distributed import is_main
from training.processes import join_processes
from training.score_options import ScoreOptions, read_options
from training.score_reference import data_of_images
from training.watchdog import activity


def run_scoring(flags: dict[str, Any]) -> None:
    """Do what the flags ask, as one of the processes that share the work. Raises UserError."""
    options = read_options(flags)
    device = join_processes(flags["device"])
    with contextlib.redirect_stdout(sys.stderr) if flags["as_json"] else contextlib.nullcontext():
        text, as_json = _score(options, device)
    click.echo(as_json if flags["as_json"] else text)


def _score(options: ScoreOptions, device: torch.device) -> tuple[str, str]:
    """What to print, for people and for programs."""
    from training.score_report import format_table, to_json
    from training.score_subject import open_subject
    from training.scoring import Scores, needs_reals, save_reference, score

    texts, files, found = [], {}, Scores()
    subject = None
    if options.network is not None or options.images is not None:
        subject = open_subject(options, device, needs_reals(options))
    with activity("evaluation"):
        if options.statistics_file is not None:
            reference = (
                subject.reference if subject else data_of_images(str(options.data), bool(options.mirror))
            )
            texts.append(save_reference(reference, options, device))
            files["statistics"] = options.statistics_file
        if subject is not None and options.metrics:
            found = score(subject, options, device, _say)
            texts.insert(0, format_table(subject, found))
        if subject is not None and options.nearest_file is not None:
            from training.nearest_picture import find_nearest, save_nearest, summarize_nearest

            files["nearest"] = options.nearest_file
            if is_main():
                nearest = find_nearest(subject, options, device)
                save_nearest(Path(options.nearest_file), nearest, subject.reference.images)
                texts.append(summarize_nearest(Path(options.nearest_file), nearest))
    return "\n".join(texts), to_json(subject, found, files)


def _say(message: str) -> None:
    """What people must know while numbers are computed; never among the results."""
    if is_main():
        click.echo(message if message.startswith("WARNING") else f"Note: {message}", err=True)
