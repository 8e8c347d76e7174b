# SPDX-License-Identifier: MIT
"""Which run folder a launch of torchrun trains in, so that the processes it starts again go on there.

torchrun --max-restarts starts all processes anew after a failure or when machines join; TORCHELASTIC_RUN_ID names the
launch. One small file per launch, `OUTDIR/.launches/<id>.json`, holds its folder.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import psutil

from torch_utils.checkpoint import atomic_write
from torch_utils.process_environment import host_name, read_environment

FOLDER = ".launches"


def remember_run_folder(outdir: str | os.PathLike[str], run_dir: str | os.PathLike[str]) -> None:
    """Note the run folder of this launch; nothing without torchrun. Rank 0 calls it once the folder exists."""
    path = _note_path(outdir)
    if path is None:
        return
    with atomic_write(path) as temporary:
        content = {"run_dir": str(Path(run_dir).resolve()), "agent": _agent()}
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def run_folder_of_launch(outdir: str | os.PathLike[str]) -> Path | None:
    """Run folder of an earlier attempt of this same launch, None if this is the first or there is no torchrun.

    Ids are used again (torch's default is "none"), so an id alone proves nothing: either torchrun counts restarts, or
    the same agent process wrote the note (it does not count restarts because a machine has joined).
    """
    path, environment = _note_path(outdir), read_environment()
    if path is None or environment is None or not path.exists():
        return None
    note = json.loads(path.read_text(encoding="utf-8"))
    if environment.attempt == 0 and note["agent"] != _agent():
        return None
    run_dir = Path(note["run_dir"])
    return run_dir if run_dir.is_dir() else None


def _note_path(outdir: str | os.PathLike[str]) -> Path | None:
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if not run_id:
        return None
    return Path(outdir) / FOLDER / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', run_id)}.json"


def _agent() -> str:
    """The torchrun process that started this one."""
    parent = os.getppid()
    try:
        return f"{host_name()}/{parent}/{psutil.Process(parent).create_time():.2f}"
    except psutil.NoSuchProcess:
        return f"{host_name()}/{parent}"
