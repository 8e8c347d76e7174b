# SPDX-License-Identifier: MIT
"""Train a StyleGAN-XL generator with a SAN (or plain GAN) projected discriminator.

python train.py --loss san --preset quickstart
python train.py --loss san --cfg stylegan3-t --data my_images.zip --batch 64 --batch-gpu 8
python train.py --loss san --ladder digits
python train.py --cfg dcgan --objective wgan_gp --data digits
torchrun --nproc-per-node=8 train.py --loss san --preset imagenet-16 --data imagenet_16.zip
"""

import os
import sys
from typing import Any

# Read once, when torch loads its OpenMP library. By default idle threads spin, and a process that shares a core with
# another then takes several times as long per step; sleeping ones cost that core's share only. Some microseconds of
# spinning before they sleep (GNU's library) are worth a tenth of a step of small networks: docs/performance.md.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "500")

import click

from torch_utils.errors import RunError, UserError
from torch_utils.ops.choice import set_backend
from training.cli import run_training
from training.cli_options import train_options
from training.launch import launch, must_launch
from training.processes import run_command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@train_options
def main(**flags: Any) -> None:
    """Train a StyleGAN-XL generator with SAN.

    Start with: python train.py --loss san --preset quickstart
    """
    try:
        if flags["ops"] is not None:
            set_backend(flags["ops"])
        if must_launch(flags["gpus"], flags["device"], flags["dry_run"]):
            sys.exit(launch(flags["gpus"]))
        if flags["ladder"] is None:
            run_training(flags)
        else:
            from training.ladder_run import run_ladder  # imports timm and friends, which takes seconds

            run_ladder(flags)
    except (UserError, RunError) as error:
        failure = click.ClickException(str(error))
        failure.exit_code = error.exit_code if isinstance(error, RunError) else 1
        raise failure from error


if __name__ == "__main__":
    run_command(main)
