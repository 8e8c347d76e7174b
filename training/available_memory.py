# SPDX-License-Identifier: MIT
"""How much memory this process may still take: the machine's, or less where a scheduler or container says so."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
_UNLIMITED = 2**60  # version 1 writes about 2**63 where there is no limit


def available_memory(cgroup_root: Path = CGROUP_ROOT, own_cgroups: Path = OWN_CGROUPS) -> int:
    """Bytes that can be taken without swapping and without being killed. Page cache counts as free."""
    free = [psutil.virtual_memory().available]
    for folder in list_cgroups(cgroup_root, own_cgroups):
        is_v1 = (folder / "memory.limit_in_bytes").exists()
        limit = read_number(folder / ("memory.limit_in_bytes" if is_v1 else "memory.max"))
        used = read_number(folder / ("memory.usage_in_bytes" if is_v1 else "memory.current"))
        if limit is not None and used is not None and limit < _UNLIMITED:
            cached = read_stat(folder / "memory.stat", "total_inactive_file" if is_v1 else "inactive_file")
            free.append(max(limit - used + cached, 0))
    return min(free)


def list_cgroups(cgroup_root: Path, own_cgroups: Path) -> list[Path]:
    """Control groups that limit this process, from its own up: Slurm and Kubernetes limit different levels."""
    try:
        lines = own_cgroups.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    folders = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroup_root / "memory" if controllers else cgroup_root  # version 1 has a tree per controller
        folder = root / path.lstrip("/")
        folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    return folders


def read_number(path: Path) -> int | None:
    """The number in a file; None for "max", and where there is no such file."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_stat(path: Path, name: str) -> int:
    """The number after a name in a file of names and numbers; 0 if it is not there."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(value) for key, value in (line.split() for line in lines) if key == name), 0)
