# SPDX-License-Identifier: MIT
"""Discriminators of the field's families, for the tests in this folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent


def load(name: str) -> ModuleType:
    """The file tests/san/<name>.py as a module called san_<name>."""
    spec = importlib.util.spec_from_file_location(f"san_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def discriminators() -> ModuleType:
    return load("discriminators")


@pytest.fixture(scope="session")
def families(discriminators: ModuleType) -> ModuleType:
    return load("families")
