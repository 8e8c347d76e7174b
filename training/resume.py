# SPDX-License-Identifier: MIT
"""--resume: a network file or URL to start from, a run folder to go on with exactly, or "auto" to find that folder.

`auto` goes on with the newest run of the same command in --outdir, and starts one where there is none: the same line in
a job script serves the first start and every restart. `auto,FILE` does so with a run that starts from FILE.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.cli_config import build_config, override, override_schedule
from training.config import ConfigError, TrainConfig, from_json
from training.data_cache import local_path
from training.dataset import ImageDataset, open_dataset
from training.network_io import BUILTIN_NETWORKS

OPTIONS_FILE = "training_options.json"
# Flags that a run cannot follow once its networks are there, unless the whole command is given again.
FIXED_FLAGS = (
    *(
        "cbase",
        "cmax",
        "map_depth",
        "syn_layers",
        "fp32",
        "backbones",
        "official_bn",
        "embedding",
        "objective",
    ),
    *(
        "cls_weight",
        "blur_kimg",
        "superres",
        "path_stem",
        "up_factor",
        "head_layers",
        "train_stem_input",
        "stem",
    ),
    *("classes_from", "freezed", "desc"),
)


@dataclass(frozen=True)
class Resume:
    """What --resume asks for."""

    run_dir: Path | None = None  # go on with the run in this folder
    is_auto: bool = False  # go on with the newest run of this command, if there is one
    network: str | None = None  # start from the weights in this file


def parse_resume(value: str | None) -> Resume:
    """What a value of --resume means. Raises ConfigError for a folder that holds no run."""
    if value is None:
        return Resume()
    word, _, rest = value.partition(",")
    if word == "auto":
        return Resume(is_auto=True, network=rest or None)
    if value in BUILTIN_NETWORKS or not Path(value).is_dir():
        return Resume(network=value)
    if not (Path(value) / OPTIONS_FILE).exists():
        raise ConfigError(
            f"--resume {value} is a folder without {OPTIONS_FILE}, so not of a run; name a run folder"
        )
    return Resume(run_dir=Path(value))


def newest_run(outdir: str, description: str) -> Path | None:
    """The run folder of the highest number in `outdir` with that description, on any number of processes."""
    wanted = _without_processes(description)
    runs = [p for p in Path(outdir).glob("[0-9]*-*") if (p / OPTIONS_FILE).exists()]
    same = [p for p in runs if _without_processes(p.name.partition("-")[2]) == wanted]
    return max(same, key=lambda p: int(p.name.partition("-")[0]), default=None)


def _without_processes(description: str) -> str:
    return re.sub(r"-gpus\d+-", "-", description)


def read_run_config(run_dir: Path) -> TrainConfig:
    """The configuration of the run in a folder. Raises ConfigError when it cannot be read."""
    try:
        return from_json(TrainConfig, (run_dir / OPTIONS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run_dir / OPTIONS_FILE} cannot be read ({error}); restore it, or start a new run"
        ) from error


def is_whole_command(flags: dict[str, Any]) -> bool:
    """Whether the flags describe a run, rather than what is new in the next part of one."""
    return flags["preset"] is not None or flags["cfg"] is not None


def continued_config(run_dir: Path, flags: dict[str, Any]) -> tuple[TrainConfig, ImageDataset]:
    """Configuration and data of a run that goes on: as it was, but for what the flags say.

    With --preset or --cfg, the flags are those of the whole command again.
    """
    stored = read_run_config(run_dir)
    if is_whole_command(flags):
        return build_config({**flags, "resume": stored.resume})
    for name in FIXED_FLAGS:
        if flags[name] not in (None, False):
            raise ConfigError(
                f"{name}={flags[name]} with --resume {run_dir}: the run has its own by now; leave the flag out"
            )
    data = override(
        stored.data,
        path=flags["data"],
        use_labels=flags["cond"],
        mirror=flags["mirror"],
        num_workers=flags["workers"],
    )
    dataset = open_dataset(
        local_path(data.path, flags), data.use_labels, data.mirror, data.max_size, data.seed
    )
    config = override_schedule(override(stored, data=data), {**flags, "resume": None})
    config = override(
        config,
        generator_optimizer=override(config.generator_optimizer, lr=flags["glr"]),
        discriminator_optimizer=override(config.discriminator_optimizer, lr=flags["dlr"]),
    )
    return config, dataset
