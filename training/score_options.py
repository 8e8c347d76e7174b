# SPDX-License-Identifier: MIT
"""Flags of calc_metrics.py, and what they come to. Names and defaults are the official ones where those exist."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from metrics.names import get_plan
from torch_utils.download import OFFLINE_VARIABLES, is_url
from torch_utils.errors import UserError
from training.sampling import LARGEST_SEED

DEFAULT_METRIC = "fid50k_full"
DEFAULT_SEED = 1  # training's, so that both give the same numbers
POSITIVE = click.IntRange(min=1)
# Weights that several detectors share: what is given for the first is meant for all.
SHARED_WEIGHTS = {"inception": ("inception", "inception_clean"), "vgg16": ("vgg16", "lpips")}

OPTIONS = [
    click.option("--metrics", metavar="NAME,..|none", help="Metrics, see --list  [default: fid50k_full]"),
    click.option("--network", metavar="FILE|URL|NAME",
                 help="Network to score: a .safetensors or official .pkl file, its https address, or digits"),
    click.option("--images", metavar="FOLDER|ZIP", help="Images to score instead, all of one size"),
    click.option("--data", metavar="FOLDER|ZIP|NAME",
                 help="Real images to compare with  [default: those the network was trained on]"),
    click.option("--reference", metavar="FILE.npz",
                 help="Mean and covariance of real images to compare with: EDM's, ADM's, clean-fid's files or ours"),
    click.option("--mirror", type=click.BOOL,
                 help="Whether fid50k, kid50k and pr* count mirrored real images  [default: as in training]"),
    click.option("--gpus", type=POSITIVE, help="Processes that share the work, one per GPU  [default: 1]"),
    click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps  [default: auto]"),
    click.option("--batch", type=POSITIVE, metavar="N",
                 help="Images per forward pass of the network; changes no number  [default: up to 64]"),
    click.option("--verbose", type=click.BOOL, default=True, help="Show progress  [default: true]"),
    click.option("--offline", is_flag=True, help="Download nothing; addresses must have been used before"),
]  # fmt: skip
NUMBERS = [
    click.option("--truncation", "--trunc", "truncation_psi", type=float, default=1.0, metavar="PSI",
                 help="Truncation psi; 1 = none  [default: 1]"),
    click.option("--trunc-cutoff", type=click.IntRange(min=0), help="Truncate only the first N layers"),
    click.option("--centroids-path", metavar="FILE|URL", help="Multi-modal truncation: means of w, .npy (K, w_dim)"),
    click.option("--labels", type=click.Choice(["uniform", "dataset"]), default="uniform",
                 help="Classes of generated images: all alike, as officially, or as often as in the data set"
                 "  [default: uniform]"),
    click.option("--num-images", type=click.IntRange(min=2), metavar="N",
                 help="Score at most so many images: quick, and another number than the metric's name promises"),
    click.option("--seed", type=click.IntRange(0, LARGEST_SEED), default=DEFAULT_SEED,
                 help=f"Of latents, classes and KID's subsets  [default: {DEFAULT_SEED}, as in training]"),
    click.option("--seeds", type=POSITIVE, default=1, metavar="K",
                 help="Repeat with K seeds, from --seed on; shows mean and spread"),
    click.option("--half-distances", is_flag=True, help="float16 distances in precision and recall, as officially"),
    click.option("--detector", "detectors", multiple=True, metavar="[NAME=]FILE|URL",
                 help="Weights of a detector; without NAME those of the 2015 Inception. May be repeated"),
]  # fmt: skip
OUTPUT = [
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object, everything else to stderr"),
    click.option("--save-statistics", metavar="FILE.npz",
                 help="Write mean and covariance of --data, for --reference and for other projects"),
    click.option("--nearest", metavar="FILE.png",
                 help="Picture of samples beside the training images nearest to them: are they copies?"),
    click.option("--nearest-samples", type=POSITIVE, default=8, metavar="N", help="Samples in it  [default: 8]"),
    click.option("--nearest-k", type=POSITIVE, default=5, metavar="K", help="Neighbours of each  [default: 5]"),
    click.option("--nearest-detector", default="lite0", metavar="NAME",
                 help="Detector whose features are compared  [default: lite0, which needs no download]"),
    click.option("--list", "shows_list", is_flag=True, help="Show all metrics and what they need"),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What calc_metrics.py is asked for."""

    metrics: tuple[str, ...]  # to compute, by name
    network: str | None  # network to score: file, address or name
    images: str | None  # images to score instead
    data: str | None  # real images; None = those of the network's training
    reference: str | None  # statistics of real images instead
    mirror: bool | None  # None = as in training
    batch: int | None  # images per forward pass; None = by resolution
    is_verbose: bool  # show progress
    truncation_psi: float  # 1 = none
    trunc_cutoff: int | None  # style vectors to truncate; None = all
    centroids_path: str | None  # of multi-modal truncation
    labels: Literal["uniform", "dataset"]  # classes of generated images
    num_images: int | None  # at most; None = as the metric's name says
    seed: int  # first one
    num_seeds: int  # repetitions
    half_distances: bool  # of precision and recall
    detector_paths: dict[str, str]  # weights by detector
    statistics_file: str | None  # to write
    nearest_file: str | None  # picture to write
    nearest_samples: int  # rows of it
    nearest_k: int  # neighbours of each
    nearest_detector: str  # name


