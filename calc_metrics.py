# SPDX-License-Identifier: MIT
"""Compute quality metrics of a network, or of any images, and compare runs.

python calc_metrics.py --metrics fid50k_full,is50k --network runs/00000-.../best_model.safetensors
python calc_metrics.py --metrics fid50k_full --images samples --data my_images.zip
python calc_metrics.py compare runs/*
"""

import os
import sys
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads its OpenMP library, see train.py
os.environ.setdefault("GOMP_SPINCOUNT", "500")

import click

from torch_utils.errors import RunError, UserError
from training.launch import launch, must_launch
from training.processes import run_command
from training.run_comparison import compare
from training.score_cli import run_scoring
from training.score_options import score_options


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@score_options
@click.pass_context
def main(context: click.Context, **flags: Any) -> None:
    """Compute quality metrics of a network or of images. `calc_metrics.py compare RUN...` compares runs.

    Start with: python calc_metrics.py --network digits --metrics fd_lite0
    """
    if context.invoked_subcommand is not None:
        given = [
            name
            for name in flags
            if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        ]
        if given:
            raise click.UsageError(f"{context.invoked_subcommand} has flags of its own; put them behind it")
        return
    try:
        if flags["shows_list"]:
            from training.score_report import format_list

            click.echo(format_list())
            return
        if must_launch(flags["gpus"], flags["device"]):
            sys.exit(launch(flags["gpus"]))
        run_scoring(flags)
    except (UserError, RunError) as error:
        raise click.ClickException(str(error)) from error


main.add_command(compare)

if __name__ == "__main__":
    run_command(main)
