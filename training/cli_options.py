# SPDX-License-Identifier: MIT
"""Flags of train.py: StyleGAN-XL's names and meanings, plus --loss, --preset, --device and a few more.

An absent flag is None, so that the preset's value shows through; the defaults in the help texts are those of
`presets.stylegan_xl`, which `--cfg` starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import click

from torch_utils.ops.choice import BACKENDS
from training.cli_dcgan import parse_objective
from training.config import ConfigError, FeaturePrecision, Precision
from training.durations import parse_duration
from training.ladder import LADDER_NAMES
from training.presets import PRESETS

POSITIVE = click.IntRange(min=1)
NOT_NEGATIVE = click.IntRange(min=0)
POSITIVE_REAL = click.FloatRange(min=0, min_open=True)
NOT_NEGATIVE_REAL = click.FloatRange(min=0)
BOOL = {"type": bool, "metavar": "BOOL"}


def parse_names(
    _context: click.Context, _param: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    """Names separated by commas; "none" is no name; an absent flag stays None."""
    if value is None:
        return None
    return tuple(part.strip() for part in value.split(",") if part.strip() and part.lower() != "none")


def parse_batch_gpu(_context: click.Context, _param: click.Parameter, value: str | None) -> int | str | None:
    """A number of images or "auto"; an absent flag stays None."""
    if value is None or value == "auto":
        return value
    if value.isascii() and value.isdigit() and int(value) > 0:
        return int(value)
    raise click.BadParameter(f"{value!r} is neither a positive number of images nor auto")


def parse_time_limit(_context: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Seconds of a duration; an absent flag stays None."""
    try:
        return None if value in (None, "0") else parse_duration(value)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error


def choice(*names: str) -> click.Choice:
    """One of the given words."""
    return click.Choice(names)


