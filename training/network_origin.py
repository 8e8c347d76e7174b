# SPDX-License-Identifier: MIT
"""Where a network comes from: its run, how far that was, and the data set it was trained on.

Read from the run folder's training_options.json, ours or the official one, or else from the network file itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_utils.errors import UserError
from training.network_io import read_info, read_train_settings

OPTIONS_FILE = "training_options.json"


@dataclass(frozen=True)
class NetworkOrigin:
    """What is known about a network beside its weights."""

    run_dir: Path | None  # folder that takes its metrics; None = it lies in no run folder
    cur_nimg: int | None  # real images it has seen; None = not known
    data: str | None  # path or name of its training images; None = not known
    mirror: bool  # whether mirrored images were training images too
    content_hash: str | None  # of the training images, see `hash_content`; None = not known


def find_origin(file: Path) -> NetworkOrigin:
    """What is known about the network in `file`. Raises UserError for options that cannot be read."""
    info = read_info(file)
    run_dir = file.parent if (file.parent / OPTIONS_FILE).is_file() else None
    options = read_train_settings(file) if run_dir is None else _read_options(run_dir / OPTIONS_FILE)
    data, mirror = _data_of(options)
    if data is None:
        data, mirror = _data_of(info)
    nimg, content_hash = info.get("cur_nimg"), info.get("content_hash")
    return NetworkOrigin(
        run_dir=run_dir,
        cur_nimg=int(nimg) if isinstance(nimg, (int, float)) else None,
        data=data,
        mirror=mirror,
        content_hash=content_hash if isinstance(content_hash, str) else None,
    )


def _read_options(file: Path) -> Mapping[str, Any]:
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); repair it, or move the network out of it"
        ) from error
    return options if isinstance(options, dict) else {}


def _data_of(options: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Path and mirroring: ours (`data`), of official options (`training_set_kwargs`) and files (`training_set`)."""
    for key, mirror_key in (("data", "mirror"), ("training_set_kwargs", "xflip"), ("training_set", "xflip")):
        settings = options.get(key)
        if isinstance(settings, dict) and isinstance(settings.get("path"), str) and settings["path"]:
            return settings["path"], bool(settings.get(mirror_key, False))
    return None, False
