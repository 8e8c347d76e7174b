# SPDX-License-Identifier: MIT
"""The package as a stranger gets it: torch is all it needs, its documentation runs and is complete.

python -m pytest tests/san/test_package.py
"""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import san

ROOT = Path(san.__file__).parents[1]
MODULES = ["san", *sorted(f"san.{file.stem}" for file in (ROOT / "san").glob("[!_]*.py"))]
NO_EXAMPLES = {"san", "san.preserve", "san.trace", "san.twins"}  # what they do shows in san.convert

# First torch, with NumPy and all that it can do without hidden; then only torch and the standard library.
ISOLATED_USE = """
import sys

hidden = ("numpy", "scipy", "PIL", "timm", "torchvision", "sklearn", "safetensors", "tensorboard", "tqdm",
          "click", "einops", "requests", "matplotlib", "training", "torch_utils", "metrics")
sys.modules.update(dict.fromkeys(hidden))  # None makes the import fail
import torch

torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # torch loads its own dependencies at the first optimizer
allowed = {"torch", "san", *sys.stdlib_module_names}
for name in [n for n in sys.modules if n.split(".")[0] not in allowed | {"__main__"}]:
    if not name.split(".")[0].startswith("__"):  # editable-install finders
        sys.modules[name] = None

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
for probe in ("numpy", "typing_extensions", "timm", "yaml"):
    try:
        __import__(probe)
    except ImportError:
        continue
    raise SystemExit(f"{probe} was not blocked")

import san

loaded = [m for m in sys.modules.values() if m is not None and getattr(m, "__name__", "").startswith("san")]
assert len(loaded) >= 4, loaded
plain = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.ReLU(), torch.nn.Conv1d(4, 1, 3, padding=1))
expected = plain(torch.ones(3, 2, 8))
assert str(san.sanify(plain, example=torch.ones(3, 2, 8))).count("SANConv1d") == 1
assert torch.allclose(plain(torch.ones(3, 2, 8)).fun, expected, atol=1e-6)
assert san.keep_normalized(torch.optim.Adam(plain.parameters()), plain)
D = torch.nn.Sequential(torch.nn.Linear(2, 4), san.SANLinear(4, 1))
loss = san.hinge_discriminator_loss(D(torch.ones(3, 2)), D(torch.zeros(3, 2)))
loss.backward()
assert san.normalize_directions_(D) == 1
assert torch.cat([D(torch.ones(3, 2))] * 2, dim=1).shape == (3, 2)
print(san.__file__)
print("alone", loss.item() > 0)
"""


def use_alone(folder: Path) -> list[str]:
    """Lines that ISOLATED_USE prints, with san found in `folder` and only torch beside it."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ISOLATED_USE],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_import_needs_torch_only() -> None:
    assert use_alone(ROOT) == [str(ROOT / "san" / "__init__.py"), "alone", "True"]


@pytest.mark.slow
def test_the_installed_wheel_works_with_torch_only(tmp_path: Path) -> None:
    """pip builds and installs a copy of the sources, without network; what arrives is all of san, and only san."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "san", source / "san", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *options, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    shipped = {path.name for path in (ROOT / "san").iterdir()} - {"__pycache__"}
    assert {path.name for path in (site / "san").iterdir()} - {"__pycache__"} == shipped
    assert "py.typed" in shipped
    folders = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert folders == {"san"}
    metadata = next(site.glob("*.dist-info/METADATA")).read_text()
    needed = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert len(needed) == 1
    assert needed[0].startswith("Requires-Dist: torch")
    assert use_alone(site) == [str(site / "san" / "__init__.py"), "alone", "True"]


@pytest.mark.parametrize("path", sorted((ROOT / "san").glob("*.py")), ids=lambda p: p.name)
def test_source_imports_torch_san_and_the_standard_library_only(path: Path) -> None:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            roots.add(node.module.split(".")[0])
    assert roots <= {"torch", "san"} | sys.stdlib_module_names


def test_public_names_exist_and_are_documented() -> None:
    assert sorted(set(san.__all__)) == sorted(san.__all__)
    for name in san.__all__:
        assert name.endswith("OBJECTIVES") or getattr(san, name).__doc__, name
    assert (ROOT / "san" / "py.typed").exists()


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0
    assert results.attempted > 0 or module in NO_EXAMPLES


def test_code_in_the_documentation_runs() -> None:
    """Blocks of docs/san.md run one after the other, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "san.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/san.md", "exec"), namespace)


def test_documentation_names_every_public_name() -> None:
    text = "".join((ROOT / "docs" / name).read_text() for name in ("san.md", "plugin.md"))
    assert [name for name in san.__all__ if name not in text] == []
