# SPDX-License-Identifier: MIT
"""python -m training.prefetch FLAGS: fetch what the same flags of train.py would download, for nodes without a network.

Run it where there is a network; the caches (STYLESAN_CACHE, HF_HOME, TORCH_HOME) must lie on a disk that the nodes see.

python -m training.prefetch --preset imagenet-128 --path_stem https://example.org/stem.pkl
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import torch

from torch_utils.download import cache_folder, is_url
from torch_utils.errors import UserError
from training.cli_config import override, starting_config
from training.cli_options import train_options
from training.config import TrainConfig
from training.ladder import find_ladder
from training.metric_schedule import parse_schedule
from training.network_io import read_network
from training.presets import PRESETS
from training.resume import parse_resume, read_run_config


@dataclass(frozen=True)
class Item:
    """Something that a run downloads."""

    what: str  # for people
    get: Callable[[], object]  # uses it as a run would, which fetches it; raises UserError


@dataclass(frozen=True)
class Outcome:
    """What became of an item."""

    what: str  # for people
    status: Literal["there", "fetched", "missing"]  # there = nothing had to be downloaded
    detail: str  # bytes that came, or why it is missing

    def describe(self) -> str:
        """One line of the table."""
        return f"{self.status:<8} {self.what}" + (f": {self.detail}" if self.detail else "")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@train_options
def main(**flags: Any) -> None:
    """Fetch what train.py with the same flags would download. Exit code 1 if anything is missing."""
    try:
        outcomes = []
        for item in items_of_flags(flags):
            click.echo(f"... {item.what}", err=True)
            outcomes.append(fetch_item(item))
    except UserError as error:
        raise click.ClickException(str(error)) from error
    for outcome in outcomes:
        click.echo(outcome.describe())
    num_missing = sum(outcome.status == "missing" for outcome in outcomes)
    if num_missing:
        click.echo(f"{num_missing} of {len(outcomes)} missing.", err=True)
        sys.exit(1)
    click.echo(
        f"Nothing is missing. On the nodes set HF_HUB_OFFLINE=1; caches: {', '.join(map(str, cache_folders()))}"
    )


def items_of_flags(flags: dict[str, Any]) -> list[Item]:
    """Everything that a run with these flags of train.py downloads, each thing once. Raises UserError."""
    files = {"--resume": parse_resume(flags["resume"]).network, "--path_stem": flags["path_stem"]}
    items = [Item(f"{flag} {file}", _reader(file)) for flag, file in files.items() if file and is_url(file)]
    for config in configs_of_flags(flags):
        items += items_of_config(config)
    return list({item.what: item for item in items}.values())


def configs_of_flags(flags: dict[str, Any]) -> Iterable[TrainConfig]:
    """The configurations that the flags lead to, as far as downloads go: the data need not be here."""
    resume = parse_resume(flags["resume"])
    if flags["ladder"] is not None:
        bases = [PRESETS[stage]() for stage in find_ladder(flags["ladder"]).stages]
    elif resume.run_dir is not None:
        bases = [read_run_config(resume.run_dir)]
    elif flags["preset"] or flags["cfg"]:
        bases = [starting_config(flags, None)]
    elif resume.network is not None:
        needed = {
            "resume": resume.network,
            "data": flags["data"] or "",
            "batch": 1,
        }  # the rest is in the file
        bases = [starting_config({**flags, **needed}, read_network(resume.network))]
    else:
        raise UserError(
            "nothing says what to fetch; give the flags of train.py, such as --preset imagenet-16"
        )
    for base in bases:
        config = override(base, metrics=flags["metrics"], embedding_source=flags["embedding"])
        if not config.is_dcgan:
            yield override(
                config,
                discriminator=override(config.discriminator, backbones=flags["backbones"]),
                loss_terms=override(config.loss_terms, cls_weight=flags["cls_weight"]),
            )
        else:
            yield config


def items_of_config(config: TrainConfig) -> list[Item]:
    """Pretrained networks and files that training with `config` needs."""
    from training.discriminator.feature_network import build_feature_network  # imports timm: seconds
    from training.initialization import EMBEDDING_NETWORK
    from training.loss import GuidanceClassifier

    items = []
    backbones = () if config.is_dcgan else config.discriminator.backbones
    if not config.is_dcgan and config.embedding_source == "data" and config.data.use_labels:
        backbones = (*backbones, EMBEDDING_NETWORK)
    for name in backbones:
        items.append(Item(f"feature network {name}", lambda name=name: build_feature_network(name)))
    if not config.is_dcgan and config.loss_terms.cls_weight:
        items.append(Item(f"guidance classifier {GuidanceClassifier.NAME}", GuidanceClassifier.pretrained))
    for name in detectors_of(config):
        items.append(Item(f"detector {name} of metrics", lambda name=name: load_detector(name)))
    for file in (config.resume, config.path_stem):
        if file is not None and is_url(file):
            items.append(Item(f"network {file}", _reader(file)))
    return items


def fetch_item(item: Item) -> Outcome:
    """Use the item once, as a run would; says whether that downloaded something."""
    before = _cached_bytes()
    try:
        item.get()
    except UserError as error:
        return Outcome(item.what, "missing", str(error))
    finally:
        gc.collect()  # networks may be large, and there may be many
    new = _cached_bytes() - before
    return (
        Outcome(item.what, "fetched", f"{new / 2**20:.1f} MB") if new > 0 else Outcome(item.what, "there", "")
    )


def cache_folders() -> list[Path]:
    """Folders that downloads go to."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    hub = Path(os.environ.get("HF_HUB_CACHE") or hub)
    return [cache_folder(), hub.expanduser(), Path(torch.hub.get_dir())]


def _cached_bytes() -> int:
    files = (file for folder in cache_folders() if folder.is_dir() for file in folder.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def _reader(file: str) -> Callable[[], object]:
    """Reading the network, which also shows that the file is whole and of a known kind."""

    return lambda: read_network(file)


def detectors_of(config: TrainConfig) -> list[str]:
    """Networks that the run's metrics compare images with."""
    if not config.metrics:
        return []
    from metrics.names import get_plan

    found = (get_plan(metric.name).detector for metric in parse_schedule(config.metrics))
    return list(dict.fromkeys(name for name in found if name is not None))


def load_detector(name: str) -> object:
    """The network of metrics. Raises UserError when its weights cannot be had."""
    from metrics.detectors import get_detector, get_lpips
    from metrics.evaluate import LPIPS

    return get_lpips() if name == LPIPS else get_detector(name)


if __name__ == "__main__":
    main()