def score_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags to a click command."""
    for option in reversed([*OPTIONS, *NUMBERS, *OUTPUT]):
        command = option(command)
    return command


def read_options(flags: dict[str, Any]) -> ScoreOptions:
    """What the flags mean. Raises UserError for those that do not fit together, before anything is read."""
    if flags["offline"]:
        os.environ.update(
            dict.fromkeys(OFFLINE_VARIABLES, "1")
        )  # detectors come by several ways, which obey these
    options = ScoreOptions(
        metrics=_read_metrics(flags),
        network=flags["network"],
        images=flags["images"],
        data=flags["data"],
        reference=flags["reference"],
        mirror=flags["mirror"],
        batch=flags["batch"],
        is_verbose=flags["verbose"],
        truncation_psi=flags["truncation_psi"],
        trunc_cutoff=flags["trunc_cutoff"],
        centroids_path=flags["centroids_path"],
        labels=flags["labels"],
        num_images=flags["num_images"],
        seed=flags["seed"],
        num_seeds=flags["seeds"],
        half_distances=flags["half_distances"],
        detector_paths=parse_detectors(flags["detectors"]),
        statistics_file=flags["save_statistics"],
        nearest_file=flags["nearest"],
        nearest_samples=flags["nearest_samples"],
        nearest_k=flags["nearest_k"],
        nearest_detector=flags["nearest_detector"],
    )
    _check(options)
    return options


def _read_metrics(flags: dict[str, Any]) -> tuple[str, ...]:
    """--metrics; without it the default, unless something else than a number is asked for."""
    text = flags["metrics"]
    if text is None:
        text = "none" if flags["nearest"] else DEFAULT_METRIC
    if text.strip().lower() == "none":
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        get_plan(name)
    return names


def _check(options: ScoreOptions) -> None:
    if options.network is not None and options.images is not None:
        raise UserError("--network and --images both say what to score; give one of them")
    is_scoring = options.network is not None or options.images is not None
    if not is_scoring and not (options.statistics_file and options.data):
        raise UserError(
            "nothing to score; give --network FILE or --images FOLDER (or --data with --save-statistics)"
        )
    if options.data is not None and options.reference is not None:
        raise UserError("--data and --reference both say what to compare with; give one of them")
    if not (options.metrics or options.nearest_file):
        raise UserError("--metrics none leaves nothing to do; name a metric, or add --nearest FILE.png")
    if options.nearest_file and not is_scoring:
        raise UserError(f"--nearest {options.nearest_file} shows samples; add --network or --images")
    if options.nearest_file and Path(options.nearest_file).suffix.lower() != ".png":
        raise UserError(f"--nearest {options.nearest_file} does not end in .png; name a PNG file")
    if options.nearest_file and options.reference is not None:
        raise UserError(
            "--nearest shows training images, which --reference does not hold; give --data instead"
        )
    if options.statistics_file and Path(options.statistics_file).suffix.lower() != ".npz":
        raise UserError(
            f"--save-statistics {options.statistics_file} does not end in .npz; name an .npz file"
        )
    if options.statistics_file and not options.metrics:
        raise UserError(
            "--save-statistics needs a metric that says which features; add --metrics fid50k_full"
        )
    if options.statistics_file:
        _check_statistics(options.metrics)
    if options.seed + options.num_seeds - 1 > LARGEST_SEED:
        raise UserError(
            f"--seed {options.seed} and --seeds {options.num_seeds} go beyond the largest seed, {LARGEST_SEED}; "
            "lower --seed"
        )
    if options.images is not None and (options.truncation_psi != 1 or options.centroids_path is not None):
        raise UserError(
            "--truncation belongs to --network: the images of --images exist already; leave it out"
        )


def _check_statistics(metrics: Sequence[str]) -> None:
    """UserError unless all metrics compare means and covariances of one detector's features."""
    plans = {name: get_plan(name) for name in metrics}
    wrong = [name for name, plan in plans.items() if plan.keeps != "moments" or plan.max_reals == 0]
    if wrong:
        raise UserError(
            f"--save-statistics: {wrong[0]} compares no mean and covariance; name fid50k_full, say"
        )
    detectors = list(dict.fromkeys(str(plan.detector) for plan in plans.values()))
    if len(detectors) > 1:
        raise UserError(
            f"--save-statistics: a file holds the features of one detector, not of {', '.join(detectors)}; call again "
            "for each"
        )


def parse_detectors(texts: Sequence[str]) -> dict[str, str]:
    """Weights by detector, from NAME=FILE or FILE alone. Raises UserError for an unknown name or a missing file."""
    from metrics.detectors import DETECTORS

    known = [*(name for name in DETECTORS if name not in ("lite0", "inception_clean")), "lpips"]
    paths: dict[str, str] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or is_url(name) or Path(text).exists():
            name, path = "inception", text
        elif name not in known:
            raise UserError(
                f"--detector {text}: no detector {name!r} takes a file; those that do: {', '.join(known)}"
            )
        if not is_url(path) and not Path(path).is_file():
            raise UserError(f"--detector {text}: {path} is no file; give the file of its weights")
        paths |= dict.fromkeys(SHARED_WEIGHTS.get(name, (name,)), path)
    return paths
