# SPDX-License-Identifier: MIT
"""Fault injection: the harness, and a table of what was injected and what was lost.

python -m pytest -m slow tests/faults --fault-report faults.md
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

COLUMNS = ("faults", "steps_lost", "files_lost", "hangs")
TABLE = pytest.StashKey[dict[str, Counter]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-report", metavar="FILE", help="write the table of injected faults to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = {}
    if config.getoption("--fault-report") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--fault-report counts faults in one process; leave out -n")


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    path = Path(__file__).parent / "harness.py"
    spec = importlib.util.spec_from_file_location("fault_harness", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rows(request: pytest.FixtureRequest, harness: ModuleType) -> Iterator[Callable[[str], Any]]:
    """rows(title) -> the counts of one row of the table, for a test of several faults in one run."""
    found: dict[str, Any] = {}
    last = ""

    def row(title: str) -> Any:
        nonlocal last
        last = title
        return found.setdefault(title, harness.Counts())

    hangs_before = len(harness.hung)
    yield row
    if last:
        found[last].hangs += len(harness.hung) - hangs_before  # the test has ended there
    for title, counts in found.items():
        row = request.config.stash[TABLE].setdefault(title, Counter())
        down_s = max(row["down_s"], counts.down_s)
        row.update(asdict(counts))
        row["down_s"] = down_s


@pytest.fixture
def counts(request: pytest.FixtureRequest, rows: Callable[[str], Any]) -> Any:
    """Counts of a test of one kind of fault: its row is named by the first line of its docstring."""
    return rows((request.function.__doc__ or request.function.__name__).strip().splitlines()[0].rstrip("."))


@pytest.fixture(scope="session")
def straight(harness: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of one process without a fault."""
    return harness.run_to_end(tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="session")
def straight_pair(harness: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two processes without a fault."""
    return harness.run_to_end(tmp_path_factory.mktemp("straight_pair"), "--gpus", "2")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    table = config.stash[TABLE]
    if not table:
        return
    lines = [
        "| fault | injected | steps lost | files lost | hangs | all down after |",
        "|---|---|---|---|---|---|",
    ]
    total = Counter()
    for title, counted in table.items():
        total.update({name: counted[name] for name in COLUMNS})
        down = f"{counted['down_s']:.0f} s" if counted["down_s"] else ""
        lines.append(f"| {title} | " + " | ".join(str(counted[name]) for name in COLUMNS) + f" | {down} |")
    lines.append("| **all** | " + " | ".join(f"**{total[name]}**" for name in COLUMNS) + " | |")
    terminalreporter.write_line("\n".join(lines))
    if path := config.getoption("--fault-report"):
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