GENERAL = [
    click.option("--preset", type=choice(*sorted(PRESETS)), help="Named recipe; other flags override it"),
    click.option("--ladder", type=choice(*LADDER_NAMES), metavar="NAME",
                 help="Train all stages of a recipe, or those up to the stage of that name, each in OUTDIR/NAME/STAGE; "
                 "run it again to go on where it stopped. --data 'x_{resolution}.zip' names the images of each stage. "
                 f"Names: {', '.join(LADDER_NAMES)}"),
    click.option("--loss", type=choice("san", "gan"),
                 help="SAN or plain GAN discriminator  [default: san; gan where the objective has no SAN form]"),
    click.option("--objective", metavar="NAME", callback=parse_objective,
                 help="hinge, saturating (minimax), nonsaturating, soft_least_squares; with --loss gan least_squares; "
                 "without --cfg dcgan wasserstein. With --cfg dcgan only: wgan, wgan_gp, curriculum, dragan, infogan, "
                 "relativistic; with --loss gan began. In the Wasserstein losses (wgan, wgan_gp, curriculum) SAN is no "
                 "other objective: it makes the last layer a unit direction, and keeps penalties off it"
                 "  [default: hinge; nonsaturating with --cfg dcgan]"),
    click.option("--outdir", metavar="DIR", default="runs", show_default=True, help="Where run folders go"),
    click.option("--data", metavar="ZIP|DIR|digits", help="Training images [required without --preset]"),
    click.option("--device", type=choice("auto", "cpu", "cuda", "mps"), default="auto", show_default=True,
                 help="Where to train"),
    click.option("--cfg", type=choice("stylegan3-t", "stylegan3-r", "dcgan", "stylegan2", "fastgan"),
                 help="Base configuration; dcgan: small networks, from scratch [required without --preset]"),
    click.option("--gpus", type=POSITIVE, help="Processes on this machine; torchrun says it itself  [default: 1]"),
    click.option("--batch", type=POSITIVE,
                 help="Images per optimizer step [required without --preset; dcgan: as its paper]"),
    click.option("--batch-gpu", metavar="N|auto", callback=parse_batch_gpu,
                 help="Images per forward pass of a process; auto: as many as fit  [default: the whole share]"),
    click.option("-n", "--dry-run", is_flag=True, help="Print the configuration and stop; nothing is written"),
]  # fmt: skip
DATA = [
    click.option("--cond", **BOOL, help="Condition on the class labels of dataset.json  [default: 0]"),
    click.option("--mirror", **BOOL, help="Add left-right flipped images  [default: 0]"),
    click.option("--workers", type=NOT_NEGATIVE, help="Processes that load images; 0 = none  [default: 3]"),
    click.option("--embedding", metavar="data|random|FILE",
                 help="Class embedding rows: means of the training images' features, random, or a table"
                 "  [default: data]"),
]  # fmt: skip
NETWORKS = [
    click.option("--resume", metavar="FILE",
                 help="Start from the weights of this network file; its layers need no flags, and without --cfg and"
                 " --preset its settings apply too"),
    click.option("--classes-from", metavar="same|names|nearest|mean|LIST|FILE",
                 help="With --resume: what each class of the data starts from. The class with the same id, or name, or"
                 " the most similar images; the mean of all; or a list (or a file, one per line) with a class of the"
                 " checkpoint for each  [default: names, same, nearest or mean, whichever can be had first]"),
    click.option("--freezed", type=NOT_NEGATIVE,
                 help="With --resume: keep the first N blocks (convolution and BatchNorm) of every head of D as they"
                 " are  [default: 0]"),
    click.option("--cbase", type=POSITIVE, help="Capacity multiplier of G  [default: 32768]"),
    click.option("--cmax", type=POSITIVE, help="Most feature maps in G  [default: 512]"),
    click.option("--map-depth", type=POSITIVE, help="Layers of the mapping network  [default: 2]"),
    click.option("--syn_layers", type=POSITIVE, help="Layers of the synthesis network  [default: 14]"),
    click.option("--fp32", **BOOL,
                 help="--precision fp32 for good: files are sampled in float32 too, and G has no clamp  [default: 0]"),
    click.option("--backbones", metavar="NAME,..", callback=parse_names,
                 help="timm names of D's feature networks"
                 "  [default: deit_base_distilled_patch16_224,tf_efficientnet_lite0]"),
    click.option("--official-bn", **BOOL,
                 help="Repeat the official shift of the feature network's BatchNorm statistics"
                 "  [default: 0; 1 in paper presets]"),
]  # fmt: skip
STAGES = [
    click.option("--superres", is_flag=True, help="Train a super-resolution stage on top of --path_stem"),
    click.option("--path_stem", metavar="FILE", help="Network under the stage; its weights stay as they are"),
    click.option("--up_factor", type=click.IntRange(min=2),
                 help="Resolution of the stage relative to its stem: 2, 4, 8 or 16  [default: 2]"),
    click.option("--head_layers", type=POSITIVE, help="Layers that the stage adds before ToRGB  [default: 7]"),
    click.option("--train-stem-input", **BOOL,
                 help="Train the stem's Fourier features along, as the official code does"
                 "  [default: 0; 1 in paper presets]"),
    click.option("--stem", is_flag=True, help="Train a stem, as happens without --superres anyway"),
]  # fmt: skip
SCHEDULE = [
    click.option("--glr", type=POSITIVE_REAL, help="Learning rate of G  [default: 0.0025]"),
    click.option("--dlr", type=POSITIVE_REAL, help="Learning rate of D  [default: 0.002]"),
    click.option("--cls_weight", type=click.FloatRange(min=0),
                 help="Classifier guidance as the paper counts it; needs the ImageNet classes  [default: 0]"),
    click.option("--blur-kimg", type=NOT_NEGATIVE_REAL,
                 help="Images are blurred before D, ever less, for so many thousand images; 0 = never  [default: 300]"),
    click.option("--kimg", type=POSITIVE_REAL, help="Length of training, thousands of images  [default: 25000]"),
    click.option("--tick", type=POSITIVE_REAL, help="Thousands of images per progress report  [default: 4]"),
    click.option("--snap", type=NOT_NEGATIVE, help="Ticks per snapshot; 0 = only at the end  [default: 50]"),
    click.option("--metrics", metavar="NAME,..|none", callback=parse_names,
                 help="Metrics at snapshots; NAME:5 at every fifth  [default: fid50k_full, or fd_lite0 on digits]"),
    click.option("--best-by", metavar="KEY",
                 help="Result of a metric that picks best_model  [default: the first of the first metric]"),
    click.option("--seed", type=NOT_NEGATIVE, help="Random seed  [default: 0]"),
    click.option("--nobench", **BOOL, help="Do not let cuDNN time its kernels  [default: 0]"),
    click.option("--desc", metavar="TEXT", help="Text to add to the run folder's name"),
]  # fmt: skip
RUNNING = [
    click.option("--checkpoint", type=NOT_NEGATIVE, metavar="TICKS",
                 help="Save the complete state every N ticks, beside every snapshot  [default: 10]"),
    click.option("--keep-last", type=POSITIVE, help="Complete states to keep  [default: 2]"),
    click.option("--keep-every", type=NOT_NEGATIVE_REAL, metavar="KIMG",
                 help="Keep a network file for good every so many thousand images; 0 = none  [default: 0]"),
    click.option("--time-limit", "--restart_every", metavar="3h50m", callback=parse_time_limit,
                 help="Save and stop before so much time is over; a plain number counts seconds, 0 = no limit"),
    click.option("--on-nonfinite", type=choice("skip", "rollback", "abort"),
                 help="What a gradient that is not finite leads to  [default: skip]"),
    click.option("--nonfinite-limit", type=POSITIVE, metavar="N",
                 help="Abort after so many such steps in a row  [default: 10]"),
    click.option("--precision", type=choice(*get_args(Precision)),
                 help="What G trains in. paper: fp16 on CUDA in the recipe's layers for it, float32 elsewhere; fp32:"
                 " float32; bf16, fp16 (CUDA): these layers, or StyleGAN3's where the recipe has none"
                 "  [default: paper]"),
    click.option("--feature-precision", type=choice(*get_args(FeaturePrecision)),
                 help="What D's frozen feature networks compute in. paper: float32; tf32 (NVIDIA GPUs from Ampere on);"
                 " bf16  [default: paper]"),
    click.option("--checkpoint-activations", **BOOL,
                 help="Compute activations again in backward passes instead of keeping them: the same gradients, less"
                 " memory, more time  [default: 0]"),
    click.option("--sync-bn", **BOOL, help="BatchNorm of D normalises over all processes  [default: 0]"),
    click.option("--cache-data", metavar="DIR", help="Copy the images to this local folder of each machine first"),
    click.option("--ops", type=choice(*BACKENDS),
                 help="Filtered leaky ReLU in plain PyTorch, C++ (CPU) or Triton (CUDA)  [default: auto]"),
    click.option("--wandb", metavar="PROJECT", help="Also log to this project of Weights & Biases"),
]  # fmt: skip


def train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add every flag of train.py to a click command."""
    for option in reversed([*GENERAL, *DATA, *NETWORKS, *STAGES, *SCHEDULE, *RUNNING]):
        command = option(command)
    return command
