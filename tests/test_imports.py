# SPDX-License-Identifier: MIT
"""Who may import whom, read from the source: root scripts -> training -> {metrics, torch_utils, san}."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {  # package -> first-party packages it may import; "" = scripts in the root folder
    "": {"training", "metrics", "torch_utils", "san"},
    "training": {"training", "metrics", "torch_utils", "san"},
    "metrics": {"metrics", "torch_utils"},
    "torch_utils": {"torch_utils"},
    "san": {"san"},
}
FIRST_PARTY = set(ALLOWED) - {""}
TIMM_FILES = {
    "training/benchmark/naive_networks.py",
    "training/discriminator/feature_network.py",
    "training/loss.py",
    "metrics/features.py",
    "metrics/vision_transformers.py",
}


def product_files() -> list[Path]:
    files = [file for package in FIRST_PARTY for file in (ROOT / package).rglob("*.py")]
    return sorted([*files, *ROOT.glob("*.py")])


def imported_modules(file: Path, text: str | None = None) -> set[str]:
    """Dotted names a file imports anywhere in it; `from a import b` counts as a and a.b."""
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def top_levels(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Modules that importing `start` brings along, packages above each of them included."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        if name in seen or name not in graph:
            continue
        seen.add(name)
        todo += [*graph[name], name.rpartition(".")[0]]
    return seen


def test_files_are_found():
    names = {file.relative_to(ROOT).as_posix() for file in product_files()}
    assert {"san/__init__.py", "training/dataset.py", "training/config.py"} <= names


@pytest.mark.parametrize("file", product_files(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_first_party_imports_follow_the_rule(file: Path):
    parts = file.relative_to(ROOT).parts
    package = parts[0] if len(parts) > 1 else ""
    forbidden = top_levels(imported_modules(file)) & (FIRST_PARTY - ALLOWED[package])
    assert not forbidden, f"{package or 'a root script'} must not import {sorted(forbidden)}"


def test_nothing_imports_root_scripts_or_tests():
    outside = {file.stem for file in ROOT.glob("*.py")} | {"tests"}
    for file in product_files():
        assert not top_levels(imported_modules(file)) & outside, file


def test_san_imports_only_torch_and_the_standard_library():
    for file in (ROOT / "san").rglob("*.py"):
        foreign = top_levels(imported_modules(file)) - {"san", "torch"} - set(sys.stdlib_module_names)
        assert not foreign, f"{file}: {sorted(foreign)}"


def test_timm_is_imported_in_few_files_only():
    users = {
        f.relative_to(ROOT).as_posix() for f in product_files() if "timm" in top_levels(imported_modules(f))
    }
    assert users <= TIMM_FILES


@pytest.mark.parametrize(("one", "other"), [("generator", "discriminator"), ("discriminator", "generator")])
def test_generator_and_discriminator_are_independent(one: str, other: str):
    graph = {module_name(file): imported_modules(file) for file in product_files()}
    starts = [name for name in graph if name.startswith(f"training.{one}")]
    assert starts
    for start in starts:
        reached = {name for name in reachable(start, graph) if name.startswith(f"training.{other}")}
        assert not reached, f"{start} reaches {sorted(reached)}"


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests").rglob("*.py")), ids=lambda file: file.relative_to(ROOT).as_posix()
)
def test_scripts_and_tests_import_names_that_exist(file: Path):
    """Benchmark scripts run rarely: a name that a module gave up would be missed when somebody needs them."""
    modules = {module_name(product) for product in product_files()}
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module not in modules:
            continue
        for alias in node.names:
            if f"{node.module}.{alias.name}" not in modules:
                assert hasattr(importlib.import_module(node.module), alias.name), (
                    f"{node.module}.{alias.name}"
                )


def test_the_reader_sees_every_form_of_import():
    file = ROOT / "training" / "generator" / "x.py"
    text = "import a.b\ndef f():\n    from c import d\nfrom . import e\nfrom ..discriminator.heads import g\n"
    assert imported_modules(file, text) == {
        "a.b",
        "c",
        "c.d",
        "training.generator",
        "training.generator.e",
        "training.discriminator.heads",
        "training.discriminator.heads.g",
    }


SAN_ALONE = """
import builtins, importlib, pkgutil, sys, torch
plain_import = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    top = name.partition(".")[0]
    if importer == "san" and level == 0 and top not in {"san", "torch", *sys.stdlib_module_names}:
        raise ImportError(f"san must not import {name}")
    return plain_import(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
import san
for module in pkgutil.walk_packages(san.__path__, "san."):
    importlib.import_module(module.name)
others = {"timm", "training", "metrics", "torch_utils"} & set(sys.modules)
assert not others, others
"""

GENERATOR_WITHOUT_TIMM = """
import sys
sys.modules["timm"] = None  # import timm raises ImportError
import importlib, pkgutil
import training.generator, training.network_io
for module in pkgutil.walk_packages(training.generator.__path__, "training.generator."):
    importlib.import_module(module.name)
assert not any(name.startswith("training.discriminator") for name in sys.modules)
"""


COMMAND_LINE_WITHOUT_TIMM = """
import sys
sys.modules["timm"] = None
import train
train.main(["--help"])
"""


@pytest.mark.parametrize(
    "program",
    [SAN_ALONE, GENERATOR_WITHOUT_TIMM, COMMAND_LINE_WITHOUT_TIMM],
    ids=["san", "generator", "train.py"],
)
def test_imports_with_other_packages_blocked(program: str):
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
